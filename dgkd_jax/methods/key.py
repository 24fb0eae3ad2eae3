"""A key of the config: its default, meaning, allowed values and source.

A method's keys are dataclass fields made with `key`; all other keys are `Key`s in `runs/default.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class Rule(NamedTuple):
    """Allowed values of a key. `accepts` tests a value, `allowed` describes them to the user, `choices` lists names."""

    accepts: Callable[[Any], bool]
    allowed: str
    choices: tuple[str, ...] = ()


class Key(NamedTuple):
    """One key of the config.

    Attributes:
        default: of the key's type.
        meaning: with its unit.
        rule: the allowed values.
        source: where the default comes from; "" if it is our own.
        decides: what changes with the value. "run": the results, so a run cannot continue with another value.
            "teacher": only the teacher, which is compared by its weights. "nothing": no result.
    """

    default: Any
    meaning: str
    rule: Rule
    source: str = ""
    decides: Literal["run", "teacher", "nothing"] = "run"


def one_of(*choices: str) -> Rule:
    return Rule(lambda value: value in choices, "one of " + ", ".join(repr(c) for c in choices), choices)


def number(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Rule:
    """A number in an interval; `open_low` and `open_high` exclude that end."""
    left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"

    def accepts(value) -> bool:
        if isinstance(value, bool) or not math.isfinite(value):
            return False
        return (value > low if open_low else value >= low) and (value < high if open_high else value <= high)

    return Rule(accepts, f"a number in {left}{low:g}, {high:g}{right}")


def whole_number(low: int, high: float = math.inf) -> Rule:
    """An integer in [low, high]."""
    right = ")" if high == math.inf else "]"
    return Rule(
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"a whole number in [{low:g}, {high:g}{right}",
    )


def numbers(allowed: str, accepts: Callable[[tuple], bool]) -> Rule:
    """A tuple of finite numbers for which `accepts` is true."""

    def is_tuple_of_numbers(value) -> bool:
        return isinstance(value, tuple) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)

    return Rule(lambda value: is_tuple_of_numbers(value) and accepts(value), allowed)


FINITE = number(-math.inf)
POSITIVE = number(0, open_low=True)
NOT_NEGATIVE = number(0)
COUNT = whole_number(1)
COUNT_OR_NONE = whole_number(0)
TEXT = Rule(lambda value: isinstance(value, str), "text")
SWITCH = Rule(lambda value: isinstance(value, bool), "True or False")


def key(default: Any, meaning: str, rule: Rule, *, source: str = "") -> Any:
    """A dataclass field that is also a key of the config."""
    return dataclasses.field(default=default, metadata={"key": Key(default, meaning, rule, source)})


def keys_of(method: type) -> dict[str, Key]:
    """The keys of a method's own section, by field name."""
    return {f.name: f.metadata["key"] for f in dataclasses.fields(method) if "key" in f.metadata}
