"""Compares a student with its teacher: all distillation losses and the statistics of their gradients, for logging."""

import jax
import jax.numpy as jnp

from dgkd_jax.losses import distillation, gradients
from dgkd_jax.losses.coupling import cosine
from dgkd_jax.losses.target_split import SplitPair, split_pair

TERMS = ("kd", "tckd", "nckd", "logit_mse")
DIAGNOSTICS = (
    "grad_similarity",
    "target_gradmag",
    "nontarget_gradmag",
    "target_norm",
    "nontarget_norm",
    "covariance",
    "logit_msd",
    "agreement",
)


def compare(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *, temperature: float
) -> dict[str, jax.Array]:
    """The metrics that every method logs, so that runs of different methods can be compared.

    Args, Raises: as `tckd`; all leading dimensions count as batch.

    Returns:
        Scalars: means of `kd`, `tckd`, `nckd` at this temperature and of `logit_mse` (`TERMS`), and `diagnostics`.
    """
    pair = split_pair(student_logits, teacher_logits, labels, temperature)
    return jax.tree.map(jnp.mean, _terms(pair, temperature)) | _diagnostics(pair, temperature)


def examine(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *, temperature: float
) -> dict[str, jax.Array]:
    """The parts of a distillation loss for each example, to find the part that is not finite.

    Args, Raises: as `tckd`.

    Returns:
        Arrays `[...]`: `TERMS`, and `coupling`, ‖∇TCKD − ∇NCKD‖².
    """
    pair = split_pair(student_logits, teacher_logits, labels, temperature)
    apart = gradients.tckd_gradient_of(pair, temperature) - gradients.nckd_gradient_of(pair, temperature)
    return _terms(pair, temperature) | {"coupling": jnp.sum(apart**2, axis=-1)}


def diagnostics(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *, temperature: float
) -> dict[str, jax.Array]:
    r"""Statistics of the two gradients, in closed form; the names are those of the DGKD repository's logs.

    Args: as `tckd`; all leading dimensions count as batch.

    Returns:
        Scalars, at least float32 (`DIAGNOSTICS`):
        `grad_similarity`: mean_i cos(∇TCKD_i, ∇NCKD_i), 0 where one of them is zero;
        `target_gradmag`, `nontarget_gradmag`: Frobenius norms of the gradients of the two batch means;
        `target_norm`, `nontarget_norm`: Frobenius norms of the student's target and non-target logits;
        `covariance`: Σ(ĀB̄ᵀ) / sqrt(Σ(ĀĀᵀ)·Σ(B̄B̄ᵀ)) of the two centred gradients, 0 where that is 0/0 (two classes);
        `logit_msd`: mean_i ‖z_i − v_i‖²;
        `agreement`: share of samples for which student and teacher have the same top class.

    Raises:
        ValueError: as `tckd`.
    """
    return _diagnostics(split_pair(student_logits, teacher_logits, labels, temperature), temperature)


def _terms(pair: SplitPair, temperature: float) -> dict[str, jax.Array]:
    tckd, nckd = distillation.terms_of(pair, temperature)
    return {
        "kd": distillation.kd(pair.student_logits, pair.teacher_logits, temperature=temperature),
        "tckd": tckd,
        "nckd": nckd,
        "logit_mse": distillation.logit_mse(pair.student_logits, pair.teacher_logits),
    }


def _diagnostics(pair: SplitPair, temperature: float) -> dict[str, jax.Array]:
    of_target = gradients.tckd_gradient_of(pair, temperature)
    of_nontarget = gradients.nckd_gradient_of(pair, temperature)
    student_logits, teacher_logits = pair.student_logits, pair.teacher_logits
    batch = student_logits.size // student_logits.shape[-1]
    is_target = pair.student.target_mask
    agrees = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
    return {
        "grad_similarity": jnp.mean(cosine(of_target, of_nontarget)),
        "target_gradmag": jnp.linalg.norm(of_target) / batch,
        "nontarget_gradmag": jnp.linalg.norm(of_nontarget) / batch,
        "target_norm": jnp.linalg.norm(jnp.where(is_target, student_logits, 0.0)),
        "nontarget_norm": jnp.linalg.norm(jnp.where(is_target, 0.0, student_logits)),
        "covariance": _covariance(of_target, of_nontarget),
        "logit_msd": jnp.mean(jnp.sum((student_logits - teacher_logits) ** 2, axis=-1)),
        "agreement": jnp.mean(agrees, dtype=jnp.float32),
    }


def _covariance(a: jax.Array, b: jax.Array) -> jax.Array:
    # The sum over all entries of ĀB̄ᵀ is the dot product of the column sums, so no [batch, batch] matrix is needed.
    rows = tuple(range(a.ndim - 1))
    return cosine(jnp.sum(a - jnp.mean(a), axis=rows), jnp.sum(b - jnp.mean(b), axis=rows))
