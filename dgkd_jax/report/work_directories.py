"""Reads the work directories of runs, finished or not, and groups the runs that differ only in their seed.

Nothing here fails on a damaged file: what cannot be read is left out and listed in the run's `notes`.
"""

import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dgkd_jax.methods import METHODS
from dgkd_jax.runs.config import deciding, flatten

_SEED_SUFFIX = re.compile(r"[-_]?seed[-_]?\d+$")


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


class Group(NamedTuple):
    """Runs that differ only in `seed`.

    Attributes:
        label: short and unique among the groups.
        runs: by ascending seed; each seed once.
    """

    label: str
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        """The finished runs: only these are averaged."""
        return [run for run in self.runs if run.finished]


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
        here = {str(path.resolve()): path for path in _beneath(given, notes)}
        if not here and len(notes) == before:
            notes.append(f"{given}: no work directory (config.json and metrics.jsonl) in it or beneath it")
        found |= {key: path for key, path in here.items() if key not in found}
    return list(found.values()), notes


def _beneath(folder: epath.Path, notes: list[str]) -> Iterator[epath.Path]:
    has_config, has_metrics = ((folder / name).exists() for name in ("config.json", "metrics.jsonl"))
    if has_config and has_metrics:
        yield folder
        return
    if has_config or has_metrics:
        notes.append(f"{folder}: left out, it has no {'metrics.jsonl' if has_config else 'config.json'}")
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            yield from _beneath(child, notes)


def read(path: epath.Path) -> Run | None:
    """Read a work directory; None if its config is unreadable."""
    notes: list[str] = []
    config = _json(path / "config.json", notes)
    if config is None:
        return None
    lines = _lines(path / "metrics.jsonl", notes)
    of_kind = {kind: {line["step"]: line for line in lines if line["kind"] == kind} for kind in ("train", "eval")}
    goodput = [line for line in lines if line["kind"] == "goodput"]
    failure = _json(path / "failure.json", notes) if (path / "failure.json").exists() else None
    return Run(
        path=path,
        config=flatten(config),
        result=_json(path / "result.json", notes) if (path / "result.json").exists() else None,
        train=[line for _, line in sorted(of_kind["train"].items())],
        evals=[line for _, line in sorted(of_kind["eval"].items())],
        goodput={key: value for key, value in goodput[-1].items() if is_number(value) and key != "step"}
        if goodput
        else None,
        evaluations=_evaluations(path / "evaluations", notes),
        failure=None if failure is None else str(failure.get("error", "it failed")),
        notes=tuple(notes),
    )


def _json(path: epath.Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # ValueError: not JSON, or not text
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path}: unreadable")
        return None
    return content


def _lines(path: epath.Path, notes: list[str]) -> list[dict[str, Any]]:
    kept, damaged = [], 0
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
            if not (isinstance(line["step"], int) and isinstance(line["kind"], str)):
                raise TypeError
            kept.append(line)
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        notes.append(f"{path}: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    return kept


def _evaluations(folder: epath.Path, notes: list[str]) -> dict[str, Evaluation]:
    if not folder.is_dir():
        return {}
    found = {}
    for path in sorted(folder.glob("*.json")):
        summary = _json(path, notes)
        if summary is not None and isinstance(summary.get("student"), dict):
            found[str(summary.get("data", path.stem))] = Evaluation(summary, folder / f"{path.stem}.npz")
    return found


def arrays(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """The arrays of an evaluation; {} if they are not readable."""
    try:
        with np.load(io.BytesIO(evaluation.arrays.read_bytes())) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}


def is_number(value: Any) -> bool:
    """Whether it is a finite number; NaN and infinities were logged as null."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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


def settings(run: Run) -> dict[str, Any]:
    """The keys that decide the run and its teacher, without the seed."""
    return {key: value for key, value in deciding(run.config, "run", "teacher").items() if key != "seed"}


def differing(of: Sequence[dict[str, Any]]) -> list[str]:
    """The keys with more than one value among these settings, in order of first appearance."""
    keys = dict.fromkeys(key for each in of for key in each)
    return [key for key in keys if len({_canonical(each.get(key, _ABSENT)) for each in of}) > 1]


_ABSENT = "(absent)"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def group(found: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Group the runs of one data set by their settings; and a sentence for each run left out as a duplicate.

    Of two runs with the same settings and seed, the finished one is kept, else the first.
    """
    members: dict[str, dict[Any, Run]] = {}
    notes = []
    for run in found:
        seeds = members.setdefault(_canonical(settings(run)), {})
        if run.seed not in seeds:
            seeds[run.seed] = run
            continue
        kept, dropped = seeds[run.seed], run
        if run.finished and not kept.finished:
            kept, dropped = dropped, kept
        seeds[run.seed] = kept
        notes.append(f"{dropped.path}: left out, {kept.path} has the same configuration and seed")
    ordered = [sorted(seeds.values(), key=lambda run: (run.seed is None, run.seed)) for seeds in members.values()]
    rank = {method: place for place, method in enumerate(METHODS)}
    groups = [Group(label, runs) for label, runs in zip(_labels(ordered), ordered, strict=True)]

    def order(each: Group) -> tuple[Any, ...]:
        folder = each.label.rpartition("/")[0]
        return folder, rank.get(each.runs[0].method, len(rank)), _natural(each.label)

    return sorted(groups, key=order), notes


def _natural(label: str) -> list[Any]:
    """Sort key: numbers inside a label are sorted by value."""
    parts = re.split(r"(-?\d+(?:\.\d+)?)", label)
    return [(1, float(part), "") if place % 2 else (0, 0.0, part) for place, part in enumerate(parts)]


def _labels(groups: list[list[Run]]) -> list[str]:
    """The folders' names without the seed, with the parent's if necessary; else the method and what differs."""
    stems = [{(run.path.parent.name, _SEED_SUFFIX.sub("", run.name)) for run in runs} for runs in groups]
    if all(len(each) == 1 and next(iter(each))[1] for each in stems):
        pairs = [next(iter(each)) for each in stems]
        for labels in ([stem for _, stem in pairs], [f"{parent}/{stem}" for parent, stem in pairs]):
            if len(set(labels)) == len(labels):
                return labels
    labels = []
    for runs in groups:
        same_method = [settings(other[0]) for other in groups if other[0].method == runs[0].method]
        own = settings(runs[0])
        parts = [f"{key.split('.')[-1]} {own.get(key, '–')}" for key in differing(same_method)]
        labels.append(", ".join([runs[0].method, *parts]))
    return [f"{label} ({place})" if labels.count(label) > 1 else label for place, label in enumerate(labels, 1)]
