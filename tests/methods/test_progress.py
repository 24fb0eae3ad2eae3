"""Weights that follow the run, against their closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgkd_jax.methods import DGKD, DKD
from dgkd_jax.methods.progress import RAMP_FORMS, SCHEDULES, Progress, ramp, scheduled


def after(step, *, steps_per_epoch=4, total_steps=100) -> Progress:
    return Progress(jnp.asarray(step, jnp.int32), steps_per_epoch, total_steps)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("step", [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1]),
        ("epoch_from_0", [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1]),
        ("epoch_from_1", [0.5, 0.5, 0.5, 0.5, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_ramp_has_the_three_published_forms(form, expected):
    np.testing.assert_array_equal(
        [ramp(after(step), warmup_epochs=2.0, form=form) for step in range(len(expected))], expected
    )


@pytest.mark.parametrize("form", RAMP_FORMS)
def test_without_warmup_distillation_is_complete_from_the_first_step(form):
    assert ramp(after(0), warmup_epochs=0.0, form=form) == 1


@pytest.mark.parametrize("form", RAMP_FORMS)
def test_a_warmup_of_part_of_an_epoch_ends_within_it(form):
    expected = {"step": [0, 0.5, 1, 1], "epoch_from_0": [0, 0, 0, 0, 1], "epoch_from_1": [1, 1, 1, 1]}[form]
    np.testing.assert_array_equal(
        [ramp(after(step), warmup_epochs=0.5, form=form) for step in range(len(expected))], expected
    )


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [6, 6, 6]), ("linear", [6, 2, -2]), ("cosine", [6, 2, -2])]
)
def test_a_scheduled_weight_moves_from_start_to_end(schedule, expected):
    found = [scheduled(after(step), start=6.0, end=-2.0, schedule=schedule) for step in (0, 50, 100)]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_cosine_and_linear_differ_between_their_common_points():
    linear, cosine = (
        scheduled(after(1, total_steps=4), start=1.0, end=0.0, schedule=name) for name in ("linear", "cosine")
    )
    np.testing.assert_allclose([linear, cosine], [0.75, 0.5 + 0.25 * np.sqrt(2)], rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_scheduled_weight_stays_at_its_end(schedule):
    last, beyond = (scheduled(after(step), start=0.3, end=-0.2, schedule=schedule) for step in (100, 130))
    assert last == beyond


@pytest.mark.parametrize("form", RAMP_FORMS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_of_dgkd_follows_ramp_and_epsilon_as_written(form, schedule):
    """ce_weight·CE + ramp·(α·TCKD + β·NCKD − ε·G) at every step of a run, ramp and ε in plain Python, float64."""
    steps_per_epoch, epochs, warmup = 3, 5, 2.5
    method = DGKD(
        dkd=DKD(ce_weight=0.7, alpha=1.5, beta=2.5, warmup_epochs=warmup, warmup_form=form),
        epsilon=0.4,
        epsilon_end=-0.2,
        epsilon_schedule=schedule,
    )
    total = steps_per_epoch * epochs
    with jax.enable_x64(True):
        terms = {
            name: jnp.asarray(value)
            for name, value in zip(("ce", "tckd", "nckd", "coupling"), (2.0, 3.0, 5.0, 7.0), strict=True)
        }
        for step in range(total + 1):
            epoch = {"step": step / steps_per_epoch, "epoch_from_0": step // steps_per_epoch}.get(
                form, step // steps_per_epoch + 1
            )
            done = {"linear": step / total, "cosine": (1 - np.cos(np.pi * step / total)) / 2}.get(schedule, 0)
            epsilon = 0.4 - 0.6 * done
            weight = min(epoch / warmup, 1)
            progress = after(step, steps_per_epoch=steps_per_epoch, total_steps=total)
            expected = 0.7 * 2 + weight * (1.5 * 3 + 2.5 * 5 - epsilon * 7)
            np.testing.assert_allclose(method.loss(terms, progress), expected, rtol=1e-12)
            # DKD is the same without the coupling.
            without = 0.7 * 2 + weight * (1.5 * 3 + 2.5 * 5)
            np.testing.assert_allclose(method.dkd.loss(terms, progress), without, rtol=1e-12)
            assert dataclasses.replace(method, epsilon=0.0, epsilon_end=0.0).loss(terms, progress) == pytest.approx(
                without, rel=1e-12
            )
