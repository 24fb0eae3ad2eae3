"""Reads the work directories of runs, finished or not.

Nothing here fails on a damaged file: what cannot be read is left out and listed in the run's `notes`. What is read has
the types and ranges that its users expect, however the file looks, and takes a bounded amount of memory.
"""

import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils import epath

from dgkd_jax.evaluate import collapse
from dgkd_jax.losses import comparison
from dgkd_jax.methods import TERM_UNITS
from dgkd_jax.runs.config import flatten

# The metrics that the page shows, besides accuracy by class.
METRICS = frozenset({"loss", "accuracy", "grad_norm", "ce", "ece", "kl"}).union(
    collapse.NAMES, comparison.TERMS, comparison.DIAGNOSTICS, TERM_UNITS
)
MOST_LINES = 3000  # of a kind that are kept of a run; a figure draws fewer points
_LONGEST_LINE = 4 << 20  # bytes
_LARGEST = 1e100  # a number beyond it is damage; float32 ends at 3e38
_LAST_STEP = 10**15
_DEEPEST = 20  # nesting of JSON
_LONGEST_TEXT = 500  # characters of a text from a file, such as an error
_MOST_CLASSES = 1_000_000
_MOST_ARRAY_BYTES = 4 << 30  # of one evaluation
_MOST_PARTS = 20  # of the time spent


class Evaluation(NamedTuple):
    """An evaluation of a run: `evaluations/NAME.json` and the path of its arrays.

    Attributes:
        summary: content of the JSON.
        arrays: path of `NAME.npz`.
    """

    summary: dict[str, Any]
    arrays: epath.Path


class Run(NamedTuple):
    """One work directory.

    Attributes:
        path: of the folder.
        config: the resolved config, dotted key -> value.
        result: content of result.json; None: the run is not finished.
        train, evals: lines of metrics.jsonl of this kind, by ascending step.
        goodput: seconds by part, from the newest line of this kind; None: there is none.
        evaluations: name of the set -> evaluation.
        failure: content of failure.json; None: there is none.
        notes: what could not be read, one sentence each.
        epochs_logged: rows of log.csv; None: there is none.
        thinned: lines of metrics.jsonl that were readable but not kept, because there are more than `MOST_LINES`.
    """

    path: epath.Path
    config: dict[str, Any]
    result: dict[str, Any] | None
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    goodput: dict[str, float] | None
    evaluations: dict[str, Evaluation]
    failure: str | None
    notes: tuple[str, ...]
    epochs_logged: int | None = None
    thinned: int = 0

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def method(self) -> str:
        """The method that the student was trained by."""
        return str(self.config.get("method", "?"))

    @property
    def seed(self) -> int | None:
        """Seed of the student."""
        return self.config.get("seed")

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return self.result is not None

    @property
    def at_the_end(self) -> bool:
        """Whether the run is finished, or is a teacher's own, which has no result.json, and has all its epochs."""
        return self.finished or (is_teacher(self) and self.epochs_logged == self.epochs is not None)

    @property
    def epochs(self) -> int | None:
        """The number of epochs of the configuration; None if it has none."""
        epochs = self.config.get("epochs")
        return epochs if _is_count(epochs) and epochs else None

    @property
    def steps_per_epoch(self) -> int | None:
        """Known of a run with all its epochs, and of one whose evaluations are whole epochs apart; else None."""
        every, evaluated = self.config.get("eval_every"), self.evals[0]["step"] if self.evals else 0
        if self.epochs is None:
            return None
        if self.at_the_end:
            steps, rest = divmod(self.last_step, self.epochs)
        elif is_number(every) and every >= 1 and every == int(every):
            steps, rest = divmod(evaluated, int(every))
        else:
            return None
        if rest or not steps or steps * self.epochs < self.last_step:
            return None
        return steps

    @property
    def last_step(self) -> int:
        """The newest step with a log line; 0: none."""
        return max((lines[-1]["step"] for lines in (self.train, self.evals) if lines), default=0)

    @property
    def data_set(self) -> str:
        """What the run was trained and evaluated on; accuracies are comparable only within one data set."""
        name = str(self.config.get("data.name", "unknown data"))
        if name == "image_folder":
            name += f" {self.config.get('data.manual_dir', '')}".rstrip()
        return f"{name} (generated images)" if self.config.get("data.mock") else name


