"""What a run carries from step to step, its optimizer, and the schedules over steps."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dgkd_jax.metrics import Totals


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds; a run is a pure function of it and of the step's batch.

    Attributes:
        step: int32 scalar, the number of steps done.
        params: the student's parameters, float32.
        batch_stats: the student's BatchNorm statistics, float32; {} for a model without.
        opt_state: optax's state.
        ema: exponential moving average of {"params", "batch_stats"}, or None.
        totals: sums of the training metrics since they were last logged.
        epoch_totals: the same since the epoch began.
        skipped: int32 scalar, steps so far that changed nothing because their loss or gradient was not finite.
        skipped_in_a_row: int32 scalar, how many of them were the last ones.
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
        """The variables that are being trained, as `model.apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def evaluated(self) -> dict[str, Any]:
        """The variables that are evaluated and handed out: the average where there is one."""
        return self.variables if self.ema is None else self.ema


def create(
    variables: dict[str, Any], optimizer: optax.GradientTransformation, *, ema: bool, metric_names: tuple[str, ...]
) -> TrainState:
    """The state at step 0.

    Args:
        variables: {"params", "batch_stats"}, float32 arrays.
        optimizer: as from `make_optimizer`.
        ema: whether to carry an average of the variables.
        metric_names: what the step will report (`steps.metric_names`).
    """
    params, batch_stats = variables["params"], variables.get("batch_stats", {})

    def empty() -> Totals:
        # Integers for what is counted (accuracy), floats for what is averaged.
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


def make_optimizer(optimizer: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of config section `optimizer`.

    `sgd` is PyTorch's rule: g ← g + λ·w;  m ← μ·m + g;  w ← w − η·m (with Nesterov, w ← w − η·(g + μ·m)). `adamw`
    decays the weights apart from the gradient, as PyTorch's does. Gradients are clipped before anything else.
    """
    decayed = _kernels if optimizer.decay_on == "kernels" else None
    clip = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm > 0 else []
    if optimizer.name == "adamw":
        return optax.chain(*clip, optax.adamw(learning_rate, weight_decay=optimizer.weight_decay, mask=decayed))
    return optax.chain(
        *clip,
        optax.add_decayed_weights(optimizer.weight_decay, mask=decayed),
        optax.trace(decay=optimizer.momentum, nesterov=optimizer.nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def _kernels(params: Any) -> Any:
    """True for what multiplies inputs: neither biases nor the scales of normalisation, which have one dimension."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def learning_rate_schedule(
    schedule: ConfigDict, *, peak: float, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """Learning rate as a function of the number of steps done.

    `warmup_epochs` raise it linearly, (step+1)/warm-up steps; then `step` multiplies it by `factor` once each milestone
    (in epochs from the start of training, as PyTorch's MultiStepLR) is reached, `cosine` brings it to 0 at the end.
    """
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    milestones = jnp.asarray([round(epoch * steps_per_epoch) for epoch in schedule.milestones], jnp.int32)

    def rate(step):
        step = jnp.asarray(step, float)  # an int32 divided by an integer would be float32 even in float64 runs
        warmup = jnp.minimum((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
        decay = 1.0
        if schedule.name == "step":
            decay = schedule.factor ** jnp.sum(step >= milestones)
        elif schedule.name == "cosine":
            done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
        return peak * warmup * decay

    return rate


def distillation_ramp(*, warmup_epochs: float, form: str, steps_per_epoch: int) -> optax.Schedule:
    """The factor min(epoch / warmup_epochs, 1) on the distillation loss, as a function of the number of steps done.

    `form` says what "epoch" is: `step` counts fractions of epochs; `epoch_from_0` whole epochs from 0, so that the
    first has no distillation at all (the DGKD repository); `epoch_from_1` whole epochs from 1 (mdistiller).
    """

    def ramp(step):
        if warmup_epochs == 0:
            return jnp.ones(())
        epoch = jnp.asarray(step, float) / steps_per_epoch
        if form != "step":
            epoch = jnp.floor(epoch) + (form == "epoch_from_1")
        return jnp.minimum(epoch / warmup_epochs, 1.0)

    return ramp


def epsilon_schedule(*, start: float, end: float, name: str, total_steps: int) -> optax.Schedule:
    """ε as a function of the number of steps done: `constant`, or `linear` or `cosine` from `start` to `end`."""

    def epsilon(step):
        if name == "constant":
            return jnp.asarray(start)
        done = jnp.clip(jnp.asarray(step, float) / total_steps, 0.0, 1.0)
        if name == "cosine":
            done = 0.5 * (1.0 - jnp.cos(jnp.pi * done))
        return start + (end - start) * done

    return epsilon
