"""DGKD: DKD with a coupling of the gradients of its two parts."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dgkd_jax import losses
from dgkd_jax.methods.dkd import DKD
from dgkd_jax.methods.key import COUNT_OR_NONE, FINITE, POSITIVE, key, one_of
from dgkd_jax.methods.progress import SCHEDULES, Progress, scheduled

# A function: cotangents of the logits `[batch, classes]` -> gradients of the parameters.
PullBack = Callable[[jax.Array], tuple[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DGKD:
    """ce_weight·CE + ramp·(α·TCKD + β·NCKD − ε·G); G couples ∇TCKD and ∇NCKD. Source: the DGKD blog and repository.

    The weights, T and the ramp are DKD's: both read the section `dkd`.
    """

    name: ClassVar[str] = "dgkd"
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    term_units: ClassVar[dict[str, str]] = {**DKD.term_units, "coupling": "coupling term G"}

    dkd: DKD = dataclasses.field(default_factory=DKD)
    epsilon: float = key(0.1, "weight ε of G: > 0 pushes the gradients apart, < 0 brings them together", FINITE)
    epsilon_end: float = key(0.0, "ε at the end of training where epsilon_schedule is not constant", FINITE)
    epsilon_schedule: str = key("constant", "how ε goes to epsilon_end", one_of(*SCHEDULES))
    convention: str = key(
        "per_sample",
        "definition of G: per_sample (blog) | literal, normalized (PyTorch code) | self_normalized (ours)",
        one_of(*losses.CONVENTIONS),
    )
    distance: str = key("mse", "between the two gradients", one_of(*losses.DISTANCES))
    wrt: str = key(
        "logits",
        "gradients with respect to the student's logits | own_logits: ∇TCKD to the target's, ∇NCKD to the others' | "
        "params: its parameters",
        one_of(*losses.WRT, "params"),
    )
    parity_batch: int = key(0, "batch size in `literal` and `normalized`; 0 = batch_size", COUNT_OR_NONE)
    kappa: float = key(1e-8, "guard κ of `self_normalized`", POSITIVE)

    @property
    def needs_class_order(self) -> bool:
        return self.distance == "wasserstein"

    @property
    def needs_whole_batch(self) -> bool:
        divides_by_batch = self.convention == "literal" and self.distance == "mse" and not self.parity_batch
        return self.wrt == "params" or divides_by_batch or self.convention in ("normalized", "self_normalized")

    @property
    def needs_class_indices(self) -> bool:
        return self.distance != "mse" or self.wrt == "params"

    @property
    def needs_parameter_gradients(self) -> bool:
        return self.wrt == "params"

    @property
    def teacher_temperature(self) -> float | None:
        return self.dkd.teacher_temperature

    def terms(
        self,
        student_logits: jax.Array,
        teacher_logits: jax.Array,
        labels: jax.Array,
        pull_back: PullBack | None = None,
    ) -> dict[str, jax.Array]:
        """`tckd` and `nckd` `[batch]`, and the scalar `coupling`; reads `pull_back` if `needs_parameter_gradients`."""
        if self.needs_parameter_gradients:
            terms = self.dkd.terms(student_logits, teacher_logits, labels)
            return terms | {"coupling": self._coupling_of_parameters(student_logits, teacher_logits, labels, pull_back)}
        found = losses.dgkd_terms(
            self.dkd.prepared(student_logits),
            self.dkd.prepared(teacher_logits),
            labels,
            temperature=self.dkd.temperature,
            convention=self.convention,
            distance=self.distance,
            wrt=self.wrt,
            parity_batch=self.parity_batch or None,
            kappa=self.kappa,
        )
        return found._asdict()

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        epsilon = scheduled(progress, start=self.epsilon, end=self.epsilon_end, schedule=self.epsilon_schedule)
        distillation = self.dkd.distillation(terms) - epsilon * terms["coupling"]
        return self.dkd.ce_weight * terms["ce"] + self.dkd.ramp(progress) * distillation

    def _coupling_of_parameters(self, student_logits, teacher_logits, labels, pull_back: PullBack) -> jax.Array:
        """The coupling of the gradients of the batch means of TCKD and NCKD with respect to all P parameters.

        A batch has one such pair of gradients, so it counts as one sample with P coordinates: `per_sample` is
        ‖∇TCKD − ∇NCKD‖², and `literal` divides that by P (`mse_loss`).
        """

        prepared, unprepared = jax.vjp(self.dkd.prepared, student_logits)
        inputs = prepared, self.dkd.prepared(teacher_logits), labels

        def gradient(logit_gradient) -> jax.Array:
            per_sample = logit_gradient(*inputs, temperature=self.dkd.temperature)
            (tree,) = pull_back(*unprepared(per_sample / len(labels)))
            return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])[None]

        return losses.coupling_of_gradients(
            gradient(losses.tckd_gradient),
            gradient(losses.nckd_gradient),
            convention=self.convention,
            distance=self.distance,
            parity_batch=1,
            kappa=self.kappa,
        )
