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
import numpy as np

CONVENTIONS = ("per_sample", "literal", "normalized", "self_normalized")
DISTANCES = ("mse", "cosine", "kl", "wasserstein")

# The guard of the PyTorch repository's `normalized` loss: G / (stop_gradient(G) + 1e-8).
NORMALIZED_GUARD = 1e-8

Convention = Literal["per_sample", "literal", "normalized", "self_normalized"]
Distance = Literal["mse", "cosine", "kl", "wasserstein"]
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
    student_logits = _promote(student_logits, "student_logits")
    _check_classes(student_logits)
    _check_labels(labels, student_logits.shape)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    log_probabilities = jax.nn.log_softmax(student_logits)
    nll = -jnp.sum(jnp.where(_target_mask(labels, student_logits), log_probabilities, 0.0), axis=-1)
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
    student_logits, teacher_logits = _check_logits(student_logits, teacher_logits)
    _check_positive("temperature", temperature)
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
    student, teacher = _split_pair(student_logits, teacher_logits, labels, temperature)
    log_q, log_not_q = jax.nn.log_sigmoid(teacher.log_odds), jax.nn.log_sigmoid(-teacher.log_odds)
    log_p, log_not_p = jax.nn.log_sigmoid(student.log_odds), jax.nn.log_sigmoid(-student.log_odds)
    q, not_q = jax.nn.sigmoid(teacher.log_odds), jax.nn.sigmoid(-teacher.log_odds)
    return temperature**2 * (q * (log_q - log_p) + not_q * (log_not_q - log_not_p))


def nckd(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *, temperature: float) -> jax.Array:
    r"""Non-target-class distillation, T²·KL(t̂ ‖ ŝ) (arXiv:2203.08679, equation 6). Zero for two classes.

    Args, Returns, Raises: as `tckd`.
    """
    student, teacher = _split_pair(student_logits, teacher_logits, labels, temperature)
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
    student_logits, teacher_logits = _check_logits(student_logits, teacher_logits)
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
    student, teacher = _split_pair(student_logits, teacher_logits, labels, temperature)
    gap = _target_gap(student.log_odds, teacher.log_odds)
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
    student, teacher = _split_pair(student_logits, teacher_logits, labels, temperature)
    return temperature * _nontarget_gap(student.nontarget, teacher.nontarget)


# ------------------------------------------------------------------------------------------------------------
# The coupling of the two gradients, and DGKD
# ------------------------------------------------------------------------------------------------------------


