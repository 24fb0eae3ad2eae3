"""Writes metrics to `metrics.jsonl`, one object per line, and to TensorBoard. Only the first process writes."""

import json
import logging
import math
from typing import Any

import jax
from etils import epath

from dgkd_jax.errors import StorageFailure
from dgkd_jax.runs.files import write_whole


class MetricWriter:
    """Writes to a work directory and continues the files that are there.

    Args:
        workdir: an existing folder.
        step: that the run continues from. Later lines were written before an interruption and will be written again;
            they are dropped, so an interrupted run leaves the same file as an uninterrupted one.
        evaluation_due: the run continues with the evaluation of `step`; that step's evaluation lines are dropped too.
    """

    def __init__(self, workdir: epath.Path, *, step: int, evaluation_due: bool = False):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from clu import metric_writers  # imports TensorFlow

        self._workdir = workdir
        path = workdir / "metrics.jsonl"

        def is_kept(line: dict[str, Any]) -> bool:
            return line["step"] < step or (line["step"] == step and (line["kind"] == "train" or not evaluation_due))

        kept = [line for line in _lines(path) if is_kept(line)] if step else []
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._tensorboard = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, error, _) -> None:
        if not self._active:
            return
        try:
            self._file.close()
            self._tensorboard.close()
        except Exception as failure:
            if error is None:
                raise self._not_written(failure) from failure
            logging.error("%s", self._not_written(failure))  # the error already being raised matters more

    def write(self, step: int, kind: str, values: dict[str, float | list[float]]) -> None:
        """Write a line {"step", "kind", …values}, and a TensorBoard scalar `kind/name` for each value but lists.

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
            self._tensorboard.write_scalars(step, scalars)
        except Exception as failure:  # TensorBoard's thread wraps errors in its own types
            raise self._not_written(failure) from failure

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
