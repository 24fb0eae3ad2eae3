r"""Losses under labels that are distributions w: the expectation Σ_k w_k·L_k, where L_k calls class k the target.

All classes in O(C). Four classes go through the loss of an integer label: the two with the largest weights, so that a
one-hot or a two-hot label (mixup, CutMix) is exact, and the top classes of teacher and student. Every other class k has
p_k, q_k ≤ 1/2, and its L_k follows from one comparison of the softmaxes P, Q over all classes (s_j: the summands of
KL(Q ‖ P), E_k = e^x − 1 − x with x = log[(1−p_k)/(1−q_k)], g = P − Q):

    TCKD_k = s_k + (1−q_k)·E_k              NCKD_k = (KL(Q ‖ P) − s_k) / (1−q_k) − E_k
    G_k = g_k² + a²·Σg² + 2ac·ΣgQ + c²·ΣQ²,    a = (1+ι·g_k)/(1−p_k),    c = g_k·[1+ι·(1−q_k)] / [(1−p_k)(1−q_k)]

with the sums over j ≠ k and ι of `fused`, at temperature 1. No term divides by less than 1/2.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dgkd_jax.losses import divergences, fused, softmax_pair


def expected_tckd(student_logits: jax.Array, teacher_logits: jax.Array, weights: jax.Array, temperature) -> jax.Array:
    """Σ_k w_k·TCKD_k, `[...]`, of logits and weights `[..., classes]`."""

    def of_target(is_target):
        return (divergences.target(student_logits, teacher_logits, is_target, temperature),)

    return _expected(student_logits, teacher_logits, weights, temperature, of_target, _tckd_of_others)[0]


def expected_nckd(student_logits: jax.Array, teacher_logits: jax.Array, weights: jax.Array, temperature) -> jax.Array:
    """Σ_k w_k·NCKD_k, likewise."""

    def of_target(is_target):
        return (divergences.nontarget(student_logits, teacher_logits, is_target, temperature),)

    return _expected(student_logits, teacher_logits, weights, temperature, of_target, _nckd_of_others)[0]


def expected_terms(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    weights: jax.Array,
    temperature: float,
    own_coordinates: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The expectations of TCKD, NCKD and ‖∇TCKD − ∇NCKD‖², the three results of `fused.terms`."""

    def of_target(is_target):
        return fused.terms(student_logits, teacher_logits, is_target, temperature, own_coordinates)

    def of_others(pair):
        return *_tckd_of_others(pair), *_nckd_of_others(pair), _squares_of_others(pair, own_coordinates)

    return _expected(student_logits, teacher_logits, weights, temperature, of_target, of_others)


_OfOthers = Callable[["_Others"], tuple[jax.Array, ...]]


class _Others:
    """The softmaxes P, Q over all classes where neither is above 1/2; elsewhere P, Q and g read as 0."""

    def __init__(self, pair: softmax_pair.SoftmaxPair, is_other: jax.Array):
        self.p, self.q = (jnp.where(is_other, share, 0.0) for share in (pair.student, pair.teacher))
        self.gap, self.summands = (jnp.where(is_other, each, 0.0) for each in (pair.gap, pair.summands))
        log_ratio = jnp.log1p(-self.gap / (1 - self.q))
        self.excess = softmax_pair.excess(log_ratio, jnp.ones_like(self.q), (1 - self.p) / (1 - self.q))
        self.kl, self.gaps, self.cross, self.squares = (
            total[..., None]
            for total in softmax_pair.row_sums(pair.summands, pair.gap**2, pair.gap * pair.teacher, pair.teacher**2)
        )


def _tckd_of_others(of: _Others) -> tuple[jax.Array, ...]:
    return (of.summands + (1 - of.q) * of.excess,)


def _nckd_of_others(of: _Others) -> tuple[jax.Array, ...]:
    return ((of.kl - of.summands) / (1 - of.q) - of.excess,)


def _squares_of_others(of: _Others, own_coordinates: bool) -> jax.Array:
    interaction = 0.0 if own_coordinates else 1.0
    a = (1 + interaction * of.gap) / (1 - of.p)
    c = of.gap * (1 + interaction * (1 - of.q)) / ((1 - of.p) * (1 - of.q))
    gaps, cross, squares = of.gaps - of.gap**2, of.cross - of.gap * of.q, of.squares - of.q**2
    return of.gap**2 + a**2 * gaps + 2 * a * c * cross + c**2 * squares


def _expected(z, v, weights, temperature, of_target, of_others: _OfOthers) -> tuple[jax.Array, ...]:
    every_class = jnp.arange(z.shape[-1])
    first = jnp.argmax(weights, axis=-1, keepdims=True)
    second = jnp.argmax(jnp.where(every_class == first, -1.0, weights), axis=-1, keepdims=True)
    tops = (jnp.argmax(jax.lax.stop_gradient(logits), axis=-1, keepdims=True) for logits in (v, z))
    exactly = [every_class == index for index in (first, second, *tops)]
    remaining = weights
    total: tuple[jax.Array, ...] = ()
    for is_target in exactly:
        weight = jnp.sum(jnp.where(is_target, remaining, 0.0), axis=-1)
        remaining = jnp.where(is_target, 0.0, remaining)  # so that a class which comes twice counts once
        # Without weight a loss may be infinite, and must not become 0·inf.
        found = tuple(jnp.where(weight > 0, weight * each, 0.0) for each in of_target(is_target))
        total = tuple(map(jnp.add, total, found)) if total else found
    pair = softmax_pair.compare(z, v, jnp.ones(z.shape, bool), temperature)
    others = of_others(_Others(pair, ~functools.reduce(jnp.logical_or, exactly)))
    rest = (jnp.sum(jnp.where(remaining > 0, remaining * each, 0.0), axis=-1) for each in others)
    return tuple(a + temperature**2 * b for a, b in zip(total, rest, strict=True))
