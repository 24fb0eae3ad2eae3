"""Telling how far a run is: a live line on a terminal, plain lines in a log."""

import sys
import time

import jax
from tqdm import tqdm

# In a log, a line between evaluations at most this often.
LOG_SECONDS = 30.0


class Progress:
    """Progress of one run over its steps, on stderr, by the first process only.

    Args:
        title: what is running.
        start: steps done before.
        total: steps in all.
        steps_per_epoch: for the count of epochs.
        batch_size: for the rate in images per second.
    """

    def __init__(self, title: str, *, start: int, total: int, steps_per_epoch: int, batch_size: int):
        self._title, self._total, self._steps_per_epoch, self._batch_size = title, total, steps_per_epoch, batch_size
        self._active = jax.process_index() == 0
        self._live = self._active and sys.stderr.isatty()
        self._last_step, self._last_time = start, time.monotonic()
        self._compiling = True
        self._bar = tqdm(
            desc=title,
            initial=start,
            total=total,
            unit=" steps",
            disable=not self._live,
            dynamic_ncols=True,
            leave=False,
            file=sys.stderr,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def advance(self, steps: int) -> None:
        """So many more steps were dispatched."""
        if self._compiling:  # the first call returns when the step is compiled: that time says nothing of the rate
            self._compiling = False
            self._last_step, self._last_time = self._last_step + steps, time.monotonic()
        self._bar.update(steps)

    def metrics(self, step: int, text: str) -> None:
        """Metrics were fetched: beside the live line, or now and then in the log."""
        if self._live:
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._last_time > LOG_SECONDS:
            self.line(step, text)

    def line(self, step: int, text: str) -> None:
        """A line that stays; its rate is that since the last such line, its time left follows from this rate."""
        if not self._active:
            return
        now = time.monotonic()
        rate = (step - self._last_step) / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        left = f", {duration((self._total - step) / rate)} left" if rate and step < self._total else ""
        epochs = f"epoch {step / self._steps_per_epoch:.4g}/{self._total / self._steps_per_epoch:.4g}"
        self.note(f"{epochs}, {text}, {rate * self._batch_size:,.0f} images/s{left}")

    def note(self, text: str) -> None:
        """A line that stays, about the run and not its progress."""
        if not self._active:
            return
        message = f"{self._title}: {text}"
        if self._live:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as minutes:seconds, or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
