"""Where metrics go: `metrics.jsonl`, one object a line, and TensorBoard events. Only the first process writes."""

import json
import math
from typing import Any

import jax
from etils import epath


class MetricWriter:
    """Writes to a work directory, continuing what is there.

    Args:
        workdir: an existing folder.
        step: the step that the run continues from. Lines beyond it, written before an interruption and about to be
            written again, are dropped, so that an interrupted run leaves the same file as an uninterrupted one.
    """

    def __init__(self, workdir: epath.Path, *, step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from clu import metric_writers  # imports TensorFlow

        path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if line["step"] <= step] if step else []
        temporary = workdir / "metrics.jsonl.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.rename(path)
        self._file = path.open("a")
        self._tensorboard = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        if self._active:
            self._file.close()
            self._tensorboard.close()

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line {"step", "kind", …values}, and one TensorBoard scalar `kind/name` for each value.

        Args:
            step: number of steps done.
            kind: "train" (means since the last such line) or "eval".
            values: NaN and infinities are written as null in the JSON.
        """
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        self._file.flush()
        self._tensorboard.write_scalars(step, {f"{kind}/{name}": value for name, value in values.items()})


def _lines(path: epath.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the process died while it wrote this line
    return lines
