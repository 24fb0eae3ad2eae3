"""Squared-error logit matching."""

import dataclasses
from typing import ClassVar

import jax

from dgkd_jax import losses
from dgkd_jax.methods.key import NOT_NEGATIVE, key
from dgkd_jax.methods.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitMSE:
    """ce_weight·CE + weight·mean_j (z_j − v_j)². Ba & Caruana, arXiv:1312.6184, equation 1."""

    name: ClassVar[str] = "logit_mse"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {"logit_mse": "mean (z − v)²"}
    teacher_temperature: ClassVar[None] = None  # reads the raw logits

    ce_weight: float = key(0.1, "weight of the cross-entropy", NOT_NEGATIVE)
    weight: float = key(0.9, "weight of the squared error", NOT_NEGATIVE)

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        return {"logit_mse": losses.logit_mse(student_logits, teacher_logits)}

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        return self.ce_weight * terms["ce"] + self.weight * terms["logit_mse"]
