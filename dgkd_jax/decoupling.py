r"""Where every loss starts: logits, checked, split into the target against the rest and the rest among themselves.

Symbols as in `losses`. The split is computed once per side from log-odds and log-probabilities, so that nothing
cancels or overflows where a probability rounds to 0 or 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Split(NamedTuple):
    """Logits at temperature T, split into the target against the rest and the rest among themselves."""

    target_mask: jax.Array  # [..., classes] bool
    log_odds: jax.Array  # [...] u, with p = sigmoid(u)
    log_nontarget: jax.Array  # [..., classes] log ŝ; 0 at the target
    nontarget: jax.Array  # [..., classes] ŝ; 0 at the target


def split(logits: jax.Array, is_target: jax.Array, temperature: float) -> Split:
    scaled = logits / temperature
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(is_target, -jnp.inf, scaled), axis=-1, keepdims=True))
    # The target is replaced before the exponential, not after: where it dominates, exp would overflow and its
    # gradient, inf times the mask's 0, would be NaN.
    shifted = jnp.where(is_target, 0.0, scaled - highest)
    log_sum = jnp.log(jnp.sum(jnp.where(is_target, 0.0, jnp.exp(shifted)), axis=-1, keepdims=True))
    log_nontarget = jnp.where(is_target, 0.0, shifted - log_sum)
    target = jnp.sum(jnp.where(is_target, scaled, 0.0), axis=-1, keepdims=True)
    return Split(
        target_mask=is_target,
        log_odds=((target - highest) - log_sum)[..., 0],
        log_nontarget=log_nontarget,
        nontarget=jnp.where(is_target, 0.0, jnp.exp(log_nontarget)),
    )


def split_pair(student_logits, teacher_logits, labels, temperature) -> tuple[Split, Split]:
    student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
    check_labels(labels, student_logits.shape)
    check_positive("temperature", temperature)
    is_target = target_mask(labels, student_logits)
    return split(student_logits, is_target, temperature), split(teacher_logits, is_target, temperature)


def target_mask(labels: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.asarray(labels)[..., None] == jnp.arange(logits.shape[-1])


def target_gap(student_log_odds: jax.Array, teacher_log_odds: jax.Array) -> jax.Array:
    """δ = p − q, between the small tails where both are near 1, so that it does not cancel."""
    return jnp.where(
        student_log_odds + teacher_log_odds > 0,
        jax.nn.sigmoid(-teacher_log_odds) - jax.nn.sigmoid(-student_log_odds),
        jax.nn.sigmoid(student_log_odds) - jax.nn.sigmoid(teacher_log_odds),
    )


def nontarget_gap(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """ŝ − t̂; for a class that has most of both, minus the sum of the others, so that 1 − 1 does not cancel."""
    gap = student - teacher
    has_most = student + teacher > 1  # one class at the most, since all of them sum to 2
    others = jnp.sum(jnp.where(has_most, 0.0, gap), axis=-1, keepdims=True)
    return jnp.where(has_most, -others, gap)


# ------------------------------------------------------------------------------------------------------------
# Checks: each message names the argument and what was expected
# ------------------------------------------------------------------------------------------------------------


def promote(logits: jax.Array, name: str) -> jax.Array:
    logits = jnp.asarray(logits)
    if jnp.issubdtype(logits.dtype, jnp.complexfloating) or logits.dtype == jnp.bool_:
        raise ValueError(f"{name} must be real numbers, got {logits.dtype}")
    if logits.ndim < 1:
        raise ValueError(f"{name} must have shape [..., classes], got a scalar")
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def check_logits(student_logits, teacher_logits) -> tuple[jax.Array, jax.Array]:
    student_logits = promote(student_logits, "student_logits")
    teacher_logits = promote(jax.lax.stop_gradient(teacher_logits), "teacher_logits")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, {student_logits.shape}, got {teacher_logits.shape}"
        )
    check_classes(student_logits)
    return student_logits, teacher_logits


def check_classes(student_logits: jax.Array) -> None:
    if student_logits.shape[-1] < 2:
        raise ValueError(f"student_logits must have at least two classes, got shape {student_logits.shape}")


def check_labels(labels, logits_shape: tuple[int, ...]) -> None:
    if not hasattr(labels, "dtype"):
        labels = np.asarray(labels)
    if labels.shape == logits_shape:
        raise ValueError(
            f"labels must be class indices of shape {logits_shape[:-1]}, got shape {labels.shape}: "
            "soft labels have no single target class to split off"
        )
    if labels.shape != logits_shape[:-1]:
        raise ValueError(f"labels must have shape {logits_shape[:-1]}, the logits' without classes, got {labels.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if isinstance(labels, jax.core.Tracer) or labels.size == 0:
        return
    with jax.ensure_compile_time_eval():  # inside jit, even of an array that is known
        lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= logits_shape[-1]:
        raise ValueError(f"labels must lie in [0, {logits_shape[-1]}), got values from {lowest} to {highest}")


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, jax.core.Tracer) and not 0.0 < float(value) < float("inf"):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
