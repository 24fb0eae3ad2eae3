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
    return _gradient(tckd, target_split.tckd_gradient, student_logits, teacher_logits, labels, temperature, method)


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
    return _gradient(nckd, target_split.nckd_gradient, student_logits, teacher_logits, labels, temperature, method)


def _gradient(loss, closed_form, student_logits, teacher_logits, labels, temperature, method) -> jax.Array:
    checks.check_choice("method", method, ("closed_form", "autodiff"))
    inputs = checks.check_inputs(student_logits, teacher_logits, labels)
    checks.check_positive("temperature", temperature)
    if inputs.has_soft_labels():
        raise ValueError(f"labels must be integers of shape {inputs.student_logits.shape[:-1]} for a gradient")
    if method == "closed_form":
        return temperature * closed_form(target_split.split(*inputs[:2], inputs.is_target(), temperature))

    # Each sample's loss depends on its own logits only, so the gradient of the sum holds every sample's gradient.
    def total(logits):
        return jnp.sum(loss(logits, teacher_logits, labels, temperature=temperature))

    return jax.grad(total)(inputs.student_logits)
