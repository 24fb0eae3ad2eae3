"""Cross-entropy: training without a teacher."""

import dataclasses
from typing import ClassVar

import jax

from dgkd_jax.methods.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class CE:
    """The cross-entropy alone."""

    name: ClassVar[str] = "ce"
    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {}
    teacher_temperature: ClassVar[None] = None

    def terms(self, student_logits: jax.Array, teacher_logits: None, labels: jax.Array) -> dict[str, jax.Array]:
        return {}

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        return terms["ce"]
