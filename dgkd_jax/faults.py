"""Faults on demand, so that tests can prove what a run survives. Does nothing unless DGKD_FAULT is set; only tests do.

DGKD_FAULT=ACTION@PLACE:NUMBER, several separated by commas: at the NUMBER-th time that a process comes by PLACE
(`step`: when that step was dispatched) it kills itself (`kill`), gets a signal (`sigterm`, `sigint`) or hangs (`hang`).
Only the process DGKD_FAULT_PROCESS (default 0) is hit. Places: step, eval (a batch of it), save (a checkpoint is being
written), compile.
"""

import os
import signal
import time
from collections import Counter

_SIGNALS = {"kill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigint": signal.SIGINT}
_visits: Counter[str] = Counter()


def at(place: str, number: int | None = None) -> None:
    """Let a fault happen here, if one is due.

    Args:
        place: the name of this place in the program.
        number: which time this is; None: counted here, from 1.
    """
    wanted = os.environ.get("DGKD_FAULT")
    if not wanted or os.environ.get("JAX_PROCESS_ID", "0") != os.environ.get("DGKD_FAULT_PROCESS", "0"):
        return
    _visits[place] += 1
    here = f"{place}:{_visits[place] if number is None else number}"
    for fault in wanted.split(","):
        action, due = fault.split("@")
        if due != here:
            continue
        if action == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), _SIGNALS[action])
        time.sleep(2.0)  # the signal's thread takes it before the program goes on, also on a busy machine


def planned(place: str) -> list[int]:
    """The numbers of this place at which a fault is due."""
    faults = os.environ.get("DGKD_FAULT")
    due = [fault.split("@")[1].split(":") for fault in faults.split(",")] if faults else []
    return [int(number) for where, number in due if where == place]
