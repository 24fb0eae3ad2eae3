r"""Peers of KD whose terms are not parts of one partition: NKD, WTTM, DIST and MLKD. Notation: `dgkd_jax.losses`."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax.losses import checks, divergences, softmax_pair

_GUARD = 1e-8  # DIST's; beside the product of two norms of probabilities


def nkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    gamma: float | jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Normalised distillation, −q·log p − γ·T²·Σ_{j≠y} t̂_j·log ŝ_j, with q and p at temperature 1.

    The second term is γ·(`nckd` + T²·entropy of t̂), so it is not 0 where student and teacher agree; its gradient is
    that of γ·`nckd`. Source: Yang et al., ICCV 2023, arXiv:2303.13005; code yzd-v/cls_KD.

    Args:
        student_logits, teacher_logits: as `tckd`.
        labels: integer `[...]`, each in [0, classes), or distributions, float `[..., classes]`: then the class with the
            largest weight is the target, as in the authors' code; of equal weights, the class of the lower index.
        temperature: T > 0, of the second term only.
        gamma: weight γ, a number or `[...]`.
        where: as `tckd`.

    Returns:
        `[...]`, nats and nats times T², at least float32.

    Raises:
        ValueError: as `tckd`.
    """
    inputs = checks.check_inputs(student_logits, teacher_logits, labels, where)
    checks.check_positive("temperature", temperature)
    z, v = inputs[:2]
    if inputs.has_soft_labels():
        is_target = jnp.argmax(inputs.labels, axis=-1, keepdims=True) == jnp.arange(z.shape[-1])
    else:
        is_target = inputs.is_target()
    q = jnp.sum(jnp.where(is_target, jax.nn.softmax(v), 0.0), axis=-1)
    log_p = jnp.sum(jnp.where(is_target, jax.nn.log_softmax(z), 0.0), axis=-1)
    of_target = -q * jnp.where(q > 0, log_p, 0.0)
    of_rest = divergences.nontarget(z, v, is_target, temperature) + temperature**2 * _entropy(
        v, ~is_target, temperature
    )
    return inputs.selected(of_target + gamma * of_rest)


