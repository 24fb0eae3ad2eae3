r"""Splits the logits of student and teacher: the target against the rest, and the rest among themselves.

Symbols as in `losses`; u_s and u_t are the log-odds of the target, so that p = sigmoid(u_s) and q = sigmoid(u_t).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax.losses import softmax_pair
from dgkd_jax.losses.softmax_pair import Odds, SoftmaxPair


class Split(NamedTuple):
    """Both sides' logits at temperature T, split at the target."""

    is_target: jax.Array  # [..., classes] bool
    odds: Odds  # of the target against the rest
    rest: SoftmaxPair  # over the non-target classes


def split(student_logits: jax.Array, teacher_logits: jax.Array, is_target: jax.Array, temperature) -> Split:
    """Split logits at the target.

    Args:
        student_logits, teacher_logits: `[..., classes]` of one dtype, float32 or float64.
        is_target: bool `[..., classes]`, true at one class of each sample.
        temperature: T > 0.
    """
    rest = softmax_pair.compare(student_logits, teacher_logits, ~is_target, temperature)
    of_target = (jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) for logits in (student_logits, teacher_logits))
    return Split(is_target, softmax_pair.odds(softmax_pair.mass_of_one(*of_target), rest.mass, temperature), rest)


def target_mask(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Bool `[..., classes]`, true at the labels."""
    return jnp.asarray(labels)[..., None] == jnp.arange(logits.shape[-1])


def target_divergence(of: Split) -> jax.Array:
    """KL([q, 1−q] ‖ [p, 1−p]), `[...]`."""
    return softmax_pair.binary_divergence(of.odds)


def nontarget_divergence(of: Split) -> jax.Array:
    """KL(t̂ ‖ ŝ), `[...]`."""
    return softmax_pair.row_sums(of.rest.summands)[0]


def target_gap(of: Split) -> jax.Array:
    """δ = p − q, `[...]`."""
    return softmax_pair.probability_gap(of.odds)


def tckd_gradient(of: Split) -> jax.Array:
    """δ·(e_y − ŝ), `[..., classes]`: ∇TCKD at temperature 1; times T at temperature T."""
    return target_gap(of)[..., None] * (of.is_target - of.rest.student)


def nckd_gradient(of: Split) -> jax.Array:
    """ŝ − t̂, `[..., classes]`: ∇NCKD at temperature 1; times T at temperature T."""
    return of.rest.gap
