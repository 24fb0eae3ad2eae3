"""A user's function of logits and labels as a method."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from dgkd_jax import own_code
from dgkd_jax.errors import BadInput
from dgkd_jax.methods.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The mean over the batch of a user's function, and nothing else: the cross-entropy is not added.

    Attributes:
        name: by which a run is recognised.
        function: (student's logits `[batch, classes]`, teacher's logits, labels int `[batch]`, or `[batch, classes]`
            where images are mixed) -> float `[batch]`.
    """

    name: str
    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    needs_class_indices: ClassVar[bool] = False
    needs_class_order: ClassVar[bool] = False
    needs_whole_batch: ClassVar[bool] = False
    needs_parameter_gradients: ClassVar[bool] = False
    term_units: ClassVar[dict[str, str]] = {"objective": "objective"}
    teacher_temperature: ClassVar[None] = None

    def terms(self, student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        return {"objective": self.function(student_logits, teacher_logits, labels)}

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        return terms["objective"]


def objective(function: Callable[..., jax.Array], *, num_classes: int) -> Objective:
    """The method of a user's function, after a try on shapes; computes nothing.

    Raises:
        BadInput: the function fails, or does not return one number for each example.
    """
    logits = jax.ShapeDtypeStruct((3, num_classes), jnp.float32)
    name = getattr(function, "__name__", type(function).__name__)
    try:
        program, found = jax.make_jaxpr(function, return_shape=True)(
            logits, logits, jax.ShapeDtypeStruct((3,), jnp.int32)
        )
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        raise BadInput(
            f"the method {name} fails on (student_logits, teacher_logits, labels): {type(error).__name__}: {why}"
        ) from error
    if getattr(found, "shape", None) != (3,):
        raise BadInput(
            f"the method {name} returns {_told(found)} for a batch of 3; it must return one number for each, [batch]"
        )
    return Objective(name=own_code.name_of_given(name, str(program)), function=function)


def _told(found: object) -> str:
    return f"an array of shape {found.shape}" if hasattr(found, "shape") else f"a {type(found).__name__}"
