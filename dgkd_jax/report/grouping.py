"""Groups the runs that differ only in their seed, and names the groups by what differs among them."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dgkd_jax.methods import METHODS
from dgkd_jax.report.work_directories import Run
from dgkd_jax.runs.config import deciding

_SEED_SUFFIX = re.compile(r"[-_]?seed[-_]?\d+$")
_ABSENT = "(absent)"


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


def evaluate_command(runs: Sequence[Run], data: str) -> str:
    """A line for a shell that evaluates these runs on `data`."""
    if len(runs) == 1:
        return f"python -m dgkd_jax.evaluate --workdir={shlex.quote(str(runs[0].path))} --data={data}"
    paths = " ".join(shlex.quote(str(run.path)) for run in runs)
    return f'for run in {paths}; do python -m dgkd_jax.evaluate --workdir="$run" --data={data}; done'


def settings(run: Run) -> dict[str, Any]:
    """The keys that decide the run and its teacher, without the seed."""
    return {key: value for key, value in deciding(run.config, "run", "teacher").items() if key != "seed"}


def differing(of: Sequence[dict[str, Any]]) -> list[str]:
    """The keys with more than one value among these settings, in order of first appearance."""
    keys = dict.fromkeys(key for each in of for key in each)
    return [key for key in keys if len({_canonical(each.get(key, _ABSENT)) for each in of}) > 1]


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
    # A figure's legend leaves out what begins with an underscore.
    labels = [f" {label}" if label.startswith("_") else label for label in _labels(ordered)]
    groups = [Group(label, runs) for label, runs in zip(labels, ordered, strict=True)]

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
        parts = [f"{key.split('.')[-1]} {own.get(key, '–')!s:.24}" for key in differing(same_method)]
        labels.append(", ".join([runs[0].method[:60], *parts[:6]]))
    return [f"{label} ({place})" if labels.count(label) > 1 else label for place, label in enumerate(labels, 1)]
