"""Reads the work directories of runs, finished or not.

Nothing here fails on a damaged file: what cannot be read is left out and listed in the run's `notes`. What is read has
the types and ranges that its users expect, however the file looks, and takes a bounded amount of memory.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dgkd_jax.report import evaluations, metric_lines
from dgkd_jax.report.evaluations import Evaluation
from dgkd_jax.report.untrusted import is_count, is_number, json_object, text_of
from dgkd_jax.runs.config import flatten


class Run(NamedTuple):
    """One work directory.

    Attributes:
        path: of the folder.
        config: the resolved config, dotted key -> value.
        result: content of result.json; None: the run is not finished.
        train, evals, goodput, thinned: of metrics.jsonl, as in `metric_lines.Lines`.
        evaluations: name of the set -> evaluation.
        failure: content of failure.json; None: there is none.
        notes: what could not be read, one sentence each.
        epochs_logged: rows of log.csv; None: there is none.
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
        return epochs if is_count(epochs) and epochs else None

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
    config = json_object(path / "config.json", notes)
    if config is None:
        return None
    lines = metric_lines.read(path / "metrics.jsonl", notes)
    failure = json_object(path / "failure.json", notes) if (path / "failure.json").exists() else None
    result = json_object(path / "result.json", notes) if (path / "result.json").exists() else None
    return Run(
        path=path,
        config=_config(config, path, notes),
        result=None if result is None else _result(result, path, notes),
        train=lines.train,
        evals=lines.evals,
        goodput=lines.goodput,
        evaluations=evaluations.read(path / "evaluations", notes),
        failure=None if failure is None else text_of(failure.get("error", "it failed")),
        notes=tuple(notes),
        epochs_logged=_epochs_logged(path / "log.csv"),
        thinned=lines.thinned,
    )


def _config(content: dict[str, Any], path: epath.Path, notes: list[str]) -> dict[str, Any]:
    """Flat; `method` is a text, `seed` a whole number or absent."""
    config = flatten(content)
    if not isinstance(config.get("method", ""), str):
        notes.append(f"{path}/config.json: the method is no name: {text_of(config['method'])}")
        config["method"] = text_of(config["method"])
    if "seed" in config and not is_count(config["seed"]):
        notes.append(f"{path}/config.json: the seed is no whole number: {text_of(config['seed'])}")
        del config["seed"]
    return config


def _result(content: dict[str, Any], path: epath.Path, notes: list[str]) -> dict[str, Any]:
    """Its sections of texts and numbers, accuracies in [0, 1]."""

    def is_fine(key: str, value: Any) -> bool:
        if key.endswith("accuracy"):
            return is_number(value) and 0 <= value <= 1
        if key in ("examples", "parameters"):
            return is_count(value) and value > 0
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
        strange = [text_of(key) for key, value in section.items() if key not in kept[name] and value is not None]
        if strange:
            notes.append(f"{path}/result.json: {name} is left out in part, it is damaged: {', '.join(strange[:4])}")
    return kept


def _epochs_logged(path: epath.Path) -> int | None:
    try:
        rows = path.read_text().splitlines()[1:]
        return int(rows[-1].split(",")[0]) if rows else None
    except (OSError, ValueError):
        return None


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
