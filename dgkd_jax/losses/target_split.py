r"""Checks the logits and splits them: target against the rest, and the rest among themselves. All losses start here.

Symbols as in `losses`. Each side is split once, as log-odds and log-probabilities, so that nothing cancels or
overflows where a probability rounds to 0 or 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax.losses import checks


class Split(NamedTuple):
    """Logits at temperature T, split: target against the rest, and the rest among themselves."""

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


class SplitPair(NamedTuple):
    """Student's and teacher's logits `[..., classes]`, checked and promoted, each with its split at the targets."""

    student_logits: jax.Array
    teacher_logits: jax.Array
    student: Split
    teacher: Split


def split_pair(student_logits, teacher_logits, labels, temperature) -> SplitPair:
    student_logits, teacher_logits = checks.check_logits(student_logits, teacher_logits)
    checks.check_labels(labels, student_logits.shape)
    checks.check_positive("temperature", temperature)
    is_target = target_mask(labels, student_logits)
    return SplitPair(
        student_logits,
        teacher_logits,
        split(student_logits, is_target, temperature),
        split(teacher_logits, is_target, temperature),
    )


def target_mask(labels: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.asarray(labels)[..., None] == jnp.arange(logits.shape[-1])


def target_gap(student_log_odds: jax.Array, teacher_log_odds: jax.Array) -> jax.Array:
    """δ = p − q. Where both are near 1 it is the difference of the small 1 − q and 1 − p, so it does not cancel."""
    return jnp.where(
        student_log_odds + teacher_log_odds > 0,
        jax.nn.sigmoid(-teacher_log_odds) - jax.nn.sigmoid(-student_log_odds),
        jax.nn.sigmoid(student_log_odds) - jax.nn.sigmoid(teacher_log_odds),
    )


def nontarget_gap(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """ŝ − t̂; for a class with most of both masses, minus the sum of the others, so that 1 − 1 does not cancel."""
    gap = student - teacher
    has_most = student + teacher > 1  # at most one class, since all of them sum to 2
    others = jnp.sum(jnp.where(has_most, 0.0, gap), axis=-1, keepdims=True)
    return jnp.where(has_most, -others, gap)
