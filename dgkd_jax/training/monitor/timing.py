"""Measures where a run's time goes: the lines of kind "goodput" in metrics.jsonl."""

import contextlib
import time
from collections.abc import Iterator

# `training` is the time not measured as another part: dispatching steps and waiting for the device.
PARTS = ("init", "compile", "data", "training", "save", "evaluation")


class Timing:
    """Seconds spent per part, since this object was created."""

    def __init__(self):
        self._began = time.monotonic()
        self._before = dict.fromkeys(PARTS, 0.0)
        self._seconds = {part: 0.0 for part in PARTS if part != "training"}

    def go_on_from(self, seconds: dict[str, float]) -> None:
        """Add the seconds that the run had spent before it was interrupted: a result of `seconds`, or {}."""
        self._before |= seconds

    @contextlib.contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the time of the `with` block as `part` (not `training`), also if it raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[part] += time.monotonic() - start

    def seconds(self) -> dict[str, float]:
        """Part -> seconds; `training` is the rest of the time."""
        training = time.monotonic() - self._began - sum(self._seconds.values())
        now = self._seconds | {"training": training}
        return {part: self._before[part] + now[part] for part in PARTS}


def summary(seconds: dict[str, float]) -> str:
    """One line: each part's seconds and share."""
    total = sum(seconds.values()) or 1.0
    return ", ".join(f"{part} {seconds[part]:.1f} s ({100 * seconds[part] / total:.0f} %)" for part in PARTS)
