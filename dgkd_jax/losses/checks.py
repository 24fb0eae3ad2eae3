"""Checks and prepares a loss's arguments; each message names the argument and what was expected."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Inputs(NamedTuple):
    """Checked arguments of a loss: logits in one floating-point type of at least 32 bits, and who is left out."""

    student_logits: jax.Array  # [..., classes]
    teacher_logits: jax.Array | None  # [..., classes], without gradient
    labels: jax.Array | None  # integers [...] or distributions [..., classes]
    where: jax.Array | None  # bool [...]
    has_label: jax.Array | None = None  # bool [...], None: all have; whether the label is one of the classes

    def has_soft_labels(self) -> bool:
        return self.labels is not None and self.labels.ndim == self.student_logits.ndim

    def is_target(self) -> jax.Array:
        """Bool `[..., classes]`, true at integer labels."""
        return self.labels[..., None] == jnp.arange(self.student_logits.shape[-1])

    def selected(self, loss: jax.Array) -> jax.Array:
        """A loss `[...]`: 0 for the examples that are left out, NaN for those whose label is none of the classes."""
        loss = loss if self.has_label is None else jnp.where(self.has_label, loss, jnp.nan)
        return loss if self.where is None else jnp.where(self.where, loss, 0.0)

    def mean(self, loss: jax.Array) -> jax.Array:
        """The mean of a loss `[...]` over the examples that are not left out; 0 if all are."""
        loss = self.selected(loss)
        return jnp.mean(loss) if self.where is None else jnp.sum(loss) / self.count()

    def count(self) -> int | jax.Array:
        """How many examples are not left out, at least 1."""
        rows = int(np.prod(self.student_logits.shape[:-1]))
        return rows if self.where is None else jnp.maximum(jnp.sum(self.where), 1)


def check_inputs(student_logits, teacher_logits=None, labels=None, where=None) -> Inputs:
    """Check, promote and mask what a loss was given.

    A row that `where` leaves out gets zeros for logits, so that not even NaN there reaches a gradient. A row whose
    label is out of range gets NaN, where the label is not known before the program runs.

    Raises:
        ValueError: shapes do not match, fewer than two classes, wrong types; and, of arrays with known values, labels
            out of range, no distribution, or a target that both sides have masked with −inf.
    """
    if teacher_logits is None:
        student_logits = promote(student_logits, "student_logits")
        check_classes(student_logits)
    else:
        student_logits, teacher_logits = check_logits(student_logits, teacher_logits)
    shape = student_logits.shape
    if where is not None:
        where = _check_where(where, shape)
    has_label = None
    if labels is not None:
        labels = labels if hasattr(labels, "dtype") else np.asarray(labels)
        _check_label_type(labels, shape)
        soft = labels.ndim == len(shape)
        if where is not None:
            labels = jnp.where(where[..., None], labels, 1 / shape[-1]) if soft else jnp.where(where, labels, 0)
        has_label = _check_distributions(labels) if soft else _check_range(labels, shape[-1])
        if has_label is not None:
            student_logits = jnp.where(has_label[..., None], student_logits, jnp.nan)
        labels = labels.astype(student_logits.dtype) if soft else jnp.asarray(labels)
    if where is not None:
        student_logits = jnp.where(where[..., None], student_logits, 0.0)
        if teacher_logits is not None:
            teacher_logits = jnp.where(where[..., None], teacher_logits, 0.0)
    found = Inputs(student_logits, teacher_logits, labels, where, has_label)
    if labels is not None and not soft and teacher_logits is not None:
        _check_targets_are_there(found)
    return found


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
    dtype = jnp.promote_types(student_logits.dtype, teacher_logits.dtype)
    return student_logits.astype(dtype), teacher_logits.astype(dtype)


def check_classes(student_logits: jax.Array) -> None:
    if student_logits.shape[-1] < 2:
        raise ValueError(f"student_logits must have at least two classes, got shape {student_logits.shape}")


def check_positive(name: str, value: float) -> None:
    if not isinstance(value, jax.core.Tracer) and not 0.0 < float(value) < float("inf"):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_where(where, logits_shape: tuple[int, ...]) -> jax.Array:
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise ValueError(f"where must be booleans, got {where.dtype}")
    if where.shape != logits_shape[:-1]:
        raise ValueError(f"where must have shape {logits_shape[:-1]}, the logits' without classes, got {where.shape}")
    return where


def _check_label_type(labels, logits_shape: tuple[int, ...]) -> None:
    if labels.shape == logits_shape:
        if not jnp.issubdtype(labels.dtype, jnp.floating):
            raise ValueError(
                f"labels of the logits' shape {logits_shape} must be distributions over the classes in floating point, "
                f"got {labels.dtype}; class indices have shape {logits_shape[:-1]}"
            )
        return
    if labels.shape != logits_shape[:-1]:
        raise ValueError(
            f"labels must have shape {logits_shape[:-1]} (class indices) or {logits_shape} (distributions), "
            f"got {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")


def _check_range(labels, classes: int) -> jax.Array | None:
    """Where labels lie in [0, classes); None if all do for certain."""
    if isinstance(labels, jax.core.Tracer):
        return (labels >= 0) & (labels < classes)
    if labels.size:
        with jax.ensure_compile_time_eval():  # so that a constant is checked inside jit too
            lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= classes:
            raise ValueError(f"labels must lie in [0, {classes}), got values from {lowest} to {highest}")
    return None


def _check_distributions(labels) -> jax.Array | None:
    """Where rows are at least 0 and sum to 1; None if all do for certain."""
    if isinstance(labels, jax.core.Tracer):
        return _are_distributions(labels)
    with jax.ensure_compile_time_eval():
        if not bool(jnp.all(_are_distributions(labels))):
            raise ValueError("labels that are distributions must be at least 0 and sum to 1 over the classes")
    return None


def _are_distributions(labels) -> jax.Array:
    # 1 %: bfloat16 weights are rounded to 0.4 %.
    return jnp.all(labels >= 0, axis=-1) & (jnp.abs(jnp.sum(labels, axis=-1, dtype=jnp.float32) - 1) < 1e-2)


def _check_targets_are_there(inputs: Inputs) -> None:
    student_logits, teacher_logits, labels = inputs[:3]
    if any(isinstance(array, jax.core.Tracer) for array in (student_logits, teacher_logits, labels)):
        return
    at = labels[..., None]
    both = [jnp.take_along_axis(logits, at, axis=-1) == -jnp.inf for logits in (student_logits, teacher_logits)]
    if bool(jnp.any(both[0] & both[1])):
        raise ValueError("labels name a class whose logit is -inf in both student_logits and teacher_logits")
