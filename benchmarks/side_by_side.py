"""Timing of alternatives in turns: what else the machine does falls on all of them alike."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_PAUSE = 0.05  # seconds between runs: OpenMP's threads go on spinning for a while after their work


def alternate(runs: Mapping[str, Callable[[], Any]], *, rounds: int, clock: str = "wall") -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times in turns, after one round that is not counted; every other round backwards.

    Args:
        runs: name -> a call that returns when its work is done (not when it is queued).
        rounds: at least 1.
        clock: "wall", or "cpu": of all of the process's threads. On a shared machine the latter, with the process held
            to one core (`taskset -c 0`), leaves out what others do; with more threads it counts their spinning too.
    """
    now = CLOCKS[clock]
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            time.sleep(_PAUSE)
            began = now()
            runs[name]()
            seconds[name].append(now() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, peer: str) -> tuple[float, float, float]:
    """How many times as quick `name` was as `peer`: the median over the rounds, lowest and highest of their ratios."""
    ratios = [theirs / ours for ours, theirs in zip(seconds[name], seconds[peer], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine(*packages: str) -> dict[str, Any]:
    """What the numbers depend on: processor, cores, load and the versions of packages."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def save(path: str, content: dict[str, Any]) -> None:
    """Writes the figures as JSON, where a path is given."""
    if path:
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
        print(f"figures in {path}")
