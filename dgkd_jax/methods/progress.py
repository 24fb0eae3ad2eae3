"""The position of a step in the run, and loss weights that depend on it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Progress(NamedTuple):
    """The position of a step in the run.

    Attributes:
        step: int scalar, steps done.
        steps_per_epoch: whole batches in an epoch.
        total_steps: steps of the run.
    """

    step: jax.Array
    steps_per_epoch: int
    total_steps: int


# What "epoch" counts in `ramp`.
RAMP_FORMS = ("step", "epoch_from_0", "epoch_from_1")
SCHEDULES = ("constant", "linear", "cosine")


def ramp(progress: Progress, *, warmup_epochs: float, form: str) -> jax.Array:
    """min(epoch / warmup_epochs, 1), the factor on a distillation loss.

    Args:
        warmup_epochs: 0 or more; with 0 the factor is 1.
        form: how epochs count. `step`: fractions of an epoch. `epoch_from_0`: whole epochs from 0, so the first epoch
            has no distillation (the DGKD repository). `epoch_from_1`: whole epochs from 1 (mdistiller).
    """
    if warmup_epochs == 0:
        return jnp.ones(())
    # int32 / int would be float32 even in float64 runs.
    epoch = jnp.asarray(progress.step, float) / progress.steps_per_epoch
    if form != "step":
        epoch = jnp.floor(epoch) + (form == "epoch_from_1")
    return jnp.minimum(epoch / warmup_epochs, 1.0)


def scheduled(progress: Progress, *, start: float, end: float, schedule: str) -> jax.Array:
    """A weight: `constant`, or from `start` to `end` over the run by a `linear` or `cosine` schedule."""
    if schedule == "constant":
        return jnp.asarray(start)
    done = jnp.clip(jnp.asarray(progress.step, float) / progress.total_steps, 0.0, 1.0)
    if schedule == "cosine":
        done = 0.5 * (1.0 - jnp.cos(jnp.pi * done))
    return start + (end - start) * done
