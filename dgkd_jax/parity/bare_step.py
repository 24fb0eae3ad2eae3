"""A run's training step without its configuration and data: from a network, a method and an optimizer."""

import functools
from collections.abc import Callable

import optax

from dgkd_jax.methods import Method
from dgkd_jax.models.network import Network
from dgkd_jax.training import state
from dgkd_jax.training.step import Batch, Teacher, metric_names, train_step

Step = Callable[[state.TrainState, Teacher | None, Batch], state.TrainState]


def bare_step(
    student: Network, *, method: Method, optimizer: optax.GradientTransformation
) -> tuple[Step, state.TrainState]:
    """The step, to be compiled, and the state that it begins with. An epoch has one step, so a warm-up counts steps.

    Args:
        student: with the variables that training begins with.
        method: what is minimised.
        optimizer: as from `make_optimizer`.
    """
    step = functools.partial(
        train_step,
        student=student.with_variables(None),
        method=method,
        optimizer=optimizer,
        steps_per_epoch=1,
        total_steps=1,
    )
    return step, state.create(student.variables, optimizer, ema=False, metric_names=metric_names(method))