def find(paths: Iterable[str | epath.Path]) -> tuple[list[epath.Path], list[str]]:
    """Find the work directories in the given folders and below them; each once.

    Returns:
        Folders with a config.json and a metrics.jsonl; and one sentence about each unusable path.
    """
    found: dict[str, epath.Path] = {}
    notes = []
    for given in map(epath.Path, paths):
        if not given.is_dir():
            notes.append(f"{given}: no such folder")
            continue
        before = len(notes)
        here = {_real(path): path for path in _beneath(given, notes)}
        if not here and len(notes) == before:
            notes.append(f"{given}: no work directory (config.json and metrics.jsonl) in it or beneath it")
        found |= {key: path for key, path in here.items() if key not in found}
    return list(found.values()), notes


def _beneath(folder: epath.Path, notes: list[str], seen: set[str] | None = None) -> Iterator[epath.Path]:
    seen = set() if seen is None else seen
    if _real(folder) in seen:  # by a link
        return
    seen.add(_real(folder))
    has_config, has_metrics = ((folder / name).exists() for name in ("config.json", "metrics.jsonl"))
    if has_config and has_metrics:
        yield folder
        return
    if has_config or has_metrics:
        notes.append(f"{folder}: left out, it has no {'metrics.jsonl' if has_config else 'config.json'}")
        return
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        notes.append(f"{folder}: left out, it cannot be read: {error.strerror or error}")
        return
    for child in children:
        if child.is_dir() and not child.name.startswith("."):
            yield from _beneath(child, notes, seen)


def _real(folder: epath.Path) -> str:
    """The folder without links: epath's own `resolve` leaves them. What is no local path stays unique."""
    return os.path.realpath(folder)


def read(path: epath.Path) -> Run | None:
    """Read a work directory; None if its config is unreadable."""
    notes: list[str] = []
    config = _json(path / "config.json", notes)
    if config is None:
        return None
    train, evals, goodput, thinned = _lines(path / "metrics.jsonl", notes)
    failure = _json(path / "failure.json", notes) if (path / "failure.json").exists() else None
    result = _json(path / "result.json", notes) if (path / "result.json").exists() else None
    return Run(
        path=path,
        config=_config(config, path, notes),
        result=None if result is None else _result(result, path, notes),
        train=train,
        evals=evals,
        goodput=goodput,
        evaluations=_evaluations(path / "evaluations", notes),
        failure=None if failure is None else _text(failure.get("error", "it failed")),
        notes=tuple(notes),
        epochs_logged=_epochs_logged(path / "log.csv"),
        thinned=thinned,
    )


