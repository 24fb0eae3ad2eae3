"""The optimizer and the learning-rate schedule of a config."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from dgkd_jax.training.decoupled_momentum import deepkd, dot


def make_optimizer(optimizer: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of the config section `optimizer`.

    `sgd` is PyTorch's: g ← g + λ·w;  m ← μ·m + g;  w ← w − η·m (with Nesterov, w ← w − η·(g + μ·m)). `adamw` decays
    the weights separately from the gradient, as PyTorch's does. Clipping comes first. `dot`, `deepkd` and
    `deepkd_released` take named gradients and do not clip: see `decoupled_momentum`.
    """
    decayed = _kernels if optimizer.decay_on == "kernels" else None
    if optimizer.name == "dot":
        return dot(
            learning_rate,
            momentum_task=optimizer.momentum - optimizer.momentum_delta,
            momentum_kd=optimizer.momentum + optimizer.momentum_delta,
            weight_decay=optimizer.weight_decay,
            mask=decayed,
        )
    if optimizer.name in ("deepkd", "deepkd_released"):
        return deepkd(
            learning_rate,
            momentum_task=optimizer.momentum_task,
            momentum_tckd=optimizer.momentum_tckd,
            momentum_nckd=optimizer.momentum_nckd,
            weight_decay=optimizer.weight_decay,
            form="paper" if optimizer.name == "deepkd" else "released",
            mask=decayed,
        )
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
    """True for kernels, False for biases and normalisation scales: those have one dimension."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def learning_rate_schedule(
    schedule: ConfigDict, *, peak: float, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """Learning rate as a function of the number of steps done.

    In `warmup_epochs` it rises linearly, (step+1)/warm-up steps. Then `step` multiplies it by `factor` at a milestone
    (in epochs from the start of training, as PyTorch's MultiStepLR); `cosine` brings it to 0 at the end.
    """
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    decay = _decay(schedule, warmup_steps=warmup_steps, steps_per_epoch=steps_per_epoch, total_steps=total_steps)

    def rate(step):
        step = jnp.asarray(step, float)  # int32 / int would be float32 even in float64 runs
        warmup = jnp.minimum((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
        return peak * warmup * decay(step)

    return rate


def _decay(schedule: ConfigDict, *, warmup_steps: int, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    """The factor on the peak rate after the warm-up; it starts at 1."""
    if schedule.name == "step":
        factors: dict[int, float] = {}
        for epoch in schedule.milestones:
            step = round(epoch * steps_per_epoch)
            factors[step] = factors.get(step, 1.0) * schedule.factor  # two milestones may round to the same step
        return optax.piecewise_constant_schedule(1.0, factors)
    if schedule.name == "cosine":
        cosine = optax.cosine_decay_schedule(1.0, decay_steps=1)
        after_warmup = max(total_steps - warmup_steps, 1)
        # The decay starts after the warm-up: before that its argument would be negative and the factor above 1.
        return lambda step: cosine(jnp.maximum((step - warmup_steps) / after_warmup, 0.0))
    return optax.constant_schedule(1.0)
