"""Labels that are distributions: the losses are the expectation over the class that is called the target."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.batches import compiled, random_batch

from dgkd_jax import losses

AT = {"temperature": 2.0}


def terms(student, teacher, labels):
    found = losses.dgkd_terms(student, teacher, labels, convention="per_sample", **AT)
    own = losses.gradient_coupling(student, teacher, labels, convention="per_sample", wrt="own_logits", **AT)
    return {
        "ce": losses.cross_entropy(student, labels),
        "tckd": losses.tckd(student, teacher, labels, **AT),
        "nckd": losses.nckd(student, teacher, labels, **AT),
        "fused tckd": found.tckd,
        "fused nckd": found.nckd,
        "coupling": found.coupling,
        "coupling, own logits": own,
    }


@compiled
def with_gradients(student, teacher, labels):
    """Of samples one by one, so that the coupling is each sample's own."""

    def of_one(z, v, y):
        one = (z[None], v[None], y[None])
        return terms(*one), jax.jacrev(lambda z: terms(z[None], *one[1:]))(z)

    return jax.tree.map(lambda a: a.reshape(len(student), -1), jax.vmap(of_one)(student, teacher, labels))


def expectation(student, teacher, weights):
    """Σ_k w_k·L_k by calling every class the target in turn."""
    total = None
    for k in range(weights.shape[-1]):
        found = with_gradients(student, teacher, np.full(len(student), k))
        part = jax.tree.map(lambda a, k=k: weights[:, k, None] * a, found)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


def kinds_of_labels(rows, classes):
    rng = np.random.default_rng(2)
    one, two = rng.permuted(np.tile(np.arange(classes), (rows, 1)), axis=1)[:, :2].T
    share = rng.uniform(size=(rows, 1))
    hot = np.eye(classes)
    return {
        "two-hot": share * hot[one] + (1 - share) * hot[two],
        "smoothed": 0.9 * hot[one] + 0.1 / classes,
        "mixed and smoothed": 0.9 * (share * hot[one] + (1 - share) * hot[two]) + 0.1 / classes,
        "random": rng.dirichlet(np.ones(classes), rows),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds_of_labels(1, 2))
@pytest.mark.parametrize(("classes", "scale"), [(2, 2.0), (6, 0.01), (6, 2.0), (6, 30.0)])
def test_values_and_gradients_are_the_expectation_over_the_label(kind, classes, scale):
    with jax.enable_x64(True):
        student, teacher, _ = random_batch(8, classes, scale=scale)
        weights = kinds_of_labels(8, classes)[kind]
        ours = with_gradients(student, teacher, weights)
        expected = expectation(student, teacher, weights)
        for what, tolerance in ((0, 1e-12), (1, 1e-10)):
            for name, value in ours[what].items():
                size = np.abs(expected[what][name]).max()
                np.testing.assert_allclose(
                    value, expected[what][name], rtol=tolerance, atol=tolerance * size, err_msg=name
                )


@pytest.mark.slow
def test_a_one_hot_label_gives_the_numbers_of_its_class_bit_for_bit():
    """Values and gradients, in float32 with logits of all sizes; where another class is absent too."""
    for scale in (0.1, 3.0, 100.0):
        student, teacher, labels = random_batch(16, 6, scale=scale, dtype="float32")
        student[:, 5] = -np.inf
        teacher[:, 5] = -np.inf
        labels = labels % 5
        one_hot = np.eye(6, dtype=np.float32)[labels]
        for loss in (losses.tckd, losses.nckd):
            hard, soft = (
                jax.vjp(partial(loss, teacher_logits=teacher, labels=y, **AT), student) for y in (labels, one_hot)
            )
            np.testing.assert_array_equal(hard[0], soft[0])
            np.testing.assert_array_equal(*(pull(np.ones(16, np.float32))[0] for _, pull in (hard, soft)))
        np.testing.assert_array_equal(*(losses.cross_entropy(student, y) for y in (labels, one_hot)))
        options = {"convention": "per_sample", **AT}
        np.testing.assert_array_equal(
            *(losses.gradient_coupling(student, teacher, y, **options) for y in (labels, one_hot))
        )


@pytest.mark.slow
def test_the_order_of_two_mixed_images_does_not_matter_and_the_loss_is_linear_in_the_share():
    with jax.enable_x64(True):
        student, teacher, first = random_batch(8, 6)
        second = (first + 2) % 6
        hot = np.eye(6)

        def at(share, a=first, b=second):
            return losses.dkd(student, teacher, share * hot[a] + (1 - share) * hot[b], alpha=1.0, beta=8.0, **AT)

        np.testing.assert_allclose(at(0.3), at(0.7, second, first), rtol=1e-13)
        np.testing.assert_allclose(at(0.25), 0.25 * at(1.0) + 0.75 * at(0.0), rtol=1e-13)


def test_metrics_of_a_mixed_label_take_the_class_with_the_larger_weight():
    student, teacher, labels = random_batch(4, 5, dtype="float32")
    mixed = 0.7 * np.eye(5, dtype=np.float32)[labels] + 0.3 * np.eye(5, dtype=np.float32)[(labels + 1) % 5]
    for name, value in losses.compare(student, teacher, mixed, **AT).items():
        np.testing.assert_array_equal(value, losses.compare(student, teacher, labels, **AT)[name], err_msg=name)


def test_a_row_that_is_no_distribution_gives_nan_under_jit():
    student, teacher, labels = random_batch(3, 4, dtype="float32")
    weights = np.eye(4, dtype=np.float32)[labels]
    weights[1] *= 0.5
    found = jax.jit(lambda w: losses.tckd(student, teacher, w, **AT))(weights)
    np.testing.assert_array_equal(np.isnan(found), [False, True, False])
