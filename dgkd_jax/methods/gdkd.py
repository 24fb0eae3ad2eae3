"""GDKD: the distillation loss split at the teacher's top classes instead of at the target."""

import dataclasses
from typing import ClassVar

import jax

from dgkd_jax import losses
from dgkd_jax.methods.key import COUNT, NOT_NEGATIVE, POSITIVE, key
from dgkd_jax.methods.progress import Progress, ramp

_SOURCE = "GDKD"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GDKD:
    """ce_weight·CE + ramp·T²·(w0·KL of the top k's mass + w1·KL in them + w2·KL of the rest). Zheng, arXiv:2512.04625.

    By Bowen Zheng and Ran Cheng; code ZaberKo/GDKD. The top k are the teacher's. With k = 1 it is DKD wherever the
    teacher is right.
    """

    name: ClassVar[str] = "gdkd"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {"gdkd": "T²·(w0·KL + w1·KL + w2·KL) [nats]"}
    teacher_temperature: ClassVar[None] = None  # compares the classes outside the top k, too

    ce_weight: float = key(1.0, "weight of the cross-entropy", NOT_NEGATIVE, source=_SOURCE)
    k: int = key(5, "how many top classes; with k or fewer classes, all but one", COUNT, source=_SOURCE)
    w0: float = key(1.0, "weight of the top classes against the rest", NOT_NEGATIVE, source=_SOURCE)
    w1: float = key(8.0, "weight within the top classes; differs from pair to pair", NOT_NEGATIVE, source=_SOURCE)
    w2: float = key(8.0, "weight within the rest; differs from pair to pair", NOT_NEGATIVE, source=_SOURCE)
    temperature: float = key(4.0, "T", POSITIVE, source=_SOURCE)
    warmup_epochs: float = key(
        20.0, "epochs over which the distillation is ramped up from 0", NOT_NEGATIVE, source=_SOURCE
    )

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        k = min(self.k, student_logits.shape[-1] - 1)
        weights = {"w0": self.w0, "w1": self.w1, "w2": self.w2}
        return {"gdkd": losses.gdkd(student_logits, teacher_logits, k=k, temperature=self.temperature, **weights)}

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        ramped = ramp(progress, warmup_epochs=self.warmup_epochs, form="step")
        return self.ce_weight * terms["ce"] + ramped * terms["gdkd"]
