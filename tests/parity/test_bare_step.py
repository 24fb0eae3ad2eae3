"""The step that comparisons train with: an epoch is a step, and what a run's step takes besides can be set."""

import functools

import jax
import numpy as np
import optax
import pytest
from scipy import special

from dgkd_jax.methods import CE, DKD
from dgkd_jax.models.network import Network
from dgkd_jax.parity.bare_step import bare_step

rng = np.random.default_rng(0)
BATCH = {"image": rng.standard_normal((6, 2, 2, 1)).astype(np.float32), "label": np.array([0, 1, 2, 0, 1, 2], np.int32)}
STUDENT, TEACHER = rng.standard_normal((2, 4, 3)).astype(np.float32)


def linear(kernel):
    def apply(variables, images, *, train=False, mutable=()):
        logits = images.reshape(len(images), -1) @ variables["params"]["kernel"]
        return (logits, {}) if train else logits

    return Network(apply, {"params": {"kernel": kernel}}, (), ())


def means_of_steps(count, method, **settings):
    """Metrics of each step of a student that learns nothing."""
    step, current = bare_step(linear(STUDENT), method=method, optimizer=optax.sgd(0.0))
    step = jax.jit(functools.partial(step, **settings))
    empty, found = current.totals, []
    for _ in range(count):
        current = step(current.replace(totals=empty), linear(TEACHER), BATCH)
        found.append({name: float(total) / float(number) for name, (total, number) in current.totals.items()})
    return found


@pytest.mark.slow
def test_a_warmup_counts_steps():
    first, second, third, fourth = means_of_steps(4, DKD(alpha=2.0, beta=3.0, warmup_epochs=2.0))
    whole = 2 * first["tckd"] + 3 * first["nckd"]
    assert whole > 0.1
    for found, ramp in ((first, 0.0), (second, 0.5), (third, 1.0), (fourth, 1.0)):
        assert found["loss"] == pytest.approx(found["ce"] + ramp * whole, rel=1e-5)  # float32


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_the_cross_entropy_of_a_step_is_that_of_smoothed_labels(label_smoothing):
    (found,) = means_of_steps(1, CE(), label_smoothing=label_smoothing)
    log_probabilities = special.log_softmax(BATCH["image"].reshape(6, 4) @ STUDENT, axis=-1)
    target = (1 - label_smoothing) * np.eye(3)[BATCH["label"]] + label_smoothing / 3
    expected = -np.mean(np.sum(target * log_probabilities, axis=-1))
    assert found["loss"] == found["ce"] == pytest.approx(expected, rel=1e-5)  # float32
