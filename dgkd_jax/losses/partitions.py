r"""Losses of a partition: some classes against the rest, and the shapes within the two sets.

DKD, GDKD and the two targets of a mixed image are three choices of one set. RLD is built from the same two pieces.
"""

import jax
import jax.numpy as jnp

from dgkd_jax.losses import checks, divergences

Weight = float | jax.Array


def partition(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    mask: jax.Array,
    *,
    masses: Weight,
    inside: Weight,
    outside: Weight,
    temperature: float,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""T²·[masses·KL(masses) + inside·KL(within the set) + outside·KL(within the rest)] for a set S of classes.

    KL(masses) compares the two numbers [Σ_S, 1 − Σ_S] of each softmax; the other two compare the softmaxes over the set
    alone and over the rest alone. They are not multiplied by the masses, so that

    - `kd` has the weights 1, Q and 1 − Q, with Q the teacher's probability of the set;
    - `dkd` has the target for its set and the weights α, any, β;
    - `gdkd` has the teacher's k largest for its set;
    - S = `labels > 0` of two-hot labels is the target set {y₁, y₂} of a mixed image.

    Args:
        student_logits, teacher_logits: as `tckd`.
        mask: bool `[..., classes]`, true at the classes of S.
        masses, inside, outside: weights, numbers or `[...]`.
        temperature: T > 0.
        where: as `tckd`.

    Returns:
        `[...]`, nats times T², at least float32.

    Raises:
        ValueError: as `tckd`, or `mask` is not bool of the logits' shape.
    """
    inputs = checks.check_inputs(student_logits, teacher_logits, where=where)
    checks.check_positive("temperature", temperature)
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_ or mask.shape != inputs.student_logits.shape:
        raise ValueError(
            f"mask must be booleans of the logits' shape {inputs.student_logits.shape}, got {mask.dtype} {mask.shape}"
        )
    return inputs.selected(_partition(*inputs[:2], mask, (masses, inside, outside), temperature))


def gdkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    k: int,
    w0: Weight,
    w1: Weight,
    w2: Weight,
    temperature: float,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Generalised DKD: `partition` at the teacher's k largest logits, w0·masses + w1·inside + w2·outside.

    Of equal logits the class of the lower index comes first. Source: GDKD (arXiv:2512.04625); code ZaberKo/GDKD.

    Args:
        student_logits, teacher_logits: as `tckd`.
        k: size of the set, 1 ≤ k < classes.
        w0, w1, w2: weights, numbers or `[...]`.
        temperature: T > 0.
        where: as `tckd`.

    Returns:
        `[...]`, nats times T², at least float32.

    Raises:
        ValueError: as `tckd`, or k is out of range.
    """
    inputs = checks.check_inputs(student_logits, teacher_logits, where=where)
    checks.check_positive("temperature", temperature)
    classes = inputs.student_logits.shape[-1]
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k < classes:
        raise ValueError(f"k must be a whole number in [1, {classes}), fewer than the classes, got {k!r}")
    _, top = jax.lax.top_k(inputs.teacher_logits, k)
    mask = jnp.any(top[..., None] == jnp.arange(classes), axis=-2)
    return inputs.selected(_partition(*inputs[:2], mask, (w0, w1, w2), temperature))


def rld(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: Weight,
    beta: Weight,
    temperature: float,
    alpha_temperature: float,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Refined logit distillation, which takes nothing from the teacher where the teacher is wrong about the target.

    α·τ²·KL([m, 1−m] ‖ [p, 1−p]) + β·T²·KL(t̃ ‖ s̃): m is the teacher's highest probability, whichever class has it, and
    p the student's of the target, both at τ; t̃, s̃ are the softmaxes at T over the classes that the teacher ranks below
    the target, {j : v_j < v_y}. Where there is none, the second term is 0. Source: RLD (ICCV 2025, arXiv:2408.07703).

    Args:
        student_logits, teacher_logits: as `tckd`.
        labels: integer `[...]`, each in [0, classes).
        alpha, beta: weights, numbers or `[...]`.
        temperature: T > 0.
        alpha_temperature: τ > 0.
        where: as `tckd`.

    Returns:
        `[...]`, nats times τ² and T², at least float32.

    Raises:
        ValueError: as `tckd`, or the labels are distributions, for which RLD has no definition.
    """
    inputs = checks.check_inputs(student_logits, teacher_logits, labels, where)
    checks.check_positive("temperature", temperature)
    checks.check_positive("alpha_temperature", alpha_temperature)
    if inputs.has_soft_labels():
        raise ValueError(
            f"labels must be class indices {student_logits.shape[:-1]}: RLD ranks classes against one target"
        )
    z, v = inputs[:2]
    is_target = inputs.is_target()
    of_target = jnp.sum(jnp.where(is_target, v, 0.0), axis=-1, keepdims=True)
    is_top = jnp.argmax(v, axis=-1, keepdims=True) == jnp.arange(v.shape[-1])
    # The teacher's target and top class change places, so that m is its probability of the target.
    confident = jnp.where(is_top, of_target, v)
    confident = jnp.where(is_target, jnp.max(v, axis=-1, keepdims=True), confident)
    confidence = divergences.target(z, confident, is_target, alpha_temperature)
    ranked_below = divergences.within(z, v, v < of_target, temperature)
    return inputs.selected(alpha * confidence + beta * ranked_below)


def _partition(z, v, mask, weights: tuple[Weight, Weight, Weight], temperature) -> jax.Array:
    masses, inside, outside = weights
    return (
        masses * divergences.masses(z, v, mask, temperature)
        + inside * divergences.within(z, v, mask, temperature)
        + outside * divergences.within(z, v, ~mask, temperature)
    )
