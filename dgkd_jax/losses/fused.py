r"""TCKD, NCKD and the squared distance of their gradients in one pass over the logits, with a closed-form gradient.

At temperature 1, with the symbols of `losses`, per sample; ι = 1, or 0 if each gradient counts in its own coordinates
only (∇TCKD at the target, ∇NCKD elsewhere):

    d_j = −(ŝ_j − t̂_j) − ιδ·ŝ_j  (j ≠ y)            D = Σ_j d_j·ŝ_j            ψ = p·(1−p)
    G = ‖∇TCKD − ∇NCKD‖² = δ² + Σ_j d_j²
    ∂G/∂z_y = 2ψ·(δ − ιD)                      ∂G/∂z_j = 2ŝ_j·[ψ·(ιD − δ) + (1+ιδ)·(D − d_j)]

These follow from ∂δ/∂z_y = ψ, ∂δ/∂z_j = −ψ·ŝ_j and ∂ŝ_i/∂z_j = ŝ_i·(1[i=j] − ŝ_j). Between the passes only ŝ,
ŝ − t̂ and d are kept: the backward pass has no exponential.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax.losses import softmax_pair, target_split


class _Residuals(NamedTuple):
    is_target: jax.Array
    student: jax.Array  # [..., classes] ŝ
    gap: jax.Array  # [..., classes] ŝ − t̂
    difference: jax.Array  # [..., classes] d
    target_gap: jax.Array  # [...] δ
    variance: jax.Array  # [...] ψ
    along: jax.Array  # [...] D


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def terms(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    is_target: jax.Array,
    temperature: float,
    own_coordinates: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""TCKD, NCKD and ‖∇TCKD − ∇NCKD‖² of every sample.

    Args:
        student_logits: float32 or float64 `[..., classes]`, two classes or more.
        teacher_logits: same shape and dtype; no gradient flows into it.
        is_target: bool `[..., classes]`, true at one class of each sample.
        temperature: T > 0, a number known when the program is built.
        own_coordinates: in the distance, ∇TCKD counts at the target only and ∇NCKD elsewhere only.

    Returns:
        Three arrays `[...]`; reverse-mode differentiable in `student_logits`; that gradient again in either mode.
    """
    return _forward(student_logits, teacher_logits, is_target, temperature, own_coordinates)[0]


def _forward(student_logits, teacher_logits, is_target, temperature, own_coordinates):
    split = target_split.split(student_logits, jax.lax.stop_gradient(teacher_logits), is_target, temperature)
    target_gap, student = target_split.target_gap(split), split.rest.student
    # Computed once: rounded differently in D and in d_j, D − d_j would not vanish where one class has all probability.
    beside = split.rest.gap if own_coordinates else split.rest.gap + target_gap[..., None] * student
    difference = jax.lax.optimization_barrier(-beside)
    nontarget, squares, along = softmax_pair.row_sums(
        split.rest.summands, difference * difference, difference * student
    )
    variance = jax.nn.sigmoid(split.odds.student) * jax.nn.sigmoid(-split.odds.student)
    found = target_split.target_divergence(split), nontarget, target_gap**2 + squares
    residuals = _Residuals(is_target, student, split.rest.gap, difference, target_gap, variance, along)
    return tuple(temperature**2 * each for each in found), residuals


def _backward(temperature, own_coordinates, residuals: _Residuals, cotangents):
    of_target, of_nontarget, of_squares = (temperature * each for each in cotangents)
    is_target, student, gap, difference, target_gap, variance, along = residuals
    interaction = 0.0 if own_coordinates else 1.0
    at_target = of_target * target_gap + 2 * of_squares * variance * (target_gap - interaction * along)
    slope = (2 * of_squares * (1 + interaction * target_gap))[..., None]
    elsewhere = student * (slope * (along[..., None] - difference) - at_target[..., None])
    elsewhere += of_nontarget[..., None] * gap
    return jnp.where(is_target, at_target[..., None], elsewhere), None, None


terms.defvjp(_forward, _backward)
