r"""Logit distillation losses: KD, DKD and DGKD, pure and exact.

Every per-sample loss takes logits `[..., classes]` and returns `[...]`, never reduced, in at least float32
(bfloat16 and float16 logits are promoted before anything is computed; float64 stays float64). The teacher's
logits are always under `stop_gradient`. Values and gradients are finite for margins up to ±1e4 at T = 1.

Notation: z the student's and v the teacher's logits, y the target (ground-truth) class, T the temperature and

    p, q     probability of the target at temperature T, student's and teacher's
    ŝ, t̂     softmax over the non-target classes at temperature T, student's and teacher's; 0 at the target
    δ        p − q
    e_y      one-hot of y

    TCKD_i  = T²·KL([q, 1−q] ‖ [p, 1−p])          ∇TCKD_i = T·δ·(e_y − ŝ)
    NCKD_i  = T²·KL(t̂ ‖ ŝ)                        ∇NCKD_i = T·(ŝ − t̂)
    DKD_i   = α·TCKD_i + β·NCKD_i
    DGKD    = mean_i DKD_i − ε·G,   where G grows with D_i = ∇TCKD_i − ∇NCKD_i in one of four conventions

Sources: Hinton et al., arXiv:1503.02531 (KD); Zhao et al., CVPR 2022, arXiv:2203.08679 (DKD, equations 5–7);
the DGKD blog post and PyTorch repository (the coupling).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax import decoupling, fused
from dgkd_jax.coupling import CONVENTIONS as CONVENTIONS
from dgkd_jax.coupling import DISTANCES as DISTANCES
from dgkd_jax.coupling import NORMALIZED_GUARD as NORMALIZED_GUARD
from dgkd_jax.coupling import Convention, Distance, check_options, cosine, coupling_of_gradients, of_mean_distance

GradientMethod = Literal["closed_form", "autodiff"]


# ------------------------------------------------------------------------------------------------------------
# Per-sample losses
# ------------------------------------------------------------------------------------------------------------


def cross_entropy(student_logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    r"""Cross-entropy at temperature 1, with the target distribution (1−s)·e_y + s/C.

    Args:
        student_logits: float `[..., classes]`.
        labels: integer `[...]`, each in [0, classes).
        label_smoothing: s in [0, 1) (Szegedy et al., arXiv:1512.00567, section 7).

    Returns:
        `[...]`, nats, at least float32.

    Raises:
        ValueError: shapes do not match, fewer than two classes, labels not integers or out of range (seen
            outside jit only), or `label_smoothing` is not in [0, 1).
    """
    student_logits = decoupling.promote(student_logits, "student_logits")
    decoupling.check_classes(student_logits)
    decoupling.check_labels(labels, student_logits.shape)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    log_probabilities = jax.nn.log_softmax(student_logits)
    nll = -jnp.sum(jnp.where(decoupling.target_mask(labels, student_logits), log_probabilities, 0.0), axis=-1)
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
    student_logits, teacher_logits = decoupling.check_logits(student_logits, teacher_logits)
    decoupling.check_positive("temperature", temperature)
    log_student = jax.nn.log_softmax(student_logits / temperature)
    log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)


def tckd(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *, temperature: float) -> jax.Array:
    r"""Target-class distillation, T²·KL([q, 1−q] ‖ [p, 1−p]) (arXiv:2203.08679, equation 6).

    Computed from the target's log-odds u = z_y/T − logsumexp over the non-targets, so p = sigmoid(u) and
    nothing cancels or overflows where p rounds to 0 or 1.

    Args:
        student_logits: float `[..., classes]`.
        teacher_logits: float `[..., classes]`; no gradient flows into it.
        labels: integer `[...]`, each in [0, classes): the target class.
        temperature: T > 0.

    Returns:
        `[...]`, nats times T², at least float32.

    Raises:
        ValueError: shapes do not match, fewer than two classes, labels not integers or out of range (seen
            outside jit only), or T ≤ 0.
    """
    student, teacher = decoupling.split_pair(student_logits, teacher_logits, labels, temperature)
    log_q, log_not_q = jax.nn.log_sigmoid(teacher.log_odds), jax.nn.log_sigmoid(-teacher.log_odds)
    log_p, log_not_p = jax.nn.log_sigmoid(student.log_odds), jax.nn.log_sigmoid(-student.log_odds)
    q, not_q = jax.nn.sigmoid(teacher.log_odds), jax.nn.sigmoid(-teacher.log_odds)
    return temperature**2 * (q * (log_q - log_p) + not_q * (log_not_q - log_not_p))


def nckd(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *, temperature: float) -> jax.Array:
    r"""Non-target-class distillation, T²·KL(t̂ ‖ ŝ) (arXiv:2203.08679, equation 6). Zero for two classes.

    Args, Returns, Raises: as `tckd`.
    """
    student, teacher = decoupling.split_pair(student_logits, teacher_logits, labels, temperature)
    divergence = teacher.nontarget * (teacher.log_nontarget - student.log_nontarget)
    return temperature**2 * jnp.sum(divergence, axis=-1)


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
    student_logits, teacher_logits = decoupling.check_logits(student_logits, teacher_logits)
    return jnp.mean((student_logits - teacher_logits) ** 2, axis=-1)


# ------------------------------------------------------------------------------------------------------------
# Per-sample gradients with respect to the student's logits
# ------------------------------------------------------------------------------------------------------------


def tckd_gradient(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    method: GradientMethod = "closed_form",
) -> jax.Array:
    r"""∇TCKD_i with respect to the student's logits, T·δ·(e_y − ŝ).

    Args:
        method: "closed_form" (differentiable, what trains) or "autodiff" (`jax.grad`, the definition).
        (others): as `tckd`.

    Returns:
        `[..., classes]`, at least float32. Each sample's own gradient, not divided by the batch size.

    Raises:
        ValueError: as `tckd`; unknown method.
    """
    if _use_autodiff(method):
        return _autodiff(tckd, student_logits, teacher_logits, labels, temperature)
    student, teacher = decoupling.split_pair(student_logits, teacher_logits, labels, temperature)
    gap = decoupling.target_gap(student.log_odds, teacher.log_odds)
    return temperature * gap[..., None] * (student.target_mask - student.nontarget)


def nckd_gradient(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    method: GradientMethod = "closed_form",
) -> jax.Array:
    r"""∇NCKD_i with respect to the student's logits, T·(ŝ − t̂); 0 at the target.

    Args, Returns, Raises: as `tckd_gradient`.
    """
    if _use_autodiff(method):
        return _autodiff(nckd, student_logits, teacher_logits, labels, temperature)
    student, teacher = decoupling.split_pair(student_logits, teacher_logits, labels, temperature)
    return temperature * decoupling.nontarget_gap(student.nontarget, teacher.nontarget)


# ------------------------------------------------------------------------------------------------------------
# The coupling of the two gradients, and DGKD
# ------------------------------------------------------------------------------------------------------------


class DgkdTerms(NamedTuple):
    """What DGKD adds up.

    Attributes:
        tckd, nckd: `[...]`, as `tckd` and `nckd`.
        coupling: scalar G, before the factor −ε.
    """

    tckd: jax.Array
    nckd: jax.Array
    coupling: jax.Array


def dgkd_terms(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    convention: Convention,
    distance: Distance = "mse",
    parity_batch: int | None = None,
    kappa: float = 1e-8,
) -> DgkdTerms:
    r"""TCKD, NCKD and the coupling of their gradients; for `distance="mse"` all in one pass, with its own gradient.

    That pass (`fused.terms`) has no forward-mode derivative: JAX raises TypeError for `jax.jvp` and `jax.jacfwd` of it.
    Its gradient can be differentiated again, in either mode.

    Args: as `tckd` and `coupling_of_gradients`.

    Returns:
        `DgkdTerms`, at least float32; differentiable in `student_logits`.

    Raises:
        ValueError: as `tckd` and `coupling_of_gradients`.
    """
    inputs = (student_logits, teacher_logits, labels)
    # The pass knows the gradient with respect to the logits only, and a traced temperature may be differentiated too.
    if distance != "mse" or isinstance(temperature, jax.core.Tracer):
        tckd_gradients = tckd_gradient(*inputs, temperature=temperature)
        nckd_gradients = nckd_gradient(*inputs, temperature=temperature)
        options = {"convention": convention, "distance": distance, "parity_batch": parity_batch, "kappa": kappa}
        return DgkdTerms(
            tckd(*inputs, temperature=temperature),
            nckd(*inputs, temperature=temperature),
            coupling_of_gradients(tckd_gradients, nckd_gradients, **options),
        )
    check_options(convention, distance, parity_batch, kappa)
    student_logits, teacher_logits = decoupling.check_logits(student_logits, teacher_logits)
    decoupling.check_labels(labels, student_logits.shape)
    decoupling.check_positive("temperature", temperature)
    target, nontarget, squared = fused.terms(student_logits / temperature, teacher_logits / temperature, labels)
    coupling = of_mean_distance(
        temperature**2 * jnp.mean(squared),
        rows=squared.size,
        columns=student_logits.shape[-1],
        convention=convention,
        parity_batch=parity_batch,
        kappa=kappa,
    )
    return DgkdTerms(temperature**2 * target, temperature**2 * nontarget, coupling)


def gradient_coupling(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    convention: Convention,
    distance: Distance = "mse",
    parity_batch: int | None = None,
    kappa: float = 1e-8,
) -> jax.Array:
    r"""The coupling term G of the gradients with respect to the student's logits, before the factor −ε.

    Args: as `tckd` and `coupling_of_gradients`.

    Returns:
        Scalar, at least float32; differentiable in `student_logits`.

    Raises:
        ValueError: as `tckd` and `coupling_of_gradients`.
    """
    return dgkd_terms(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        convention=convention,
        distance=distance,
        parity_batch=parity_batch,
        kappa=kappa,
    ).coupling


def dgkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float,
    beta: float,
    epsilon: float,
    temperature: float,
    convention: Convention,
    distance: Distance = "mse",
    parity_batch: int | None = None,
    kappa: float = 1e-8,
) -> jax.Array:
    r"""Decoupled gradient distillation, mean_i(α·TCKD_i + β·NCKD_i) − ε·G.

    Args:
        epsilon: ε > 0 pushes the two gradients apart, ε < 0 aligns them, 0 is DKD.
        (others): as `dkd` and `coupling_of_gradients`.

    Returns:
        Scalar, at least float32.

    Raises:
        ValueError: as `tckd` and `coupling_of_gradients`.

    Example:
        >>> z, v, y = jnp.zeros((4, 10)), jnp.eye(4, 10), jnp.arange(4)
        >>> loss = dgkd(z, v, y, alpha=1, beta=8, epsilon=0.1, temperature=4, convention="per_sample")
    """
    terms = dgkd_terms(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        convention=convention,
        distance=distance,
        parity_batch=parity_batch,
        kappa=kappa,
    )
    return jnp.mean(alpha * terms.tckd + beta * terms.nckd) - epsilon * terms.coupling


# ------------------------------------------------------------------------------------------------------------
# Diagnostics
# ------------------------------------------------------------------------------------------------------------


def diagnostics(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *, temperature: float
) -> dict[str, jax.Array]:
    r"""What the two gradients do, from the closed forms; the names are those of the DGKD repository's logs.

    Args: as `tckd`; every leading dimension counts as batch.

    Returns:
        Scalars, at least float32:
        `grad_similarity`: mean_i cos(∇TCKD_i, ∇NCKD_i), 0 where one of them is zero;
        `target_gradmag`, `nontarget_gradmag`: Frobenius norms of the gradients of the two batch means;
        `target_norm`, `nontarget_norm`: Frobenius norms of the student's target and non-target logits;
        `covariance`: Σ(ĀB̄ᵀ) / sqrt(Σ(ĀĀᵀ)·Σ(B̄B̄ᵀ)) of the two centred gradients, 0 where that is
            0/0 (as for two classes);
        `logit_msd`: mean_i ‖z_i − v_i‖²; `agreement`: share of samples where both have the same top class.

    Raises:
        ValueError: as `tckd`.
    """
    target_gradients = tckd_gradient(student_logits, teacher_logits, labels, temperature=temperature)
    nontarget_gradients = nckd_gradient(student_logits, teacher_logits, labels, temperature=temperature)
    student_logits, teacher_logits = decoupling.check_logits(student_logits, teacher_logits)
    batch = student_logits.size // student_logits.shape[-1]
    is_target = decoupling.target_mask(labels, student_logits)
    agrees = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
    return {
        "grad_similarity": jnp.mean(cosine(target_gradients, nontarget_gradients)),
        "target_gradmag": jnp.linalg.norm(target_gradients) / batch,
        "nontarget_gradmag": jnp.linalg.norm(nontarget_gradients) / batch,
        "target_norm": jnp.linalg.norm(jnp.where(is_target, student_logits, 0.0)),
        "nontarget_norm": jnp.linalg.norm(jnp.where(is_target, 0.0, student_logits)),
        "covariance": _covariance(target_gradients, nontarget_gradients),
        "logit_msd": jnp.mean(jnp.sum((student_logits - teacher_logits) ** 2, axis=-1)),
        "agreement": jnp.mean(agrees, dtype=jnp.float32),
    }


# ------------------------------------------------------------------------------------------------------------
# Comparing two gradients
# ------------------------------------------------------------------------------------------------------------


def _autodiff(loss, student_logits, teacher_logits, labels, temperature) -> jax.Array:
    student_logits = decoupling.promote(student_logits, "student_logits")

    # A sample's loss depends on its own logits only, so the sum's gradient holds each sample's own gradient.
    def total(logits):
        return jnp.sum(loss(logits, teacher_logits, labels, temperature=temperature))

    return jax.grad(total)(student_logits)


def _covariance(a: jax.Array, b: jax.Array) -> jax.Array:
    # Σ over all entries of ĀB̄ᵀ is the product of the column sums, so no [batch, batch] matrix is needed.
    rows = tuple(range(a.ndim - 1))
    return cosine(jnp.sum(a - jnp.mean(a), axis=rows), jnp.sum(b - jnp.mean(b), axis=rows))


def _use_autodiff(method: str) -> bool:
    decoupling.check_choice("method", method, ("closed_form", "autodiff"))
    return method == "autodiff"