def wttm(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    gamma: float,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Weighted transformed teacher matching, U·KL(softmax(γ·v) ‖ softmax(z)) with U = Σ_j softmax(v)_j^γ.

    Only the teacher has a temperature, 1/γ. U weighs an example by how smooth its teacher is: for γ < 1 it lies between
    1, of a certain teacher, and classes^(1−γ). Source: Zheng & Yang, ICLR 2024, arXiv:2402.11148; code zkxufo/TTM.

    Args:
        student_logits, teacher_logits: as `tckd`.
        gamma: γ > 0.
        where: as `tckd`.

    Returns:
        `[...]`, nats, at least float32.

    Raises:
        ValueError: as `tckd`, or γ ≤ 0.
    """
    inputs = checks.check_inputs(student_logits, teacher_logits, where=where)
    checks.check_positive("gamma", gamma)
    z, v = inputs[:2]
    highest = jnp.max(v, axis=-1, keepdims=True)
    # Relative to the top class, lest γ·v of logits far from 0 lose digits; an entirely absent row has no top class.
    v = v - jnp.where(jnp.isfinite(highest), highest, 0.0)
    weight = jnp.exp(jax.nn.logsumexp(gamma * v, axis=-1) - gamma * jax.nn.logsumexp(v, axis=-1))
    everything = jnp.ones(z.shape, bool)
    return inputs.selected(weight * divergences.within(z, gamma * v, everything, 1.0))


def dist(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float,
    beta: float | jax.Array,
    gamma: float | jax.Array,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""DIST, β·T²·(1 − mean_i ρ(P[i], Q[i])) + γ·T²·(1 − mean_j ρ(P[:, j], Q[:, j])) of the probabilities P, Q at T.

    ρ is Pearson's correlation, with 1e-8 beside the product of the norms that it is divided by; so a row or a column
    that is constant on one side has ρ = 0, as every column has in a batch of one. A column is a class over the whole
    batch: on several devices under jit, the global one. Source: Huang et al., NeurIPS 2022, arXiv:2205.10536; code
    hunto/image_classification_sota.

    Args:
        student_logits, teacher_logits: as `tckd`; all examples `[...]` are one batch.
        temperature: T > 0.
        beta: weight β of the rows, examples compared over the classes.
        gamma: weight γ of the columns, classes compared over the examples.
        where: as `tckd`; the means over the batch are those of the other examples. 0 if all are left out.

    Returns:
        Scalar, times T², at least float32.

    Raises:
        ValueError: as `tckd`.
    """
    inputs = checks.check_inputs(student_logits, teacher_logits, where=where)
    checks.check_positive("temperature", temperature)
    everything = jnp.ones(inputs.student_logits.shape, bool)
    pair = softmax_pair.compare(*inputs[:2], everything, temperature)
    rows = everything if inputs.where is None else jnp.broadcast_to(inputs.where[..., None], everything.shape)
    student, teacher, gap, counts = (
        array.reshape(-1, everything.shape[-1]) for array in (pair.student, pair.teacher, pair.gap, rows)
    )
    of_rows = inputs.mean(_decorrelation(student, teacher, gap, jnp.ones_like(counts), -1).reshape(rows.shape[:-1]))
    of_columns = jnp.mean(_decorrelation(student, teacher, gap, counts, 0))
    loss = temperature**2 * (beta * of_rows + gamma * of_columns)
    return loss if inputs.where is None else jnp.where(jnp.any(inputs.where), loss, 0.0)


def mlkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperatures: tuple[float, ...],
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    r"""The three levels of multi-level distillation for one view of a batch, each summed over the temperatures.

    With P, Q `[batch, classes]` the probabilities of student and teacher at T, batch B and C classes:

        instance = mean_i T²·KL(Q_i ‖ P_i)      batch = ‖P·Pᵀ − Q·Qᵀ‖² / B      class = ‖Pᵀ·P − Qᵀ·Q‖² / C

    Two views, weakly and strongly augmented, are two calls. Source: Jin et al., CVPR 2023; the levels as in
    logit-standardization-KD. That code multiplies means over the batch by the mean of its confidence masks, which
    selects no example, and takes the weak view in two of the strong view's temperatures. Neither is copied; a selection
    of confident examples is `where`.

    Args:
        student_logits, teacher_logits: as `tckd`; all examples `[...]` are one batch.
        temperatures: each > 0; the authors' are 4, 3, 5, 2 and 6.
        where: as `tckd`; an example that is left out is no part of any level, and B counts the others.

    Returns:
        `instance` in nats times T², `batch` and `class`: scalars, at least float32.

    Raises:
        ValueError: as `tckd`, or there is no temperature.
    """
    inputs = checks.check_inputs(student_logits, teacher_logits, where=where)
    if not temperatures:
        raise ValueError("temperatures must hold at least one")
    for temperature in temperatures:
        checks.check_positive("temperatures", temperature)
    levels = [_levels(inputs, temperature) for temperature in temperatures]
    return {name: sum(level[name] for level in levels) for name in levels[0]}


def _levels(inputs: checks.Inputs, temperature: float) -> dict[str, jax.Array]:
    z, v = inputs[:2]
    everything = jnp.ones(z.shape, bool)
    pair = softmax_pair.compare(z, v, everything, temperature)
    kept = 1.0 if inputs.where is None else inputs.where[..., None]
    p, q, gap = ((kept * array).reshape(-1, z.shape[-1]) for array in (pair.student, pair.teacher, pair.gap))
    # P·Pᵀ − Q·Qᵀ from P − Q, so that it keeps its digits where they are close.
    of_batch, of_classes = gap @ p.T + q @ gap.T, gap.T @ p + q.T @ gap
    return {
        "instance": inputs.mean(divergences.within(z, v, everything, temperature)),
        "batch": jnp.sum(of_batch**2) / inputs.count(),
        "class": jnp.sum(of_classes**2) / z.shape[-1],
    }


class _Pair(NamedTuple):
    """Two vectors along an axis, less their means where they count; 0 where they do not."""

    a: jax.Array
    of_a: jax.Array  # |a|; 1 where one of the two is constant
    of_b: jax.Array
    turned: jax.Array  # a/|a| − b/|b|
    vary: jax.Array  # whether neither is constant


def _centred(a: jax.Array, b: jax.Array, apart: jax.Array, counts: jax.Array, axis: int) -> _Pair:
    r"""a and b, with the difference of their directions from a − b as `apart`, so that it keeps its digits.

    It is (a − b − (|a| − |b|)·b/|b|) / |a| where a is the longer one, and |a| − |b| = (a − b)·(a + b) / (|a| + |b|).
    """
    number = jnp.maximum(jnp.sum(counts, axis=axis, keepdims=True), 1)

    def centred(x):
        mean = jnp.sum(jnp.where(counts, x, 0.0), axis=axis, keepdims=True) / number
        return jnp.where(counts, x - mean, 0.0)

    a, b, apart = centred(a), centred(b), centred(apart)
    of_a, of_b = (jnp.expand_dims(_length(x, axis), axis) for x in (a, b))
    vary = (of_a > 0) & (of_b > 0)
    of_a, of_b = (jnp.where(vary, length, 1.0) for length in (of_a, of_b))
    longer = jnp.sum(apart * (a + b), axis=axis, keepdims=True) / (of_a + of_b)
    of_shorter = jnp.where(of_a > of_b, b / of_b, a / of_a)
    return _Pair(a, of_a, of_b, (apart - longer * of_shorter) / jnp.maximum(of_a, of_b), vary)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _decorrelation(a: jax.Array, b: jax.Array, apart: jax.Array, counts: jax.Array, axis: int) -> jax.Array:
    r"""1 − ρ(a, b) along an axis, from a − b as `apart`; 1 where one of the two is constant.

    1 − ρ = (|a|·|b|·|w|²/2 + 1e-8) / (|a|·|b| + 1e-8), with a and b centred and w the difference of their directions.
    Differentiable in a: that `apart` moves with it is in the derivative, and b is a constant.
    """
    pair = _centred(a, b, apart, counts, axis)
    product = jnp.where(pair.vary, pair.of_a * pair.of_b, 0.0)
    each = (0.5 * product * jnp.sum(pair.turned**2, axis=axis, keepdims=True) + _GUARD) / (product + _GUARD)
    return jnp.squeeze(each, axis)


@_decorrelation.defjvp
def _decorrelation_derivative(axis, primals, tangents):
    """By −∂ρ/∂a = |b|·(ρ·a/|a| − b/|b|) / (|a|·|b| + 1e-8) = |b|·(w − (1 − ρ)·a/|a|) / (|a|·|b| + 1e-8)."""
    each = _decorrelation(*primals, axis)
    a, of_a, of_b, turned, vary = _centred(*primals, axis)
    slope = (turned - jnp.expand_dims(each, axis) * a / of_a) * (of_b / (of_a * of_b + _GUARD))
    return each, jnp.sum(jnp.where(vary, slope, 0.0) * tangents[0], axis=axis)


def _length(x: jax.Array, axis: int) -> jax.Array:
    """|x|, with a gradient of 0 at 0."""
    square = jnp.sum(x**2, axis=axis)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _entropy(logits: jax.Array, inside: jax.Array, temperature) -> jax.Array:
    """Of the softmax over the selected classes, nats, `[...]`; 0 if there are none."""
    there = inside & (logits != -jnp.inf)
    highest = jnp.max(jnp.where(there, logits, -jnp.inf), axis=-1, keepdims=True)
    below = jnp.where(there, logits - jnp.where(highest == -jnp.inf, 0.0, highest), -jnp.inf) / temperature
    total = jnp.sum(jnp.exp(below), axis=-1)
    mean = jnp.sum(jnp.where(there, jnp.exp(below) * below, 0.0), axis=-1) / jnp.where(total > 0, total, 1.0)
    return jnp.log(jnp.where(total > 0, total, 1.0)) - mean
