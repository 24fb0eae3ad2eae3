"""Writes metrics to `metrics.jsonl`, one object per line, and to trackers. Only the first process writes."""

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from dgkd_jax.errors import StorageFailure
from dgkd_jax.runs.files import write_whole
from dgkd_jax.training.monitor.trackers import Tracker


class MetricWriter:
    """Writes to a work directory and continues the files that are there.

    Args:
        workdir: an existing folder.
        step: that the run continues from. Later lines were written before an interruption and will be written again;
            they are dropped, so an interrupted run leaves the same file as an uninterrupted one.
        evaluation_due: the run continues with the evaluation of `step`; that step's evaluation lines are dropped too.
        trackers: also get each value but lists, as `kind/name`. One that goes on with an earlier record does not get
            the dropped lines again.
    """

    def __init__(
        self, workdir: epath.Path, *, step: int, evaluation_due: bool = False, trackers: Sequence[Tracker] = ()
    ):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._workdir, self._trackers = workdir, trackers
        self._results: dict[str, float] | None = None
        path = workdir / "metrics.jsonl"

        def is_kept(line: dict[str, Any]) -> bool:
            return line["step"] < step or (line["step"] == step and (line["kind"] == "train" or not evaluation_due))

        before = _lines(path)
        kept = [line for line in before if is_kept(line)] if step else []
        self._sent = {(line["step"], line["kind"]) for line in before if line not in kept}
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, error, _) -> None:
        if not self._active:
            return
        try:
            self._file.close()
            for tracker in self._trackers:
                tracker.close(self._results)
        except Exception as failure:
            if error is None:
                raise self._not_written(failure) from failure
            logging.error("%s", self._not_written(failure))  # the error already being raised matters more

    def write(self, step: int, kind: str, values: dict[str, float | list[float]]) -> None:
        """Write a line {"step", "kind", …values}, and give the scalars to the trackers.

        Args:
            step: number of steps done.
            kind: "train" (means since the last such line), "eval", or "goodput" (seconds by part; the first line after
                a start also has the compiled step's cost).
            values: NaN and infinities become null in the JSON.
        """
        if not self._active:
            return
        finite = {name: _finite(value) for name, value in values.items()}
        scalars = {f"{kind}/{name}": value for name, value in values.items() if not isinstance(value, list)}
        try:
            self._file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
            self._file.flush()
            for tracker in self._trackers:
                if not (tracker.resumed and (step, kind) in self._sent):
                    tracker.write(step, scalars)
        except Exception as failure:  # TensorBoard's thread wraps errors in its own types
            raise self._not_written(failure) from failure

    def ended(self, results: dict[str, float]) -> None:
        """The run came to its end with these results, which the trackers get when this is closed."""
        if self._active:
            self._results = results

    def _not_written(self, failure: Exception) -> StorageFailure:
        return StorageFailure(
            f"metrics could not be written in {self._workdir}: {' '.join(str(failure).split())[:300]}. "
            "Make room or mend the storage, then give the same command again; it goes on from the newest checkpoint."
        )


def _finite(value: float | list[float]) -> float | list[float | None] | None:
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value if math.isfinite(value) else None


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the process ended while writing this line
    return lines