def coupling_of_gradients(
    tckd_gradients: jax.Array,
    nckd_gradients: jax.Array,
    *,
    convention: Convention,
    distance: Distance = "mse",
    parity_batch: int | None = None,
    kappa: float = 1e-8,
) -> jax.Array:
    r"""The coupling term G of given per-sample gradients, before the factor −ε.

    With d_i = ‖∇TCKD_i − ∇NCKD_i‖² (`distance="mse"`), B rows and C columns, b = `parity_batch` or B:

    | convention        | value                                      | source                                |
    |-------------------|--------------------------------------------|---------------------------------------|
    | `per_sample`      | G = mean_i d_i                             | the DGKD blog post, (1/n)·Σ‖·‖²       |
    | `literal`         | G = mean_i d_i / (b²·C)                    | the PyTorch repository to early 2026  |
    | `normalized`      | G / (stop_gradient(G) + 1e-8), G `literal` | the PyTorch repository at its HEAD    |
    | `self_normalized` | G / (stop_gradient(G) + κ), G `per_sample` | ours: independent of the batch size   |

    (`literal` is `mse_loss` of the gradients of the batch means.) The other distances do not change with the
    length of the gradients, so G = mean_i d_i in every convention: `cosine` is 1 − cos(∇TCKD_i, ∇NCKD_i); for
    `kl` and `wasserstein` each gradient's absolute values divided by their sum are a distribution. `kl` is
    KL(NCKD's ‖ TCKD's): the other direction is always infinite, because TCKD puts half of its mass on the
    target, where NCKD has none. `wasserstein` is the 1-Wasserstein distance with the class index as position,
    so it depends on the order of the classes. A gradient of zero has no direction: its d_i is the constant 1
    for `cosine` (orthogonal) and 0 for `kl` and `wasserstein`.

    Args:
        tckd_gradients: float `[B, C]` (or any leading shape), each row one sample's gradient.
        nckd_gradients: the same shape.
        convention: one of `CONVENTIONS`.
        distance: one of `DISTANCES`.
        parity_batch: the batch size b ≥ 1 that `literal` and `normalized` divide by; None is the number of
            rows. Lets a PyTorch run at batch 64 be matched at any global batch.
        kappa: κ > 0, read by `self_normalized` only.

    Returns:
        Scalar, at least float32.

    Raises:
        ValueError: unknown convention or distance, shapes do not match, `parity_batch` < 1 or `kappa` ≤ 0.
    """
    _check_choice("convention", convention, CONVENTIONS)
    _check_choice("distance", distance, DISTANCES)
    if parity_batch is not None and parity_batch < 1:
        raise ValueError(f"parity_batch must be at least 1 or None, got {parity_batch}")
    _check_positive("kappa", kappa)
    tckd_gradients = _promote(tckd_gradients, "tckd_gradients")
    nckd_gradients = _promote(nckd_gradients, "nckd_gradients")
    *rows, columns = shape = tckd_gradients.shape
    if nckd_gradients.shape != shape:
        raise ValueError(f"nckd_gradients must have the shape of tckd_gradients, {shape}, got {nckd_gradients.shape}")
    coupling = jnp.mean(_gradient_distance(tckd_gradients, nckd_gradients, distance))
    if convention in ("literal", "normalized") and distance == "mse":
        batch = parity_batch or int(np.prod(rows))
        coupling = coupling / (float(batch) ** 2 * columns)
    if convention == "normalized":
        return coupling / (jax.lax.stop_gradient(coupling) + NORMALIZED_GUARD)
    if convention == "self_normalized":
        return coupling / (jax.lax.stop_gradient(coupling) + kappa)
    return coupling


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
    inputs = (student_logits, teacher_logits, labels)
    return coupling_of_gradients(
        tckd_gradient(*inputs, temperature=temperature),
        nckd_gradient(*inputs, temperature=temperature),
        convention=convention,
        distance=distance,
        parity_batch=parity_batch,
        kappa=kappa,
    )


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
    inputs = (student_logits, teacher_logits, labels)
    coupling = gradient_coupling(
        *inputs,
        temperature=temperature,
        convention=convention,
        distance=distance,
        parity_batch=parity_batch,
        kappa=kappa,
    )
    return jnp.mean(dkd(*inputs, alpha=alpha, beta=beta, temperature=temperature)) - epsilon * coupling


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
    student_logits, teacher_logits = _check_logits(student_logits, teacher_logits)
    batch = student_logits.size // student_logits.shape[-1]
    is_target = _target_mask(labels, student_logits)
    agrees = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
    return {
        "grad_similarity": jnp.mean(_cosine(target_gradients, nontarget_gradients)),
        "target_gradmag": jnp.linalg.norm(target_gradients) / batch,
        "nontarget_gradmag": jnp.linalg.norm(nontarget_gradients) / batch,
        "target_norm": jnp.linalg.norm(jnp.where(is_target, student_logits, 0.0)),
        "nontarget_norm": jnp.linalg.norm(jnp.where(is_target, 0.0, student_logits)),
        "covariance": _covariance(target_gradients, nontarget_gradients),
        "logit_msd": jnp.mean(jnp.sum((student_logits - teacher_logits) ** 2, axis=-1)),
        "agreement": jnp.mean(agrees, dtype=jnp.float32),
    }


# ------------------------------------------------------------------------------------------------------------
# The split into target and non-target
# ------------------------------------------------------------------------------------------------------------


class _Split(NamedTuple):
    """Logits at temperature T, split into the target against the rest and the rest among themselves."""

    target_mask: jax.Array  # [..., classes] bool
    log_odds: jax.Array  # [...] u, with p = sigmoid(u)
    log_nontarget: jax.Array  # [..., classes] log ŝ; 0 at the target
    nontarget: jax.Array  # [..., classes] ŝ; 0 at the target


