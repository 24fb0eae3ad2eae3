"""DKD: the distillation loss split into a target-class and a non-target-class part."""

import dataclasses
from typing import ClassVar

import jax

from dgkd_jax import losses
from dgkd_jax.methods.key import NOT_NEGATIVE, POSITIVE, SWITCH, key, one_of
from dgkd_jax.methods.progress import RAMP_FORMS, Progress, ramp


@dataclasses.dataclass(frozen=True, kw_only=True)
class DKD:
    """ce_weight·CE + ramp·(α·TCKD + β·NCKD). Zhao et al., CVPR 2022, arXiv:2203.08679, equation 7."""

    name: ClassVar[str] = "dkd"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {"tckd": "T²·TCKD [nats]", "nckd": "T²·NCKD [nats]"}

    ce_weight: float = key(1.0, "weight of the cross-entropy", NOT_NEGATIVE, source="mdistiller")
    alpha: float = key(1.0, "weight α of TCKD", NOT_NEGATIVE, source="mdistiller")
    beta: float = key(
        8.0,
        "weight β of NCKD; differs from pair to pair, see configs/cifar100.py",
        NOT_NEGATIVE,
        source="mdistiller",
    )
    temperature: float = key(4.0, "T", POSITIVE, source="mdistiller")
    warmup_epochs: float = key(
        20.0, "epochs over which the distillation terms are ramped up from 0", NOT_NEGATIVE, source="mdistiller"
    )
    warmup_form: str = key(
        "step",
        "what the ramp counts: step = fractions of epochs | epoch_from_0 (DGKD repository) | epoch_from_1 (mdistiller)",
        one_of(*RAMP_FORMS),
    )
    standardize: bool = key(
        False,
        "standardise the logits of both over the classes first (arXiv:2403.01427); then ∇TCKD and ∇NCKD in dgkd are "
        "with respect to the standardised ones",
        SWITCH,
    )

    @property
    def teacher_temperature(self) -> float | None:
        return None if self.standardize else self.temperature

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        logits = self.prepared(student_logits), self.prepared(teacher_logits), labels
        return {
            "tckd": losses.tckd(*logits, temperature=self.temperature),
            "nckd": losses.nckd(*logits, temperature=self.temperature),
        }

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        return self.ce_weight * terms["ce"] + self.ramp(progress) * self.distillation(terms)

    def prepared(self, logits: jax.Array) -> jax.Array:
        return losses.standardize(logits) if self.standardize else logits

    def ramp(self, progress: Progress) -> jax.Array:
        return ramp(progress, warmup_epochs=self.warmup_epochs, form=self.warmup_form)

    def distillation(self, terms: dict[str, jax.Array]) -> jax.Array:
        return self.alpha * terms["tckd"] + self.beta * terms["nckd"]
