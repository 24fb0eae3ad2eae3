"""DIST: the correlations between student and teacher, within an example and within a class."""

import dataclasses
from typing import ClassVar

import jax

from dgkd_jax import losses
from dgkd_jax.methods.key import NOT_NEGATIVE, POSITIVE, key
from dgkd_jax.methods.progress import Progress

_SOURCE = "image_classification_sota"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DIST:
    """ce_weight·CE + T²·[β·(1 − ρ of rows) + γ·(1 − ρ of columns)]. Huang et al., NeurIPS 2022, arXiv:2205.10536.

    Code: hunto/image_classification_sota. Rows are examples and columns classes of the batch's probabilities at T, ρ is
    Pearson's correlation of student and teacher. Columns are over the global batch, so the loss depends on batch_size.
    """

    name: ClassVar[str] = "dist"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = True  # the columns
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {"dist": "DIST"}
    teacher_temperature: ClassVar[None] = None  # correlates every class, so a cache of the top classes is not enough

    ce_weight: float = key(1.0, "weight of the cross-entropy", NOT_NEGATIVE, source=_SOURCE)
    beta: float = key(2.0, "weight β of the rows, within an example", NOT_NEGATIVE, source=_SOURCE)
    gamma: float = key(2.0, "weight γ of the columns, within a class", NOT_NEGATIVE, source=_SOURCE)
    temperature: float = key(1.0, "T", POSITIVE, source=f"{_SOURCE}, ImageNet")

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        weights = {"beta": self.beta, "gamma": self.gamma}
        return {"dist": losses.dist(student_logits, teacher_logits, temperature=self.temperature, **weights)}

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        return self.ce_weight * terms["ce"] + terms["dist"]