def _split(logits: jax.Array, is_target: jax.Array, temperature: float) -> _Split:
    scaled = logits / temperature
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(is_target, -jnp.inf, scaled), axis=-1, keepdims=True))
    # The target is replaced before the exponential, not after: where it dominates, exp would overflow and its
    # gradient, inf times the mask's 0, would be NaN.
    shifted = jnp.where(is_target, 0.0, scaled - highest)
    log_sum = jnp.log(jnp.sum(jnp.where(is_target, 0.0, jnp.exp(shifted)), axis=-1, keepdims=True))
    log_nontarget = jnp.where(is_target, 0.0, shifted - log_sum)
    target = jnp.sum(jnp.where(is_target, scaled, 0.0), axis=-1, keepdims=True)
    return _Split(
        target_mask=is_target,
        log_odds=((target - highest) - log_sum)[..., 0],
        log_nontarget=log_nontarget,
        nontarget=jnp.where(is_target, 0.0, jnp.exp(log_nontarget)),
    )


def _split_pair(student_logits, teacher_logits, labels, temperature) -> tuple[_Split, _Split]:
    student_logits, teacher_logits = _check_logits(student_logits, teacher_logits)
    _check_labels(labels, student_logits.shape)
    _check_positive("temperature", temperature)
    is_target = _target_mask(labels, student_logits)
    return _split(student_logits, is_target, temperature), _split(teacher_logits, is_target, temperature)