def _json(path: epath.Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # ValueError: not JSON, or not text
        content = None
    if not isinstance(content, dict) or _is_deep(content):
        notes.append(f"{path}: unreadable")
        return None
    return content


def _is_deep(content: Any) -> bool:
    """Whether it is nested deeper than `_DEEPEST`, which would be too deep for what follows."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for each in level if isinstance(each, (dict, list))
                 for inner in (each.values() if isinstance(each, dict) else each)]  # fmt: skip
    return bool(level)


def _text(value: Any) -> str:
    """A text of bounded length without control characters and halves of characters."""
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
    return "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)


def _config(content: dict[str, Any], path: epath.Path, notes: list[str]) -> dict[str, Any]:
    """Flat; `method` is a text, `seed` a whole number or absent."""
    config = flatten(content)
    if not isinstance(config.get("method", ""), str):
        notes.append(f"{path}/config.json: the method is no name: {_text(config['method'])}")
        config["method"] = _text(config["method"])
    if "seed" in config and not _is_count(config["seed"]):
        notes.append(f"{path}/config.json: the seed is no whole number: {_text(config['seed'])}")
        del config["seed"]
    return config


def _result(content: dict[str, Any], path: epath.Path, notes: list[str]) -> dict[str, Any]:
    """Its sections of texts and numbers, accuracies in [0, 1]."""

    def is_fine(key: str, value: Any) -> bool:
        if key.endswith("accuracy"):
            return is_number(value) and 0 <= value <= 1
        if key in ("examples", "parameters"):
            return _is_count(value) and value > 0
        return isinstance(value, str) or (is_number(value) and value >= 0)

    kept = {}
    for name in ("evaluation", "teacher", "student"):
        section = content.get(name)
        if section is None:
            continue
        if not isinstance(section, dict):
            notes.append(f"{path}/result.json: {name} is left out, it is no section")
            continue
        kept[name] = {key: value for key, value in section.items() if is_fine(key, value)}
        # A null is a number that was not finite, or that there is none of.
        strange = [_text(key) for key, value in section.items() if key not in kept[name] and value is not None]
        if strange:
            notes.append(f"{path}/result.json: {name} is left out in part, it is damaged: {', '.join(strange[:4])}")
    return kept


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


def _lines(
    path: epath.Path, notes: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, float] | None, int]:
    """The lines of kind "train" and "eval", the newest of kind "goodput", and how many were not kept."""
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
                    goodput = {_text(key): numbers[key] for key in list(numbers)[: _MOST_PARTS + 1] if key != "step"}
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
    return train, evals, goodput, thinned


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
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str) or not _is_count(line.get("step")):
        return None
    return line if line["step"] <= _LAST_STEP else None


def _by_class(values: Any) -> list[float | None] | None:
    """Accuracies by class; None: unusable."""
    if not isinstance(values, list) or not values:
        return None
    fine = all(value is None or (is_number(value) and 0 <= value <= 1) for value in values)
    return values if fine and any(value is not None for value in values) else None


def _epochs_logged(path: epath.Path) -> int | None:
    try:
        rows = path.read_text().splitlines()[1:]
        return int(rows[-1].split(",")[0]) if rows else None
    except (OSError, ValueError):
        return None


def _evaluations(folder: epath.Path, notes: list[str]) -> dict[str, Evaluation]:
    if not folder.is_dir():
        return {}
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = _json(path, notes)
        if content is None or not isinstance(content.get("student"), dict):
            continue
        summary: dict[str, Any] = {"data": _text(content.get("data", path.stem))}
        for who in ("student", "teacher"):
            section = content.get(who) if isinstance(content.get(who), dict) else {}
            accuracy = section.get("accuracy")
            summary[who] = {"accuracy": accuracy} if is_number(accuracy) and 0 <= accuracy <= 1 else {}
            if "accuracy" in section and not summary[who] and accuracy is not None:
                notes.append(f"{path}: the accuracy of the {who} is left out, it is damaged: {_text(accuracy)[:40]}")
        summary["restricted_to_classes"] = bool(content.get("restricted_to_classes"))
        found[summary["data"]] = Evaluation(summary, folder / f"{path.stem}.npz")
    return found


def arrays(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """The arrays of an evaluation, those that are as they should be; {} if they are not readable.

    By example: `label` and predictions are classes, confidences in [0, 1]. Of some examples: `embedding` `[_, 2]` and
    `embedding_label`.
    """
    try:
        content = io.BytesIO(evaluation.arrays.read_bytes())
        with zipfile.ZipFile(content) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_ARRAY_BYTES:
                return {}
        with np.load(content) as stored:
            found = dict(stored)
    except Exception:  # a damaged archive makes zipfile and numpy raise anything
        return {}
    rows = {name: array for name, array in found.items() if array.ndim == 1 and array.dtype.kind in "iuf"}
    fine = {name: array for name, array in rows.items() if _is_as_it_should_be(name, array)}
    embedding, of = found.get("embedding"), fine.pop("embedding_label", None)
    examples = len(fine["label"]) if "label" in fine else 0
    fine = {name: array for name, array in fine.items() if len(array) == examples > 0}
    if (
        of is not None
        and embedding is not None
        and embedding.dtype.kind == "f"
        and embedding.shape == (len(of), 2)
        and bool((np.abs(embedding.astype(np.float64)) < _LARGEST).all())
    ):
        fine |= {"embedding": embedding, "embedding_label": of}
    for who, needed in (("student", "student"), ("teacher", "student"), ("teacher", "teacher")):
        if f"{needed}_prediction" not in fine:  # without it nothing else of this network is of use
            fine = {name: array for name, array in fine.items() if not name.startswith(f"{who}_")}
    return fine if "student_prediction" in fine or "embedding" in fine else {}


def _is_as_it_should_be(name: str, array: np.ndarray) -> bool:
    if name == "label" or name.endswith(("_prediction", "_label")):
        return array.dtype.kind in "iu" and bool(((array >= 0) & (array < _MOST_CLASSES)).all())
    if name.endswith("_confidence"):
        return array.dtype.kind == "f" and bool(((array >= 0) & (array <= 1)).all())
    return True


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: Any) -> bool:
    """Whether it is a finite number, below 1e100; NaN and infinities were logged as null."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def curve(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values `[points]` of one metric, where it was logged and is finite."""
    points = [(line["step"], line[key]) for line in lines if is_number(line.get(key))]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def last(run: Run, key: str) -> float | None:
    """A metric at the run's last evaluation; None if it is missing or not finite."""
    value = run.evals[-1].get(key) if run.evals else None
    return float(value) if is_number(value) else None


def of_student(run: Run, key: str) -> float | None:
    """A figure of the student in result.json, for example `last_accuracy`."""
    value = ((run.result or {}).get("student") or {}).get(key)
    return float(value) if is_number(value) else None


def is_teacher(run: Run) -> bool:
    """Whether this is a teacher's own run."""
    return run.name == "teacher" or run.name.startswith("teacher-")
