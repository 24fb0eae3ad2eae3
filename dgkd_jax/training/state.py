"""The state that training carries from step to step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dgkd_jax.evaluate.metrics import Totals


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds. The next state is a pure function of it and the step's batch.

    Attributes:
        step: int32 scalar, the number of steps done.
        params: the student's parameters, float32.
        batch_stats: the student's BatchNorm statistics, float32; {} for a model without.
        opt_state: optax's state.
        ema: exponential moving average of {"params", "batch_stats"}, or None.
        totals: sums of the training metrics since the last log line.
        epoch_totals: sums of the training metrics since the epoch began.
        skipped: int32 scalar, steps skipped so far because their loss or gradient was not finite.
        skipped_in_a_row: int32 scalar, skipped steps since the last one that was not skipped.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    totals: Totals
    epoch_totals: Totals
    skipped: jax.Array
    skipped_in_a_row: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """The variables being trained, in the form that `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def evaluated(self) -> dict[str, Any]:
        """The variables to evaluate and export: the average if there is one, else those being trained."""
        return self.variables if self.ema is None else self.ema


def create(
    variables: dict[str, Any], optimizer: optax.GradientTransformation, *, ema: bool, metric_names: tuple[str, ...]
) -> TrainState:
    """The state at step 0.

    Args:
        variables: {"params", "batch_stats"}, float32 arrays.
        optimizer: from `make_optimizer`.
        ema: keep an exponential moving average of the variables.
        metric_names: the metrics that the step reports (`step.metric_names`).
    """
    params, batch_stats = variables["params"], variables.get("batch_stats", {})

    def empty() -> Totals:
        # int32 where counts are summed (accuracy), float where values are averaged.
        return {
            name: (jnp.zeros((), jnp.int32 if name == "accuracy" else float), jnp.zeros((), jnp.int32))
            for name in metric_names
        }

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.array, {"params": params, "batch_stats": batch_stats}) if ema else None,
        totals=empty(),
        epoch_totals=empty(),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )
