r"""TCKD, NCKD and the squared distance of their gradients in one pass over the logits, with a closed-form gradient.

At temperature 1, with the symbols of `losses`, per sample:

    d_j = t̂_j − (1+δ)·ŝ_j  (j ≠ y)            D = Σ_j d_j·ŝ_j            ψ = p·(1−p)
    G = ‖∇TCKD − ∇NCKD‖² = δ² + Σ_j d_j²
    ∂G/∂z_y = 2ψ·(δ − D)                       ∂G/∂z_j = 2ŝ_j·[ψ·(D − δ) + (1+δ)·(D − d_j)]

These follow from ∂δ/∂z_y = ψ, ∂δ/∂z_j = −ψ·ŝ_j and ∂ŝ_i/∂z_j = ŝ_i·(1[i=j] − ŝ_j). The backward pass recomputes
everything from the two arrays of exponentials, so only these and the gradient have one number per class.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax.losses import target_split


def terms(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""KL([q, 1−q] ‖ [p, 1−p]), KL(t̂ ‖ ŝ) and ‖∇TCKD − ∇NCKD‖² of every sample at temperature 1.

    For another temperature T pass logits/T and multiply all three results by T².

    Args:
        student_logits: float32 or float64 `[..., classes]`, two classes or more.
        teacher_logits: same shape and dtype; no gradient flows into it.
        labels: integer `[...]`, each in [0, classes).

    Returns:
        Three arrays `[...]`; reverse-mode differentiable in `student_logits`; that gradient again in either mode.
    """
    dtype = jnp.promote_types(student_logits.dtype, teacher_logits.dtype)
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    return _terms(student_logits.astype(dtype), teacher_logits.astype(dtype), jnp.asarray(labels))


class _Rest(NamedTuple):
    """The softmax over the non-target classes, as exponentials (one number per class) and their sum."""

    exponentials: jax.Array  # [..., classes], 1 at the highest, 0 at the target
    scale: jax.Array  # [...], one over their sum
    highest: jax.Array  # [...]
    log_sum: jax.Array  # [...]
    log_odds: jax.Array  # [...] u of the target, p = sigmoid(u)
    others: jax.Array  # [...], sum of all shares that are at most 1/2: 1 − max ŝ without cancellation

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
    is_target = target_split.target_mask(labels, student_logits)
    student, teacher = _rest(student_logits, is_target), _rest(teacher_logits, is_target)
    target_gap = target_split.target_gap(student.log_odds, teacher.log_odds)
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
    is_target = target_split.target_mask(residuals.labels, student.exponentials)
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
    """log ŝ; meaningless at the target."""
    return (logits - rest.highest[..., None]) - rest.log_sum[..., None]


def _bernoulli_kl(log_odds: jax.Array, other_log_odds: jax.Array) -> jax.Array:
    signs = (1, -1)
    return sum(
        jax.nn.sigmoid(sign * log_odds)
        * (jax.nn.log_sigmoid(sign * log_odds) - jax.nn.log_sigmoid(sign * other_log_odds))
        for sign in signs
    )


def _nontarget_gap(student: _Rest, teacher: _Rest) -> jax.Array:
    """ŝ − t̂; for a class with most of both masses, computed from the other classes so that 1 − 1 does not cancel."""
    s, t = student.probabilities(), teacher.probabilities()
    # 0.75, well above the 1/2 of `others`: the compiler may compute a share twice and round it differently.
    return jnp.where((s > 0.75) & (t > 0.75), (teacher.others - student.others)[..., None], s - t)


def _difference(student: _Rest, teacher: _Rest, target_gap: jax.Array) -> jax.Array:
    """d of the module docstring; 0 at the target."""
    return -(_nontarget_gap(student, teacher) + target_gap[..., None] * student.probabilities())


@jax.custom_jvp
def _row_sums(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The sums of several arrays `[..., classes]` over the classes: `[...]` each.

    One reduction for all: XLA's CPU backend would write the summands of several to memory first. Two stages of about
    √classes each: adding 131,072 float32 numbers one after the other loses three digits.
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
