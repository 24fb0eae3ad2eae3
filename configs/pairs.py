"""Reads a pair of networks from the argument after a config's name: `configs/cifar100.py:TEACHER,STUDENT`."""

import re
from typing import Any, NamedTuple

from dgkd_jax import models
from dgkd_jax.errors import BadInput, did_you_mean

_SYMBOLS = {"beta": "β", "learning_rate": "learning rate", "gdkd": "GDKD's w1 and w2"}


class Pair(NamedTuple):
    """Two networks, and what they change in the common recipe.

    Attributes:
        teacher, student: names of `models.NAMES`.
        recipe: the changes; of a pair that is not published, those of the nearest one that is.
        note: where the recipe comes from, a line for the user; "" for a published pair.
    """

    teacher: str
    student: str
    recipe: dict[str, Any]
    note: str


def choose(argument: str | None, published: dict[str, dict[str, Any]], *, default: str, file: str) -> Pair:
    """The pair that the argument names.

    Args:
        argument: "TEACHER,STUDENT", any two names of `models.NAMES`, or None for `default`.
        published: "TEACHER,STUDENT" -> its changes to the common recipe.
        default: the pair to use without an argument.
        file: the config, for messages.

    Raises:
        BadInput: not two names, or a name that no network has.
    """
    pair = default if argument is None else argument.replace(" ", "")
    names = pair.split(",")
    if len(names) != 2:
        raise BadInput(f"{file}:{argument}: a pair is TEACHER,STUDENT, such as {file}:{default}")
    for name in names:
        if name not in models.NAMES:
            hint = did_you_mean(name, models.NAMES, count=3) or "."
            raise BadInput(f"{file}:{argument}: no network {name!r}{hint} All names: dgkd_jax.models.NAMES")
    teacher, student = names
    if pair in published:
        return Pair(teacher, student, published[pair], "")
    near = nearest(teacher, student, published)
    recipe = published[near] if near else {}
    changes = ", ".join(f"{_SYMBOLS.get(key, key)} {_text(value)}" for key, value in recipe.items())
    taken = f"that of {near}" if near else "the one that its pairs have in common"
    note = f"{file}: no published recipe for {pair}; takes {taken}{changes and f': {changes}'}"
    return Pair(teacher, student, recipe, note)


def nearest(teacher: str, student: str, published: dict[str, dict[str, Any]]) -> str | None:
    """The published pair with the student most like this one and, of several, the most similar teacher.

    Two names are most alike if equal, then if they differ in numbers only (resnet20, resnet8), then if they begin with
    the same letters (resnet20, resnet8x4). None: no student is like this one. A teacher alone does not make a pair
    near, because what the recipes change suits a student.
    """

    def likeness(pair: str) -> tuple[int, int]:
        other_teacher, other_student = pair.split(",")
        return _likeness(student, other_student), _likeness(teacher, other_teacher)

    best = max(published, key=likeness)  # the first of equals
    return best if likeness(best)[0] else None


def image_side(*names: str) -> int:
    """The largest number of pixels that a network's name ends in, as in vit_tiny_patch16_224; 0 where none does."""
    return max(int(found[1]) if (found := re.search(r"_(\d{3})$", name)) else 0 for name in names)


def _likeness(one: str, other: str) -> int:
    alike = (one == other, _without_numbers(one) == _without_numbers(other), _letters(one) == _letters(other))
    return len(alike) - alike.index(True) if any(alike) else 0


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _letters(name: str) -> str:
    return re.match("[a-z]*", name)[0]


def _text(value: float | tuple[float, ...]) -> str:
    return " and ".join(f"{number:g}" for number in (value if isinstance(value, tuple) else (value,)))
