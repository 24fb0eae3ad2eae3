"""RLD: the teacher's confidence at the target, and its ranking of the classes below the target only."""

import dataclasses
from typing import ClassVar

import jax

from dgkd_jax import losses
from dgkd_jax.methods.key import NOT_NEGATIVE, POSITIVE, key
from dgkd_jax.methods.progress import Progress, ramp


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLD:
    """ce_weight·CE + ramp·(α·τ²·KL of confidences + β·T²·KL below the target). Sun et al., ICCV 2025, arXiv:2408.07703.

    The teacher's confidence is its highest probability, the student's that of the target, both at τ; the second KL is
    over the classes that the teacher ranks below the target. Labels must be class indices. The defaults are those of
    the authors' code (zju-SWJ/RLD, mdistiller/engine/cfg.py), which sets no others for any pair of CIFAR-100.
    """

    name: ClassVar[str] = "rld"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    needs_class_indices: ClassVar[bool] = True
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {"rld": "α·τ²·KL + β·T²·KL [nats]"}
    teacher_temperature: ClassVar[None] = None  # ranks every class

    ce_weight: float = key(1.0, "weight of the cross-entropy", NOT_NEGATIVE, source="RLD")
    alpha: float = key(1.0, "weight α of the confidences", NOT_NEGATIVE, source="RLD")
    beta: float = key(8.0, "weight β of the classes below the target", NOT_NEGATIVE, source="RLD")
    temperature: float = key(4.0, "T of the classes below the target", POSITIVE, source="RLD")
    alpha_temperature: float = key(1.0, "τ of the confidences", POSITIVE, source="RLD")
    warmup_epochs: float = key(
        20.0, "epochs over which the distillation is ramped up from 0", NOT_NEGATIVE, source="RLD"
    )

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        found = losses.rld(
            student_logits,
            teacher_logits,
            labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            alpha_temperature=self.alpha_temperature,
        )
        return {"rld": found}

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        ramped = ramp(progress, warmup_epochs=self.warmup_epochs, form="step")
        return self.ce_weight * terms["ce"] + ramped * terms["rld"]