def _target_mask(labels: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.asarray(labels)[..., None] == jnp.arange(logits.shape[-1])


def _target_gap(student_log_odds: jax.Array, teacher_log_odds: jax.Array) -> jax.Array:
    """δ = p − q, between the small tails where both are near 1, so that it does not cancel."""
    return jnp.where(
        student_log_odds + teacher_log_odds > 0,
        jax.nn.sigmoid(-teacher_log_odds) - jax.nn.sigmoid(-student_log_odds),
        jax.nn.sigmoid(student_log_odds) - jax.nn.sigmoid(teacher_log_odds),
    )


def _nontarget_gap(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """ŝ − t̂; for a class that has most of both, minus the sum of the others, so that 1 − 1 does not cancel."""
    gap = student - teacher
    has_most = student + teacher > 1  # one class at the most, since all of them sum to 2
    others = jnp.sum(jnp.where(has_most, 0.0, gap), axis=-1, keepdims=True)
    return jnp.where(has_most, -others, gap)


# ------------------------------------------------------------------------------------------------------------
# Comparing two gradients
# ------------------------------------------------------------------------------------------------------------


def _autodiff(loss, student_logits, teacher_logits, labels, temperature) -> jax.Array:
    student_logits = _promote(student_logits, "student_logits")

    # A sample's loss depends on its own logits only, so the sum's gradient holds each sample's own gradient.
    def total(logits):
        return jnp.sum(loss(logits, teacher_logits, labels, temperature=temperature))

    return jax.grad(total)(student_logits)


def _gradient_distance(a: jax.Array, b: jax.Array, distance: Distance) -> jax.Array:
    """Distance of each row of `a`, TCKD's, from that of `b`, NCKD's: [..., columns] twice -> [...]."""
    if distance == "mse":
        return jnp.sum((a - b) ** 2, axis=-1)
    if distance == "cosine":
        return 1.0 - _cosine(a, b)
    target, nontarget = _as_distribution(a), _as_distribution(b)
    if distance == "wasserstein":
        distances = jnp.sum(jnp.abs(jnp.cumsum(target - nontarget, axis=-1)), axis=-1)
    else:
        distances = _kl(nontarget, a)
    comparable = jnp.any(target > 0, axis=-1) & jnp.any(nontarget > 0, axis=-1)
    return jnp.where(comparable, distances, 0.0)


def _kl(nontarget: jax.Array, a: jax.Array) -> jax.Array:
    """KL(nontarget ‖ |a|/Σ|a|); where `a` has no mass but `nontarget` has, large and not infinite."""
    a = jnp.abs(a)
    floor = _smallest_divisor(a.dtype)
    has_mass = nontarget > 0
    # The floor is put under `a` itself, not its share, so that the logarithm's gradient is at most 1/floor.
    total = jnp.maximum(jnp.sum(a, axis=-1, keepdims=True), floor)
    log_target = jnp.log(jnp.maximum(a, floor)) - jnp.log(total)
    log_ratio = jnp.log(jnp.where(has_mass, nontarget, 1.0)) - log_target
    return jnp.sum(jnp.where(has_mass, nontarget * log_ratio, 0.0), axis=-1)


def _smallest_divisor(dtype) -> float:
    """Below it a number has lost digits to underflow, and its reciprocal overflows within a gradient."""
    return float(jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps)


def _without_scale(a: jax.Array) -> jax.Array:
    """Each row divided by its largest magnitude, lest small squares underflow; 0 if negligible."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(a), axis=-1, keepdims=True))
    return a / jnp.where(largest > _smallest_divisor(a.dtype), largest, jnp.inf)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = _without_scale(a), _without_scale(b)
    squares = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))


def _as_distribution(a: jax.Array) -> jax.Array:
    a = jnp.abs(_without_scale(a))
    total = jnp.sum(a, axis=-1, keepdims=True)
    return a / jnp.where(total > 0, total, 1.0)


def _covariance(a: jax.Array, b: jax.Array) -> jax.Array:
    # Σ over all entries of ĀB̄ᵀ is the product of the column sums, so no [batch, batch] matrix is needed.
    rows = tuple(range(a.ndim - 1))
    return _cosine(jnp.sum(a - jnp.mean(a), axis=rows), jnp.sum(b - jnp.mean(b), axis=rows))


# ------------------------------------------------------------------------------------------------------------
# Checks: each message names the argument and what was expected
# ------------------------------------------------------------------------------------------------------------


def _promote(logits: jax.Array, name: str) -> jax.Array:
    logits = jnp.asarray(logits)
    if jnp.issubdtype(logits.dtype, jnp.complexfloating) or logits.dtype == jnp.bool_:
        raise ValueError(f"{name} must be real numbers, got {logits.dtype}")
    if logits.ndim < 1:
        raise ValueError(f"{name} must have shape [..., classes], got a scalar")
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _check_logits(student_logits, teacher_logits) -> tuple[jax.Array, jax.Array]:
    student_logits = _promote(student_logits, "student_logits")
    teacher_logits = _promote(jax.lax.stop_gradient(teacher_logits), "teacher_logits")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, {student_logits.shape}, got {teacher_logits.shape}"
        )
    _check_classes(student_logits)
    return student_logits, teacher_logits


def _check_classes(student_logits: jax.Array) -> None:
    if student_logits.shape[-1] < 2:
        raise ValueError(f"student_logits must have at least two classes, got shape {student_logits.shape}")


def _check_labels(labels, logits_shape: tuple[int, ...]) -> None:
    if not hasattr(labels, "dtype"):
        labels = np.asarray(labels)
    if labels.shape == logits_shape:
        raise ValueError(
            f"labels must be class indices of shape {logits_shape[:-1]}, got shape {labels.shape}: "
            "soft labels have no single target class to split off"
        )
    if labels.shape != logits_shape[:-1]:
        raise ValueError(f"labels must have shape {logits_shape[:-1]}, the logits' without classes, got {labels.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if isinstance(labels, jax.core.Tracer) or labels.size == 0:
        return
    with jax.ensure_compile_time_eval():  # inside jit, even of an array that is known
        lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= logits_shape[-1]:
        raise ValueError(f"labels must lie in [0, {logits_shape[-1]}), got values from {lowest} to {highest}")


def _check_positive(name: str, value: float) -> None:
    if not isinstance(value, jax.core.Tracer) and not 0.0 < float(value) < float("inf"):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _use_autodiff(method: str) -> bool:
    _check_choice("method", method, ("closed_form", "autodiff"))
    return method == "autodiff"
