"""KD: the student also learns the teacher's softened probabilities."""

import dataclasses
from typing import ClassVar

import jax

from dgkd_jax import losses
from dgkd_jax.methods.key import NOT_NEGATIVE, POSITIVE, SWITCH, key
from dgkd_jax.methods.progress import Progress

_SOURCE = "RepDistiller and mdistiller"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KD:
    """ce_weight·CE + weight·T²·KL(softmax(v/T) ‖ softmax(z/T)). Hinton et al., arXiv:1503.02531, section 2."""

    name: ClassVar[str] = "kd"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {"kd": "T²·KL(teacher ‖ student) [nats]"}

    ce_weight: float = key(0.1, "weight of the cross-entropy", NOT_NEGATIVE, source=_SOURCE)
    weight: float = key(0.9, "weight of T²·KL", NOT_NEGATIVE, source=_SOURCE)
    temperature: float = key(4.0, "T", POSITIVE, source=_SOURCE)
    standardize: bool = key(
        False,
        "standardise the logits of both over the classes first (arXiv:2403.01427; its authors then take T 2, weight 9)",
        SWITCH,
    )

    @property
    def teacher_temperature(self) -> float | None:
        return None if self.standardize else self.temperature

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        if self.standardize:
            student_logits, teacher_logits = map(losses.standardize, (student_logits, teacher_logits))
        return {"kd": losses.kd(student_logits, teacher_logits, temperature=self.temperature)}

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        return self.ce_weight * terms["ce"] + self.weight * terms["kd"]
