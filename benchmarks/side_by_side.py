"""Times alternatives in turns, so that what else the machine does falls on all of them alike; and sums times up."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OPENMP_PAUSE = 0.05  # seconds; for so long its threads spin after their work
_FEWEST = 3  # rounds that are made even if no time is left


def alternate(
    runs: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float = math.inf,
    clock: str = "wall",
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of each run, in turns, after one round that is not counted; every other round goes backwards.

    Args:
        runs: name -> a call that returns when its work is done (not when it is queued).
        rounds: at most, 1 or more.
        seconds: no new round begins after this, from the third on.
        clock: "wall", or "cpu": of all of the process's threads. On a shared machine the latter, with the process held
            to one core (`taskset -c 0`), leaves out what others do; with more threads it counts their spinning too.
        pause: seconds before each run.
    """
    now = CLOCKS[clock]
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= _FEWEST and time.perf_counter() - start > seconds:
            break
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            time.sleep(pause)
            began = now()
            runs[name]()
            times[name].append(now() - began)
    return times


def ratio(times: Mapping[str, list[float]], name: str, peer: str) -> tuple[float, float, float]:
    """How many times as quick `name` was as `peer`: the median over the rounds, lowest and highest of their ratios."""
    ratios = [theirs / ours for ours, theirs in zip(times[name], times[peer], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of one call on the wall and of the processor, of all threads: what the host does beside it is in them."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds, and how many were measured."""
    low, median, high = np.percentile(seconds, [25, 50, 75]) * 1e3
    return {"median_ms": median, "low_ms": low, "high_ms": high, "rounds": len(seconds)}


def span(found: dict[str, float] | None) -> str:
    """What `spread` found, for a table."""
    return "-" if found is None else f"{found['median_ms']:.4g} [{found['low_ms']:.4g}, {found['high_ms']:.4g}]"
