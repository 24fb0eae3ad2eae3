"""Ends a process that hangs: a lost peer, a device or a file system that no longer answers."""

import faulthandler
import sys
import time


class Watchdog:
    """Prints the stacks of all threads and exits with code 1 if no `beat` came for some time; then retry.

    The interpreter's own timer (faulthandler) does this; it needs no lock, so it works while foreign code hangs.

    Args:
        seconds: the longest time between beats; 0: no watchdog.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._armed = 0.0

    def __enter__(self) -> "Watchdog":
        self.beat()
        return self

    def __exit__(self, *_) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Work was done: restart the timer."""
        now = time.monotonic()
        # Setting the timer takes tens of microseconds: too long to do it at every step of a small network.
        if self._seconds and now - self._armed > min(0.1 * self._seconds, 1.0):
            self._armed = now
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)
