"""The terms of each method are the losses, with every setting of the method."""

import itertools

import jax
import numpy as np
import pytest
from losses.batches import compiled, random_batch

from dgkd_jax import losses
from dgkd_jax.methods import DGKD, DIST, DKD, GDKD, KD, NKD, RLD, WTTM, LogitMSE

pytestmark = pytest.mark.usefixtures("float64")

# None of them a default.
AT, WEIGHING = {"temperature": 2.5}, {"parity_batch": 3, "kappa": 0.3}
COUPLINGS = tuple(itertools.product(losses.CONVENTIONS, losses.DISTANCES))


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, expected)


def test_terms_of_the_methods_without_a_coupling():
    student, teacher, _ = batch = random_batch(6, 5)
    tckd, nckd = losses.tckd(*batch, **AT), losses.nckd(*batch, **AT)
    assert_close(KD(**AT).terms(*batch), {"kd": losses.kd(student, teacher, **AT)})
    assert_close(DKD(**AT).terms(*batch), {"tckd": tckd, "nckd": nckd})
    assert_close(LogitMSE().terms(*batch), {"logit_mse": losses.logit_mse(student, teacher)})


@pytest.mark.slow
def test_terms_of_the_peers():
    student, teacher, labels = batch = random_batch(6, 5)
    both = student, teacher
    standard = *map(losses.standardize, both), labels
    found = {
        NKD(**AT, gamma=0.7): losses.nkd(*batch, **AT, gamma=0.7),
        DIST(**AT, beta=3.0, gamma=0.7): losses.dist(*both, **AT, beta=3.0, gamma=0.7),
        WTTM(gamma=0.7): losses.wttm(*both, gamma=0.7),
        RLD(**AT, alpha=3.0, beta=0.7, alpha_temperature=2.0): losses.rld(
            *batch, **AT, alpha=3.0, beta=0.7, alpha_temperature=2.0
        ),
        GDKD(**AT, k=2, w0=3.0, w1=0.7, w2=5.0): losses.gdkd(*both, **AT, k=2, w0=3.0, w1=0.7, w2=5.0),
        GDKD(**AT, k=9): losses.gdkd(*both, **AT, k=4, w0=1.0, w1=8.0, w2=8.0),  # all but one of five classes
        KD(**AT, standardize=True): losses.kd(*standard[:2], **AT),
    }
    for method, expected in found.items():
        assert_close(method.terms(*batch), {method.name: expected})
    assert_close(DKD(**AT, standardize=True).terms(*batch), DKD(**AT).terms(*standard))
    assert_close(DGKD(dkd=DKD(**AT, standardize=True)).terms(*batch), DGKD(dkd=DKD(**AT)).terms(*standard))


@pytest.mark.slow
def test_terms_of_dgkd_with_respect_to_logits():
    batch = random_batch(6, 5)

    @compiled
    def both(*batch):
        gradients = [gradient(*batch, **AT) for gradient in (losses.tckd_gradient, losses.nckd_gradient)]
        pairs = []
        for convention, distance in COUPLINGS:
            choice = {"convention": convention, "distance": distance, **WEIGHING}
            found = DGKD(dkd=DKD(**AT), **choice).terms(*batch)
            expected = {"tckd": losses.tckd(*batch, **AT), "nckd": losses.nckd(*batch, **AT)}
            pairs.append((found, expected | {"coupling": losses.coupling_of_gradients(*gradients, **choice)}))
        return pairs

    for found, expected in both(*batch):
        assert_close(found, expected)


@pytest.mark.slow
def test_terms_of_dgkd_with_respect_to_parameters():
    """Of a linear network; the parity batch has no say there, since a batch has one gradient."""
    batch = random_batch(6, 5)
    inputs = np.random.default_rng(1).standard_normal((6, 4))

    @compiled
    def both(*batch):
        of_means = [
            (inputs.T @ gradient(*batch, **AT) / 6).ravel()[None]
            for gradient in (losses.tckd_gradient, losses.nckd_gradient)
        ]
        pairs = []
        for convention, distance in COUPLINGS:
            choice = {"convention": convention, "distance": distance}
            method = DGKD(dkd=DKD(**AT), wrt="params", **choice, **WEIGHING)
            terms = method.terms(*batch, pull_back=lambda cotangents: ({"kernel": inputs.T @ cotangents},))
            expected = losses.coupling_of_gradients(*of_means, **choice, kappa=WEIGHING["kappa"])
            pairs.append((terms, DKD(**AT).terms(*batch) | {"coupling": expected}))
        return pairs

    for found, expected in both(*batch):
        assert_close(found, expected)
