r"""TCKD, NCKD and the squared distance of their gradients in one pass over the logits, with a gradient in closed form.

At temperature 1, with the symbols of `losses`, per sample:

    d_j = t̂_j − (1+δ)·ŝ_j  (j ≠ y)            D = Σ_j d_j·ŝ_j            ψ = p·(1−p)
    G = ‖∇TCKD − ∇NCKD‖² = δ² + Σ_j d_j²
    ∂G/∂z_y = 2ψ·(δ − D)                       ∂G/∂z_j = 2ŝ_j·[ψ·(D − δ) + (1+δ)·(D − d_j)]

which follow from ∂δ/∂z_y = ψ, ∂δ/∂z_j = −ψ·ŝ_j and ∂ŝ_i/∂z_j = ŝ_i·(1[i=j] − ŝ_j). What autodiff would keep for each of
the three terms is recomputed from the two exponentials, so that only those and the result have a number per class.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax import decoupling


def terms(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""KL([q, 1−q] ‖ [p, 1−p]), KL(t̂ ‖ ŝ) and ‖∇TCKD − ∇NCKD‖² of every sample at temperature 1.

    For another temperature T: of the logits over T, times T², all three.

    Args:
        student_logits: float32 or float64 `[..., classes]`, two classes or more.
        teacher_logits: the same; no gradient flows into it.
        labels: integer `[...]`, each in [0, classes).

    Returns:
        Three arrays `[...]`; differentiable in `student_logits` in reverse mode, and their gradient in either mode.
    """
    dtype = jnp.promote_types(student_logits.dtype, teacher_logits.dtype)
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    return _terms(student_logits.astype(dtype), teacher_logits.astype(dtype), jnp.asarray(labels))


class _Rest(NamedTuple):
    """The softmax over the non-target classes, as exponentials and their sum: one number per class."""

    exponentials: jax.Array  # [..., classes], 1 at the highest, 0 at the target
    scale: jax.Array  # [...], one over their sum
    highest: jax.Array  # [...]
    log_sum: jax.Array  # [...]
    log_odds: jax.Array  # [...] u of the target, p = sigmoid(u)
    others: jax.Array  # [...], the share of all that have no more than half: 1 − max ŝ without the cancellation

    def probabilities(self) -> jax.Array:
        return self.exponentials * self.scale[..., None]


class _Residuals(NamedTuple):
    labels: jax.Array
    student: _Rest
    teacher: _Rest
    target_gap: jax.Array  # [...] δ
    along: jax.Array  # [...] D


@jax.custom_vjp
def _terms(student_logits, teacher_logits, labels):
    return _forward(student_logits, teacher_logits, labels)[0]


def _forward(student_logits, teacher_logits, labels):
    is_target = decoupling.target_mask(labels, student_logits)
    student, teacher = _rest(student_logits, is_target), _rest(teacher_logits, is_target)
    target_gap = decoupling.target_gap(student.log_odds, teacher.log_odds)
    log_ratio = _log_probabilities(teacher, teacher_logits) - _log_probabilities(student, student_logits)
    difference = _difference(student, teacher, target_gap)
    nontarget, squares, along = _row_sums(
        teacher.probabilities() * jnp.where(is_target, 0.0, log_ratio),
        difference * difference,
        difference * student.probabilities(),
    )
    target = _bernoulli_kl(teacher.log_odds, student.log_odds)
    residuals = _Residuals(labels, student, teacher, target_gap, along)
    return (target, nontarget, target_gap**2 + squares), residuals


def _backward(residuals: _Residuals, cotangents):
    of_target, of_nontarget, of_squares = cotangents
    _, student, teacher, target_gap, along = residuals
    is_target = decoupling.target_mask(residuals.labels, student.exponentials)
    variance = jax.nn.sigmoid(student.log_odds) * jax.nn.sigmoid(-student.log_odds)
    at_target = of_target * target_gap + 2 * of_squares * variance * (target_gap - along)
    slope = 2 * of_squares * (1 + target_gap)
    difference = _difference(student, teacher, target_gap)
    elsewhere = student.probabilities() * ((slope * along - at_target)[..., None] - slope[..., None] * difference)
    elsewhere += of_nontarget[..., None] * _nontarget_gap(student, teacher)
    return jnp.where(is_target, at_target[..., None], elsewhere), None, None


_terms.defvjp(_forward, _backward)


def _rest(logits: jax.Array, is_target: jax.Array) -> _Rest:
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(is_target, -jnp.inf, logits), axis=-1))
    # The target is replaced before the exponential: where it dominates, exp would overflow and its gradient be NaN.
    shifted = jnp.where(is_target, 0.0, logits - highest[..., None])
    exponentials = jnp.where(is_target, 0.0, jnp.exp(shifted))
    total = jnp.sum(exponentials, axis=-1)
    has_half = exponentials * (1 / total)[..., None] > 0.5
    log_sum = jnp.log(total)
    target = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    return _Rest(
        exponentials=exponentials,
        scale=1 / total,
        highest=highest,
        log_sum=log_sum,
        log_odds=(target - highest) - log_sum,
        others=jnp.sum(jnp.where(has_half, 0.0, exponentials), axis=-1) / total,
    )


def _log_probabilities(rest: _Rest, logits: jax.Array) -> jax.Array:
    """log ŝ; of no meaning at the target."""
    return (logits - rest.highest[..., None]) - rest.log_sum[..., None]


def _bernoulli_kl(log_odds: jax.Array, other_log_odds: jax.Array) -> jax.Array:
    signs = (1, -1)
    return sum(
        jax.nn.sigmoid(sign * log_odds)
        * (jax.nn.log_sigmoid(sign * log_odds) - jax.nn.log_sigmoid(sign * other_log_odds))
        for sign in signs
    )


def _nontarget_gap(student: _Rest, teacher: _Rest) -> jax.Array:
    """ŝ − t̂; for a class that has most of each, from what the others have, so that 1 − 1 does not cancel."""
    s, t = student.probabilities(), teacher.probabilities()
    # Well above the half that `others` goes by: a compiler that computes a share twice may round it differently.
    return jnp.where((s > 0.75) & (t > 0.75), (teacher.others - student.others)[..., None], s - t)


def _difference(student: _Rest, teacher: _Rest, target_gap: jax.Array) -> jax.Array:
    """d, 0 at the target."""
    return -(_nontarget_gap(student, teacher) + target_gap[..., None] * student.probabilities())


@jax.custom_jvp
def _row_sums(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The sums of several arrays `[..., classes]` over the classes: `[...]` each.

    In one reduction, since XLA on the CPU would write each summand of several to memory first. In two stages of about
    √classes each, since a sum of 131,072 numbers one after the other loses three digits of float32.
    """
    *_, classes = arrays[0].shape
    length = max(1, int(classes**0.5))
    whole = classes // length * length
    by_chunk = tuple(a[..., :whole].reshape(*a.shape[:-1], whole // length, length) for a in arrays)
    sums = _reduce(*_reduce(*by_chunk))
    if whole < classes:
        sums = tuple(map(jnp.add, sums, _reduce(*(a[..., whole:] for a in arrays))))
    return sums


@_row_sums.defjvp
def _row_sums_are_linear(arrays, tangents):
    return _row_sums(*arrays), tuple(jnp.sum(tangent, axis=-1) for tangent in tangents)


def _reduce(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    zeros = tuple(jnp.zeros((), a.dtype) for a in arrays)
    return jax.lax.reduce(arrays, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (arrays[0].ndim - 1,))
