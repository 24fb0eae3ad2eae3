"""NKD: distillation of the target by its cross-entropy, and of the other classes among themselves."""

import dataclasses
from typing import ClassVar

import jax

from dgkd_jax import losses
from dgkd_jax.methods.key import NOT_NEGATIVE, POSITIVE, key
from dgkd_jax.methods.progress import Progress

_SOURCE = "cls_KD"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NKD:
    """ce_weight·CE − q·log p − γ·T²·Σ t̂·log ŝ. Yang et al., ICCV 2023, arXiv:2303.13005.

    Code: yzd-v/cls_KD. The target's probabilities q and p are at temperature 1.
    """

    name: ClassVar[str] = "nkd"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {"nkd": "NKD [nats]"}
    teacher_temperature: ClassVar[None] = None  # reads the probabilities at 1 and at T

    ce_weight: float = key(1.0, "weight of the cross-entropy", NOT_NEGATIVE, source=_SOURCE)
    gamma: float = key(1.5, "weight γ of the non-target classes", NOT_NEGATIVE, source=f"{_SOURCE}, ImageNet")
    temperature: float = key(1.0, "T of the non-target classes", POSITIVE, source=f"{_SOURCE}, ImageNet")

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        logits = student_logits, teacher_logits, labels
        return {"nkd": losses.nkd(*logits, temperature=self.temperature, gamma=self.gamma)}

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        return self.ce_weight * terms["ce"] + terms["nkd"]
