"""Checks of a loss's arguments; each message names the argument and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np


def promote(logits: jax.Array, name: str) -> jax.Array:
    logits = jnp.asarray(logits)
    if jnp.issubdtype(logits.dtype, jnp.complexfloating) or logits.dtype == jnp.bool_:
        raise ValueError(f"{name} must be real numbers, got {logits.dtype}")
    if logits.ndim < 1:
        raise ValueError(f"{name} must have shape [..., classes], got a scalar")
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def check_logits(student_logits, teacher_logits) -> tuple[jax.Array, jax.Array]:
    student_logits = promote(student_logits, "student_logits")
    teacher_logits = promote(jax.lax.stop_gradient(teacher_logits), "teacher_logits")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, {student_logits.shape}, got {teacher_logits.shape}"
        )
    check_classes(student_logits)
    return student_logits, teacher_logits


def check_classes(student_logits: jax.Array) -> None:
    if student_logits.shape[-1] < 2:
        raise ValueError(f"student_logits must have at least two classes, got shape {student_logits.shape}")


def check_labels(labels, logits_shape: tuple[int, ...]) -> None:
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
    with jax.ensure_compile_time_eval():  # so that a constant is checked inside jit too
        lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= logits_shape[-1]:
        raise ValueError(f"labels must lie in [0, {logits_shape[-1]}), got values from {lowest} to {highest}")


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, jax.core.Tracer) and not 0.0 < float(value) < float("inf"):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
