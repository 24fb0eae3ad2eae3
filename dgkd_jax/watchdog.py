"""Ends a process that no longer gets anywhere: a peer that is lost, a device or a file system that hangs."""

import faulthandler
import sys
import time


class Watchdog:
    """Prints the stacks of all threads and exits with 1 where no `beat` came for a while; retry then.

    The interpreter's own timer does this without taking part in any lock, so also while foreign code hangs.

    Args:
        seconds: the longest time between beats; 0 = no watchdog.
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
        """Something was finished."""
        now = time.monotonic()
        # Setting the timer takes tens of microseconds: not at every step of a small network.
        if self._seconds and now - self._armed > min(0.1 * self._seconds, 1.0):
            self._armed = now
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)
