"""The terms of each method are the losses, with every setting of the method."""

import itertools

import jax
import numpy as np
import pytest
from losses.batches import compiled, random_batch

from dgkd_jax import losses
from dgkd_jax.methods import DGKD, DKD, KD, LogitMSE

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
