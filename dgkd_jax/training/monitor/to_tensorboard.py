"""Metrics as TensorBoard's event files, in the work directory."""

from typing import Any

from clu import metric_writers  # imports TensorFlow


class ToTensorBoard:
    """A `trackers.Tracker`. Steps that are written again after an interruption are in two event files then."""

    resumed = False

    def __init__(self, folder: str):
        self._writer = metric_writers.AsyncWriter(metric_writers.SummaryWriter(folder))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._writer.write_scalars(step, scalars)

    def close(self, results: dict[str, float] | None) -> None:
        del results  # the last evaluation is there
        self._writer.close()


def begin(run: Any) -> tuple[ToTensorBoard, None]:
    """The tracker of a `trackers.Run`; its files need no identifier."""
    return ToTensorBoard(str(run.workdir)), None
