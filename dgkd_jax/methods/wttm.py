"""WTTM: only the teacher is softened, and smooth teachers count more."""

import dataclasses
from typing import ClassVar

import jax

from dgkd_jax import losses
from dgkd_jax.methods.key import NOT_NEGATIVE, POSITIVE, key
from dgkd_jax.methods.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class WTTM:
    """ce_weight·CE + weight·U·KL(softmax(γ·v) ‖ softmax(z)). Zheng & Yang, ICLR 2024, arXiv:2402.11148.

    U = Σ softmax(v)^γ of each example. Code: zkxufo/TTM.
    """

    name: ClassVar[str] = "wttm"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {"wttm": "U·KL [nats]"}
    teacher_temperature: ClassVar[None] = None  # reads the probabilities at 1 and at 1/γ

    ce_weight: float = key(1.0, "weight of the cross-entropy", NOT_NEGATIVE, source="TTM")
    weight: float = key(
        4.0, "weight of U·KL; the authors tune it per pair", NOT_NEGATIVE, source="TTM's example, together with CRD"
    )
    gamma: float = key(
        0.2, "exponent γ of the teacher's probabilities, 1/T", POSITIVE, source="TTM's example, together with CRD"
    )

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        return {"wttm": losses.wttm(student_logits, teacher_logits, gamma=self.gamma)}

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        return self.ce_weight * terms["ce"] + self.weight * terms["wttm"]
