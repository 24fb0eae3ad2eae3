"""Compares a student with its teacher: all distillation losses and the statistics of their gradients, for logging."""

import jax
import jax.numpy as jnp

from dgkd_jax.losses import checks, distillation, target_split
from dgkd_jax.losses.coupling import cosine

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

    Args, Raises: as `tckd`; all leading dimensions count as batch. Of a label that is a distribution, the class with
        the largest weight is the target.

    Returns:
        Scalars: means of `kd`, `tckd`, `nckd` at this temperature and of `logit_mse` (`TERMS`), and `diagnostics`.
    """
    inputs = _with_hard_labels(student_logits, teacher_logits, labels)
    split = _split(inputs, temperature)
    return jax.tree.map(jnp.mean, _terms(inputs, split, temperature)) | _diagnostics(inputs, split, temperature)


def examine(
    student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, *, temperature: float
) -> dict[str, jax.Array]:
    """The parts of a distillation loss for each example, to find the part that is not finite.

    Args, Raises: as `compare`.

    Returns:
        Arrays `[...]`: `TERMS`, and `coupling`, ‖∇TCKD − ∇NCKD‖².
    """
    inputs = _with_hard_labels(student_logits, teacher_logits, labels)
    split = _split(inputs, temperature)
    apart = temperature * (target_split.tckd_gradient(split) - target_split.nckd_gradient(split))
    return _terms(inputs, split, temperature) | {"coupling": jnp.sum(apart**2, axis=-1)}


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
    inputs = _with_hard_labels(student_logits, teacher_logits, labels)
    return _diagnostics(inputs, _split(inputs, temperature), temperature)


def _with_hard_labels(student_logits, teacher_logits, labels) -> checks.Inputs:
    inputs = checks.check_inputs(student_logits, teacher_logits, labels)
    return inputs._replace(labels=jnp.argmax(inputs.labels, axis=-1)) if inputs.has_soft_labels() else inputs


def _split(inputs: checks.Inputs, temperature: float) -> target_split.Split:
    checks.check_positive("temperature", temperature)
    return target_split.split(*inputs[:2], inputs.is_target(), temperature)


def _terms(inputs: checks.Inputs, split: target_split.Split, temperature: float) -> dict[str, jax.Array]:
    tckd = temperature**2 * target_split.target_divergence(split)
    nckd = temperature**2 * target_split.nontarget_divergence(split)
    not_q = jax.nn.sigmoid(-split.odds.teacher)
    found = {
        # A sum of two parts that are not negative is as exact as they are, and needs no third softmax.
        "kd": tckd + jnp.where(not_q > 0, not_q * nckd, 0.0),
        "tckd": tckd,
        "nckd": nckd,
        "logit_mse": distillation.logit_mse(*inputs[:2]),
    }
    return {name: inputs.selected(value) for name, value in found.items()}


def _diagnostics(inputs: checks.Inputs, split: target_split.Split, temperature: float) -> dict[str, jax.Array]:
    of_target = temperature * target_split.tckd_gradient(split)
    of_nontarget = temperature * target_split.nckd_gradient(split)
    student_logits, teacher_logits = inputs[:2]
    batch = student_logits.size // student_logits.shape[-1]
    is_target = split.is_target
    agrees = jnp.argmax(student_logits, axis=-1) == jnp.argmax(teacher_logits, axis=-1)
    absent = (student_logits == -jnp.inf) & (teacher_logits == -jnp.inf)
    student_logits, teacher_logits = (jnp.where(absent, 0.0, logits) for logits in (student_logits, teacher_logits))
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
