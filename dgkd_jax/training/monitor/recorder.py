"""Records what the loop does: metrics on disk, the progress line, where the time went, the cost of a step."""

import contextlib
import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dgkd_jax.models.onednn import library as onednn
from dgkd_jax.runs.config import flatten
from dgkd_jax.runs.record import History
from dgkd_jax.training import parts
from dgkd_jax.training.build import Program
from dgkd_jax.training.monitor import cost, timing, trackers
from dgkd_jax.training.monitor.epoch_log import EpochLog
from dgkd_jax.training.monitor.metric_files import MetricWriter
from dgkd_jax.training.monitor.progress import ProgressLine
from dgkd_jax.training.monitor.watchdog import Watchdog


class Recorder(contextlib.ExitStack):
    """The loop reports to it; it has no influence on what the loop computes.

    Args:
        config: of the run.
        program: of the run.
        workdir: of the run.
        start: steps done.
        evaluation_due: the run continues with the evaluation of step `start`.
        spent: the time spent so far.
    """

    def __init__(
        self,
        config: ConfigDict,
        program: Program,
        workdir: epath.Path,
        *,
        start: int,
        evaluation_due: bool,
        spent: timing.Timing,
        which: str = "",
    ):
        super().__init__()
        self.spent = spent
        self._config, self._program = config, program
        self._cost: dict[str, float] = {}
        self._loss = "loss not fetched yet"
        first = start if evaluation_due else start + 1
        self._epochs = EpochLog(workdir, epoch=(first - 1) // program.steps_per_epoch)
        with spent.measure("init"):
            beside = trackers.begin(config.writers, workdir, project=config.name, config=flatten(config))
            self._metrics = self.enter_context(
                MetricWriter(workdir, step=start, evaluation_due=evaluation_due, trackers=beside)
            )
        self._progress = self.enter_context(
            ProgressLine(
                f"{config.student.model} by {config.method}{which and f' ({which})'}",
                start=start,
                total=program.total_steps,
                steps_per_epoch=program.steps_per_epoch,
                batch_size=config.batch_size,
            )
        )
        self._watchdog = self.enter_context(Watchdog(config.watchdog_s))
        self.began, self._logged_step, self._logged_time = time.monotonic(), start, time.monotonic()

    def note(self, text: str | None) -> None:
        """Print a line for the user, if there is one."""
        if text:
            self._progress.note(text)

    def compiled(self, step: int, program: jax.stages.Compiled) -> None:
        """The train step was compiled: log its cost once."""
        platform = self._program.platform
        is_loop = parts.is_loop(self._config.accumulate, platform)
        self._cost = cost.cost(program, platform=platform, is_loop=is_loop)
        self._metrics.write(step, "goodput", self.spent.seconds() | self._cost)
        self.note(f"ready for the first step: {timing.summary(self.spent.seconds())}")
        self.note(f"one step, on each device: {cost.summary(self._cost)}")
        self.note(onednn.status() if platform == "cpu" else None)

    def stepped(self, step: int, *, count: int) -> None:
        """`count` steps were dispatched; `step` is the last of them."""
        self._progress.advance(count)
        self.alive()

    def alive(self) -> None:
        """Work was done: restart the watchdog's timer."""
        self._watchdog.beat()

    def logged(self, step: int, values: dict[str, float]) -> None:
        """Write the means of the steps since the last call."""
        now = time.monotonic()
        rate = (step - self._logged_step) / (now - self._logged_time)
        values["learning_rate"] = float(self._program.learning_rate(step - 1))
        values["images_per_second"] = rate * self._config.batch_size
        values |= cost.utilisation(self._cost, rate)
        self._logged_step, self._logged_time = step, now
        self._metrics.write(step, "train", values)

    def loss(self, step: int, loss: float) -> None:
        """The loss was fetched: show it on the progress line."""
        self._loss = f"loss {loss:.4f}"
        self._progress.metrics(step, self._loss)

    def evaluated(self, step: int, values: dict[str, Any], *, split: str) -> None:
        self._metrics.write(step, "eval", values)
        self._metrics.write(step, "goodput", self.spent.seconds())
        self._progress.line(step, f"{self._loss}, {split} accuracy {100 * values['accuracy']:.2f} %")

    def epoch_ended(self, epoch: int, means: dict[str, float], *, test_accuracy: float | None) -> None:
        """Add a row to log.csv. `epoch` counts from 1; `test_accuracy` is None if the last step was not evaluated."""
        self._epochs.write(epoch, means, test_accuracy=test_accuracy)

    def ended(self, history: History) -> None:
        """The last step was done, and evaluated."""
        found = {name: getattr(history, name) for name in ("last_accuracy", "best_accuracy", "best_step")}
        self._metrics.ended(found)
        self.note(f"where the time went: {timing.summary(self.spent.seconds())}")
