"""The methods, one file each: the loss, its section of the config, and its metrics.

To add a method, write one file with a frozen dataclass that follows `Method`, and add a row to `METHODS`. Its fields
made with `key` are its config section; the command line, the checks, `--help`, reports and studies read them there.
A user's own needs no row: `--config.method="my_package.my_module:MyMethod(weight=2.0)"`.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import jax

from dgkd_jax import own_code
from dgkd_jax.errors import BadInput
from dgkd_jax.methods.ce import CE
from dgkd_jax.methods.dgkd import DGKD
from dgkd_jax.methods.dist import DIST
from dgkd_jax.methods.dkd import DKD
from dgkd_jax.methods.gdkd import GDKD
from dgkd_jax.methods.kd import KD
from dgkd_jax.methods.key import Key, keys_of
from dgkd_jax.methods.logit_mse import LogitMSE
from dgkd_jax.methods.nkd import NKD
from dgkd_jax.methods.objective import Objective
from dgkd_jax.methods.progress import Progress
from dgkd_jax.methods.rld import RLD
from dgkd_jax.methods.wttm import WTTM


class Method(Protocol):
    """The objective of a training. A frozen dataclass, so hashable and static under jit.

    Attributes:
        name: in the config.
        needs_teacher: if False, `teacher_logits` is None.
        needs_labels: whether `terms` reads the labels.
        needs_class_indices: whether labels must be class indices, not the distributions of mixed images.
        needs_class_order: whether renumbering the classes changes the loss.
        needs_whole_batch: whether the loss of a batch is not the mean of the losses of its equal parts: a term is no
            mean over examples, or `loss` is not linear in the terms.
        needs_parameter_gradients: if True, `terms` also gets `pull_back`: cotangents of the logits -> gradients of the
            parameters.
        term_units: name of each of `terms` -> label of an axis that shows it. The metrics have the same names.
        teacher_temperature: temperature at which it reads the teacher's probabilities; None: it reads the logits, or
            has no teacher.
    """

    name: ClassVar[str]
    needs_teacher: ClassVar[bool]
    needs_labels: ClassVar[bool]
    needs_class_indices: bool
    needs_class_order: bool
    needs_whole_batch: bool
    needs_parameter_gradients: bool
    term_units: ClassVar[dict[str, str]]
    teacher_temperature: float | None

    def terms(
        self, student_logits: jax.Array, teacher_logits: jax.Array | None, labels: jax.Array
    ) -> dict[str, jax.Array]:
        """The terms of the loss apart from the cross-entropy: arrays `[batch]`, or scalars for the whole batch.

        Args:
            student_logits: float `[batch, classes]`.
            teacher_logits: the same shape; no gradient flows into it.
            labels: int `[batch]`, or distributions, float `[batch, classes]`, unless `needs_class_indices`.
        """

    def loss(self, terms: dict[str, jax.Array], progress: Progress) -> jax.Array:
        """The scalar to minimise, from the batch means of the terms and of the cross-entropy, `ce`."""


METHODS: dict[str, type[Method]] = {
    "ce": CE,
    "kd": KD,
    "dkd": DKD,
    "dgkd": DGKD,
    "logit_mse": LogitMSE,
    "nkd": NKD,
    "dist": DIST,
    "wttm": WTTM,
    "rld": RLD,
    "gdkd": GDKD,
}


# Name of each term of each method -> label of an axis that shows it.
TERM_UNITS: dict[str, str] = {
    term: unit for method in (*METHODS.values(), Objective) for term, unit in method.term_units.items()
}


def names_of(config: Any) -> tuple[str, ...]:
    """The methods that `config.method` names: one, several with commas between them, or all."""
    if own_code.is_own(config.method):
        return (config.method,)
    return tuple(METHODS) if config.method == "all" else tuple(config.method.split(","))


def needs_teacher(name: str) -> bool:
    """Whether this has a teacher; true for several, an import path, and a name that this version does not know."""
    return name not in METHODS or METHODS[name].needs_teacher


def sections_of(method: type[Method]) -> tuple[str, ...]:
    """The config sections that a method reads: its own and those of the methods among its fields."""
    inner = [section for field in _methods_within(method) for section in sections_of(field.type)]
    return (*inner, *((method.name,) if keys_of(method) else ()))


def section_keys() -> dict[str, Key]:
    """Every key of every method's section: `section.key` -> `Key`."""
    return {f"{name}.{key}": value for name, method in METHODS.items() for key, value in keys_of(method).items()}


def from_config(config: Any) -> Method:
    """The method that `config.method` names, with the values of its sections.

    Args:
        config: validated; its method is a name of `METHODS` or an import path.

    Raises:
        BadInput: an import path leads to no method.
    """
    return _build(METHODS[config.method], config) if config.method in METHODS else own(config.method)


def own(text: str) -> Method:
    """A user's own method by its import path.

    Raises:
        BadInput: there is none.
    """
    found = own_code.load(text, key="method")
    if isinstance(found.value, type):
        method = found.called(key="method")
    elif found.arguments is None:
        method = found.value
    else:
        raise BadInput(f"config.method={text!r}: only a class takes arguments")
    return checked(method, called=f"config.method={text!r}")


def checked(method: Any, *, called: str) -> Method:
    """A user's own method, found to have the shape of `Method`.

    Raises:
        BadInput: it has not, or cannot be hashed; the message begins with `called`.
    """
    absent = [name for name in (*Method.__annotations__, "terms", "loss") if not hasattr(method, name)]
    if absent:
        raise BadInput(f"{called} is no method, it lacks {', '.join(absent)}; dgkd_jax/methods/kd.py is an example")
    try:
        hash(method)
    except TypeError as error:
        raise BadInput(f"{called} cannot be hashed ({error}); make it a dataclass with frozen=True") from error
    return method


def _build(method: type[Method], config: Any) -> Method:
    own = {key: config[method.name][key] for key in keys_of(method)}
    inner = {field.name: _build(field.type, config) for field in _methods_within(method)}
    return method(**own, **inner)


def _methods_within(method: type[Method]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(method) if field.type in METHODS.values()]
