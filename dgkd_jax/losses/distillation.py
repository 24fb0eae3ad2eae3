r"""The per-sample losses: cross-entropy, KD, TCKD, NCKD, DKD and logit matching. Notation: `dgkd_jax.losses`."""

import jax
import jax.numpy as jnp

from dgkd_jax.losses import checks, divergences, soft_labels


def cross_entropy(
    student_logits: jax.Array,
    labels: jax.Array,
    *,
    label_smoothing: float = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Cross-entropy at temperature 1, with the target distribution (1−s)·w + s/C; w = e_y for a class index y.

    Args:
        student_logits: float `[..., classes]`. −inf: the class is absent, and C does not count it.
        labels: integer `[...]`, each in [0, classes), or distributions w, float `[..., classes]`.
        label_smoothing: s in [0, 1) (Szegedy et al., arXiv:1512.00567, section 7).
        where: as `tckd`.

    Returns:
        `[...]`, nats, at least float32; +inf for a label that is absent.

    Raises:
        ValueError: as `tckd`, or `label_smoothing` is not in [0, 1).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    inputs = checks.check_inputs(student_logits, labels=labels, where=where)
    log_probabilities = jax.nn.log_softmax(inputs.student_logits)
    if inputs.has_soft_labels():
        has_weight = inputs.labels > 0  # 0·log 0 = 0
        nll = -jnp.sum(inputs.labels * jnp.where(has_weight, log_probabilities, 0.0), axis=-1)
    else:
        nll = -jnp.sum(jnp.where(inputs.is_target(), log_probabilities, 0.0), axis=-1)
    if label_smoothing > 0.0:
        there = inputs.student_logits != -jnp.inf
        mean = jnp.sum(jnp.where(there, log_probabilities, 0.0), axis=-1) / jnp.sum(there, axis=-1)
        nll = (1.0 - label_smoothing) * nll - label_smoothing * mean
    return inputs.selected(nll)


def kd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Distillation, T²·KL(softmax(v/T) ‖ softmax(z/T)) (Hinton et al., arXiv:1503.02531, section 2).

    Equal to `TCKD + (1−q)·NCKD` for whichever class is called the target (arXiv:2203.08679, equation 5).

    Args, Returns: as `tckd`, without labels.

    Raises:
        ValueError: shapes do not match, fewer than two classes, or T ≤ 0.
    """
    inputs = checks.check_inputs(student_logits, teacher_logits, where=where)
    checks.check_positive("temperature", temperature)
    everything = jnp.ones(inputs.student_logits.shape, bool)
    return inputs.selected(divergences.within(*inputs[:2], everything, temperature))


def tckd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Target-class distillation, T²·KL([q, 1−q] ‖ [p, 1−p]) (arXiv:2203.08679, equation 6).

    Args:
        student_logits: float `[..., classes]`.
        teacher_logits: float `[..., classes]`; no gradient flows into it. −inf here: the teacher gives the class no
            probability. −inf on both sides: the class is absent; an absent target adds 0. −inf for the student alone:
            the loss is +inf.
        labels: integer `[...]`, each in [0, classes): the target class; or distributions w over the classes, float
            `[..., classes]`: then the result is the expectation Σ_k w_k·TCKD_k over the class k that is called target.
        temperature: T > 0.
        where: bool `[...]`; False leaves an example out: its loss and its gradients are 0, whatever its logits are.

    Returns:
        `[...]`, nats times T², at least float32. To full relative precision also where student and teacher are close.
        NaN for a label that is out of range but unknown until the program runs.

    Raises:
        ValueError: shapes do not match, fewer than two classes, wrong types, T ≤ 0; of arrays with known values
            (outside jit): a label out of range, no distribution, or absent on both sides.
    """
    batch = student_logits, teacher_logits, labels, where
    return _of_labels(divergences.target, soft_labels.expected_tckd, batch, temperature)


def nckd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Non-target-class distillation, T²·KL(t̂ ‖ ŝ) (arXiv:2203.08679, equation 6). Zero for two classes.

    Args, Returns, Raises: as `tckd`.
    """
    batch = student_logits, teacher_logits, labels, where
    return _of_labels(divergences.nontarget, soft_labels.expected_nckd, batch, temperature)


def _of_labels(of_class, of_distribution, batch: tuple, temperature: float) -> jax.Array:
    inputs = checks.check_inputs(*batch)
    checks.check_positive("temperature", temperature)
    if inputs.has_soft_labels():
        return inputs.selected(of_distribution(*inputs[:3], temperature))
    return inputs.selected(of_class(*inputs[:2], inputs.is_target(), temperature))


def dkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Decoupled distillation, α·TCKD + β·NCKD (arXiv:2203.08679, equation 7).

    Args:
        alpha: weight α of TCKD.
        beta: weight β of NCKD.
        (others): as `tckd`.

    Returns, Raises: as `tckd`.
    """
    target = tckd(student_logits, teacher_logits, labels, temperature=temperature, where=where)
    nontarget = nckd(student_logits, teacher_logits, labels, temperature=temperature, where=where)
    return alpha * target + beta * nontarget


def logit_mse(student_logits: jax.Array, teacher_logits: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    r"""Squared-error logit matching, mean_j (z_j − v_j)² (Ba & Caruana, arXiv:1312.6184, equation 1, over C).

    This is not what the DGKD repository calls "logit matching"; that is α·CE + β·`kd`.

    Args:
        student_logits: float `[..., classes]`.
        teacher_logits: float `[..., classes]`; no gradient flows into it. A class that is −inf on both sides is absent:
            the mean is over the others.
        where: as `tckd`.

    Returns:
        `[...]`, squared logits, at least float32.

    Raises:
        ValueError: shapes do not match or fewer than two classes.
    """
    inputs = checks.check_inputs(student_logits, teacher_logits, where=where)
    z, v = inputs[:2]
    # −inf less −inf is no number; a class that one side alone lacks makes the loss infinite, whatever it is divided by.
    squares = jnp.where(z == v, 0.0, z - v) ** 2
    present = jnp.sum(v != -jnp.inf, axis=-1, dtype=z.dtype)
    return inputs.selected(jnp.sum(squares, axis=-1) / jnp.maximum(present, 1))
