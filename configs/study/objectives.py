"""Methods that only the studies use, by import path: forms that test what the coupling is good for."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dgkd_jax import losses
from dgkd_jax.methods import DKD, Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogDKD:
    """CE + weight·log(α·TCKD + β·NCKD + κ): the batch's DKD with a gradient that does not fade as DKD becomes small.

    Its gradient is DKD's divided by DKD, so that no part of the coupling is in it; what it gains, a weight that follows
    the loss gains too.
    """

    name: ClassVar[str] = "log_dkd"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = True
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = DKD.term_units

    weight: float = 1.0
    kappa: float = 1e-8
    alpha: float = 1.0
    beta: float = 2.0
    temperature: float = 4.0
    warmup_epochs: float = 2.0

    @property
    def of_dkd(self) -> DKD:
        return DKD(alpha=self.alpha, beta=self.beta, temperature=self.temperature, warmup_epochs=self.warmup_epochs)

    @property
    def teacher_temperature(self) -> float:
        return self.temperature

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        return self.of_dkd.terms(student_logits, teacher_logits, labels)

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        logarithm = jnp.log(self.of_dkd.distillation(terms) + self.kappa)
        return terms["ce"] + self.of_dkd.ramp(progress) * self.weight * logarithm


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoupledKD:
    """ce_weight·CE + weight·KD − ε·G: the coupling of `per_sample` added to plain KD, which the author did not try."""

    name: ClassVar[str] = "coupled_kd"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {"kd": "T²·KL(teacher ‖ student) [nats]", "coupling": "coupling term G"}

    epsilon: float = 0.1
    ce_weight: float = 0.1
    weight: float = 0.9
    temperature: float = 4.0

    @property
    def teacher_temperature(self) -> float:
        return self.temperature

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        at = {"temperature": self.temperature}
        return {
            "kd": losses.kd(student_logits, teacher_logits, **at),
            "coupling": losses.gradient_coupling(student_logits, teacher_logits, labels, convention="per_sample", **at),
        }

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        return self.ce_weight * terms["ce"] + self.weight * terms["kd"] - self.epsilon * terms["coupling"]
