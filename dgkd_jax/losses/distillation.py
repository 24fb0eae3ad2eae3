r"""The per-sample losses: cross-entropy, KD, TCKD, NCKD, DKD and logit matching. Notation: `dgkd_jax.losses`."""

import jax
import jax.numpy as jnp
import optax

from dgkd_jax.losses import checks, target_split


def cross_entropy(student_logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    r"""Cross-entropy at temperature 1, with the target distribution (1−s)·e_y + s/C.

    Args:
        student_logits: float `[..., classes]`.
        labels: integer `[...]`, each in [0, classes).
        label_smoothing: s in [0, 1) (Szegedy et al., arXiv:1512.00567, section 7).

    Returns:
        `[...]`, nats, at least float32.

    Raises:
        ValueError: shapes do not match, fewer than two classes, labels not integers or out of range (checked
            outside jit only), or `label_smoothing` is not in [0, 1).
    """
    student_logits = checks.promote(student_logits, "student_logits")
    checks.check_classes(student_logits)
    checks.check_labels(labels, student_logits.shape)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    log_probabilities = jax.nn.log_softmax(student_logits)
    nll = -jnp.sum(jnp.where(target_split.target_mask(labels, student_logits), log_probabilities, 0.0), axis=-1)
    if label_smoothing == 0.0:
        return nll
    return (1.0 - label_smoothing) * nll - label_smoothing * jnp.mean(log_probabilities, axis=-1)


def kd(student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float) -> jax.Array:
    r"""Distillation, T²·KL(softmax(v/T) ‖ softmax(z/T)) (Hinton et al., arXiv:1503.02531, section 2).

    Equal to `TCKD + (1−q)·NCKD` for whichever class is called the target (arXiv:2203.08679, equation 5).

    Args:
        student_logits: float `[..., classes]`.
        teacher_logits: float `[..., classes]`; no gradient flows into it.
        temperature: T > 0.

    Returns:
        `[...]`, nats times T², at least float32.

    Raises:
        ValueError: shapes do not match, fewer than two classes, or T ≤ 0.
    """
    student_logits, teacher_logits = checks.check_logits(student_logits, teacher_logits)
    checks.check_positive("temperature", temperature)
    log_student = jax.nn.log_softmax(student_logits / temperature)
    log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)


def tckd(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *, temperature: float) -> jax.Array:
    r"""Target-class distillation, T²·KL([q, 1−q] ‖ [p, 1−p]) (arXiv:2203.08679, equation 6).

    Computed from the target's log-odds u = z_y/T − logsumexp of the non-targets, with p = sigmoid(u), so that
    nothing cancels or overflows where p rounds to 0 or 1.

    Args:
        student_logits: float `[..., classes]`.
        teacher_logits: float `[..., classes]`; no gradient flows into it.
        labels: integer `[...]`, each in [0, classes): the target class.
        temperature: T > 0.

    Returns:
        `[...]`, nats times T², at least float32.

    Raises:
        ValueError: shapes do not match, fewer than two classes, labels not integers or out of range (checked
            outside jit only), or T ≤ 0.
    """
    return temperature**2 * _target_divergence(
        target_split.split_pair(student_logits, teacher_logits, labels, temperature)
    )


def nckd(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *, temperature: float) -> jax.Array:
    r"""Non-target-class distillation, T²·KL(t̂ ‖ ŝ) (arXiv:2203.08679, equation 6). Zero for two classes.

    Args, Returns, Raises: as `tckd`.
    """
    return temperature**2 * _nontarget_divergence(
        target_split.split_pair(student_logits, teacher_logits, labels, temperature)
    )


def terms_of(pair: target_split.SplitPair, temperature: float) -> tuple[jax.Array, jax.Array]:
    """(`tckd`, `nckd`) of logits that were already split at this temperature."""
    return temperature**2 * _target_divergence(pair), temperature**2 * _nontarget_divergence(pair)


def dkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> jax.Array:
    r"""Decoupled distillation, α·TCKD + β·NCKD (arXiv:2203.08679, equation 7).

    Args:
        alpha: weight α of TCKD.
        beta: weight β of NCKD.
        (others): as `tckd`.

    Returns, Raises: as `tckd`.
    """
    target = tckd(student_logits, teacher_logits, labels, temperature=temperature)
    nontarget = nckd(student_logits, teacher_logits, labels, temperature=temperature)
    return alpha * target + beta * nontarget


def logit_mse(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    r"""Squared-error logit matching, mean_j (z_j − v_j)² (Ba & Caruana, arXiv:1312.6184, equation 1, over C).

    This is not what the DGKD repository calls "logit matching"; that is α·CE + β·`kd`.

    Args:
        student_logits: float `[..., classes]`.
        teacher_logits: float `[..., classes]`; no gradient flows into it.

    Returns:
        `[...]`, squared logits, at least float32.

    Raises:
        ValueError: shapes do not match or fewer than two classes.
    """
    student_logits, teacher_logits = checks.check_logits(student_logits, teacher_logits)
    return jnp.mean((student_logits - teacher_logits) ** 2, axis=-1)


def _target_divergence(pair: target_split.SplitPair) -> jax.Array:
    student, teacher = pair.student.log_odds, pair.teacher.log_odds
    log_q, log_not_q = jax.nn.log_sigmoid(teacher), jax.nn.log_sigmoid(-teacher)
    log_p, log_not_p = jax.nn.log_sigmoid(student), jax.nn.log_sigmoid(-student)
    q, not_q = jax.nn.sigmoid(teacher), jax.nn.sigmoid(-teacher)
    return q * (log_q - log_p) + not_q * (log_not_q - log_not_p)


def _nontarget_divergence(pair: target_split.SplitPair) -> jax.Array:
    return jnp.sum(pair.teacher.nontarget * (pair.teacher.log_nontarget - pair.student.log_nontarget), axis=-1)
