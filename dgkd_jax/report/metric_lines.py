"""Reads metrics.jsonl: the lines that the page shows, in a bounded amount of memory however long the file is."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from dgkd_jax.evaluate import collapse
from dgkd_jax.losses import comparison
from dgkd_jax.methods import TERM_UNITS
from dgkd_jax.report.untrusted import is_count, is_number, text_of

# The metrics that the page shows, besides accuracy by class.
METRICS = frozenset({"loss", "accuracy", "grad_norm", "ce", "ece", "kl"}).union(
    collapse.NAMES, comparison.TERMS, comparison.DIAGNOSTICS, TERM_UNITS
)
MOST_LINES = 3000  # of a kind that are kept of a run; a figure draws fewer points
_LONGEST_LINE = 4 << 20  # bytes
_LAST_STEP = 10**15
_MOST_PARTS = 20  # of the time spent


class Lines(NamedTuple):
    """What is kept of a file.

    Attributes:
        train, evals: lines of this kind, by ascending step.
        goodput: seconds by part, from the newest line of this kind; None: there is none.
        thinned: lines that were readable but not kept, because there are more than `MOST_LINES`.
    """

    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    goodput: dict[str, float] | None
    thinned: int


def read(path: epath.Path, notes: list[str]) -> Lines:
    """The lines of a file; what cannot be read is left out, of which a sentence is added to `notes`."""
    kept = {"train": _Thinned(), "eval": _Thinned()}
    goodput, classes, damaged = None, None, 0
    try:
        with path.open("rb") as file:
            for text in _texts(file):
                line = _line(text)
                if line is None:
                    damaged += 1
                elif line["kind"] == "goodput":
                    numbers = {key: value for key, value in line.items() if is_number(value) and 0 <= value < 1e10}
                    goodput = {text_of(key): numbers[key] for key in list(numbers)[: _MOST_PARTS + 1] if key != "step"}
                elif line["kind"] in kept:
                    lean = {key: value for key, value in line.items() if key in METRICS and is_number(value)}
                    kept[line["kind"]].add({"step": line["step"], **lean})
                    by_class = _by_class(line.get("class_accuracy")) if line["kind"] == "eval" else None
                    if by_class and (classes is None or line["step"] >= classes[0]):
                        classes = line["step"], by_class
    except OSError as error:
        notes.append(f"{path}: unreadable: {error.strerror or error}")
    if damaged:
        notes.append(f"{path}: {damaged:,} damaged line{'s' if damaged > 1 else ''} left out")
    train, evals = kept["train"].lines(), kept["eval"].lines()
    if classes and evals and evals[-1]["step"] == classes[0]:
        evals[-1] = evals[-1] | {"class_accuracy": classes[1]}
    repeated = sum(each.seen for each in kept.values()) - len(train) - len(evals)
    thinned = repeated if max(each.seen for each in kept.values()) > MOST_LINES - 2 else 0
    return Lines(train, evals, goodput, thinned)


class _Thinned:
    """Lines by step, of which at most `MOST_LINES` are kept, evenly, and always the first, the last and the best."""

    def __init__(self):
        self.seen, self._every, self._kept = 0, 1, {}
        self._last: dict[str, Any] | None = None
        self._best: dict[str, Any] | None = None

    def add(self, line: dict[str, Any]) -> None:
        step = line["step"]
        if step in self._kept or self.seen % self._every == 0:  # a step that was repeated after an interruption
            self._kept[step] = line
        self.seen += 1
        if self._last is None or step >= self._last["step"]:
            self._last = line
        if self._best is None or line.get("accuracy", -1) > self._best.get("accuracy", -1):
            self._best = line
        if len(self._kept) > MOST_LINES - 2:
            self._kept = {step: self._kept[step] for step in sorted(self._kept)[::2]}
            self._every *= 2

    def lines(self) -> list[dict[str, Any]]:
        """By ascending step."""
        for line in (self._best, self._last):
            if line is not None:
                self._kept.setdefault(line["step"], line)
        return [self._kept[step] for step in sorted(self._kept)]


def _texts(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of a line that is too long its beginning, which is no whole line."""
    while text := file.readline(_LONGEST_LINE):
        yield text
        while not text.endswith(b"\n") and len(text) == _LONGEST_LINE:
            text = file.readline(_LONGEST_LINE)


def _line(text: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl, None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str) or not is_count(line.get("step")):
        return None
    return line if line["step"] <= _LAST_STEP else None


def _by_class(values: Any) -> list[float | None] | None:
    """Accuracies by class; None: unusable."""
    if not isinstance(values, list) or not values:
        return None
    fine = all(value is None or (is_number(value) and 0 <= value <= 1) for value in values)
    return values if fine and any(value is not None for value in values) else None
