"""Per-sample gradients of TCKD and NCKD with respect to the student's logits, in closed form or by autodiff."""

from typing import Literal

import jax
import jax.numpy as jnp

from dgkd_jax.losses import checks, target_split
from dgkd_jax.losses.distillation import nckd, tckd

GradientMethod = Literal["closed_form", "autodiff"]


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
        method: "closed_form" (differentiable; used in training) or "autodiff" (`jax.grad`; the reference).
        (others): as `tckd`.

    Returns:
        `[..., classes]`, at least float32. Each row is its own sample's gradient, not divided by the batch size.

    Raises:
        ValueError: as `tckd`; unknown method.
    """
    if _use_autodiff(method):
        return _autodiff(tckd, student_logits, teacher_logits, labels, temperature)
    return tckd_gradient_of(target_split.split_pair(student_logits, teacher_logits, labels, temperature), temperature)


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
    return nckd_gradient_of(target_split.split_pair(student_logits, teacher_logits, labels, temperature), temperature)


def tckd_gradient_of(pair: target_split.SplitPair, temperature: float) -> jax.Array:
    """`tckd_gradient` of logits that were already split at this temperature."""
    gap = target_split.target_gap(pair.student.log_odds, pair.teacher.log_odds)
    return temperature * gap[..., None] * (pair.student.target_mask - pair.student.nontarget)


def nckd_gradient_of(pair: target_split.SplitPair, temperature: float) -> jax.Array:
    """`nckd_gradient` of logits that were already split at this temperature."""
    return temperature * target_split.nontarget_gap(pair.student.nontarget, pair.teacher.nontarget)


def _autodiff(loss, student_logits, teacher_logits, labels, temperature) -> jax.Array:
    student_logits = checks.promote(student_logits, "student_logits")

    # Each sample's loss depends on its own logits only, so the gradient of the sum holds every sample's gradient.
    def total(logits):
        return jnp.sum(loss(logits, teacher_logits, labels, temperature=temperature))

    return jax.grad(total)(student_logits)


def _use_autodiff(method: str) -> bool:
    checks.check_choice("method", method, ("closed_form", "autodiff"))
    return method == "autodiff"
