"""Shows the progress of a run: a live line on a terminal, plain lines in a log."""

import sys
import time

import jax
from tqdm import tqdm

from dgkd_jax.runs.record import duration

# In a log, at most one line per this many seconds between evaluations.
LOG_SECONDS = 30.0


# The bar takes what is left of the terminal's width; where nothing is left, the end is cut off, not wrapped.
_LIVE = "{desc}: {percentage:.0f} %, step {n_fmt}/{total_fmt}, {remaining} left{postfix} {bar}"


class ProgressLine:
    """Progress of one run over its steps, on stderr; the first process only.

    Args:
        title: what is running.
        start: steps done before.
        total: steps in all.
        steps_per_epoch: to show epochs.
        batch_size: to show images per second.
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
            bar_format=_LIVE,
            disable=not self._live,
            dynamic_ncols=True,
            leave=False,
            file=sys.stderr,
        )

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def advance(self, steps: int) -> None:
        """This many more steps were dispatched."""
        if self._compiling:  # the first call includes compilation: not part of the rate
            self._compiling = False
            self._last_step, self._last_time = self._last_step + steps, time.monotonic()
        self._bar.update(steps)

    def metrics(self, step: int, text: str) -> None:
        """Show metrics: next to the live line, or in the log if the last line is `LOG_SECONDS` old."""
        if self._live:
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._last_time > LOG_SECONDS:
            self.line(step, text)

    def line(self, step: int, text: str) -> None:
        """Print a permanent line with the rate since the last such line and the time left at that rate."""
        if not self._active:
            return
        now = time.monotonic()
        rate = (step - self._last_step) / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        # The live line shows the time left already, from a rate of its own.
        told = self._live or not rate or step >= self._total
        left = "" if told else f", {duration((self._total - step) / rate)} left"
        epochs = f"epoch {step / self._steps_per_epoch:.4g}/{self._total / self._steps_per_epoch:.4g}"
        self.note(f"{epochs}, {text}, {rate * self._batch_size:,.0f} images/s{left}")

    def note(self, text: str) -> None:
        """Print a permanent line that is not about progress."""
        if not self._active:
            return
        message = f"{self._title}: {text}"
        if self._live:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)
