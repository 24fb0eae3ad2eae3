"""Does the runs of a study, several in parallel; each teacher and each cache is made first, by one run."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dgkd_jax.errors import BadInput, NumericFailure, Preempted, StorageFailure
from dgkd_jax.methods import needs_teacher
from dgkd_jax.study import rows
from dgkd_jax.study.plan import Run


def outcome(run: Run) -> dict[str, Any]:
    """The outcome of a run, read from its files: a row of the table."""
    row = {"regime": run.regime, "arm": run.arm, "seed": run.seed, "workdir": run.workdir}
    result, failure = Path(run.workdir, "result.json"), Path(run.workdir, "failure.json")
    if result.exists():
        content = json.loads(result.read_text())
        about = {key: content[key] for key in ("student", "teacher", "machine")}
        return row | {"status": "done", "last": _last_evaluation(run.workdir)} | about
    if failure.exists():
        return row | {"status": "failed"} | json.loads(failure.read_text())
    return row | {"status": "not run"}


def _last_evaluation(workdir: str) -> dict[str, Any]:
    lines = map(json.loads, Path(workdir, "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "eval"][-1]


def _work(runs: list[Run], stopped: Any, make_caches: bool, cores: set[int]) -> None:
    """A worker process: does its runs one after the other, until all are done, or the study is stopped or killed.

    A failure is written to a file next to the run's other files.

    Args:
        make_caches: make the caches that the runs name; no two workers may have runs with the same cache.
        cores: to run on; empty: any.
    """
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX starts one thread per core
    from dgkd_jax.runs import launch
    from dgkd_jax.training import run as training
    from dgkd_jax.training.cached_logits.make import make

    def stop() -> bool:
        return stopped.is_set() or not multiprocessing.parent_process().is_alive()

    launch.set_up(runs[0].config)
    for run in runs:
        if stop():
            return
        failure = Path(run.workdir, "failure.json")
        try:
            if make_caches and run.config.teacher.cache:
                make(run.config, run.config.teacher.cache, stop=stop)
            training.run(run.config, run.workdir, stop=stop)
            failure.unlink(missing_ok=True)
        except Preempted:
            return
        except Exception as error:
            known = isinstance(error, (BadInput, NumericFailure, StorageFailure))
            message = str(error) if known else f"{type(error).__name__}: {error}"
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(json.dumps({"error": message}) + "\n")
            print(f"{run.workdir}: {message}", file=sys.stderr, flush=True)


def conduct(runs: list[Run], *, workers: int, kept: str = "") -> None:
    """Do all runs that are not finished.

    Args:
        workers: parallel processes; each compiles and reads the data for itself.
        kept: the study's file of rows; each run gets its row when it is done. "": none.

    Raises:
        Preempted: interrupted; the same call continues.
    """
    context = multiprocessing.get_context("spawn")
    stopped = context.Event()
    keep = _Keeper(kept, runs)
    keep()
    waiting = [run for run in runs if not keep.has(run) and outcome(run)["status"] != "done"]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already", file=sys.stderr, flush=True)
    try:
        for share, make_caches in _phases(waiting):
            _share_out(share, context, stopped, workers, make_caches, keep)
    except KeyboardInterrupt:
        stopped.set()
        print("interrupted; saving the runs (Ctrl-C again: end at once)", file=sys.stderr, flush=True)
        _wait_for_workers()
        raise Preempted("interrupted; the same command goes on from there") from None


def _wait_for_workers() -> None:
    """Wait until each worker has saved its run. At another Ctrl-C kill them; what follows their checkpoints is lost."""
    workers = multiprocessing.active_children()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        for worker in workers:
            worker.kill()


class _Keeper:
    """Writes the rows of finished runs that have none yet, each time it is called."""

    def __init__(self, path: str, runs: list[Run]):
        self._path = path
        there = rows.read(path) if path else []
        self._without = [run for run in runs if path and rows.find(there, run) is None]
        self._kept = {run.workdir for run in runs if path} - {run.workdir for run in self._without}

    def has(self, run: Run) -> bool:
        return run.workdir in self._kept

    def __call__(self) -> None:
        for run in list(self._without):
            found = outcome(run)
            if found["status"] == "done":
                rows.append(self._path, run, found)
                self._without.remove(run)
                self._kept.add(run.workdir)


def _phases(runs: list[Run]) -> list[tuple[list[Run], bool]]:
    """A list, in order, of (runs that may be done in parallel, whether they make the caches that they name).

    The first run that needs a teacher trains it alone; then the first run that needs a cache makes it alone.
    """
    trainers, others = _first_with(runs, lambda config: config.teacher.workdir)
    makers, rest = _first_with(
        others, lambda config: config.teacher.cache, but={run.config.teacher.cache for run in trainers}
    )
    return [(trainers, True), (makers, True), (rest, False)]


def _first_with(
    runs: list[Run], key: Callable[[ConfigDict], str], but: Iterable[str] = ()
) -> tuple[list[Run], list[Run]]:
    """The first run with a teacher for each value of `key`, except '' and those in `but`; and all other runs."""
    seen = {"", *but}
    first, rest = [], []
    for run in runs:
        new = needs_teacher(run.config.method) and key(run.config) not in seen
        (first if new else rest).append(run)
        if new:
            seen.add(key(run.config))
    return first, rest


def _share_out(
    runs: list[Run], context: Any, stopped: Any, workers: int, make_caches: bool, keep: Callable[[], None]
) -> None:
    """Give the runs to workers in turn; if a worker dies, another one does its remaining runs."""
    left = [runs[index::workers] for index in range(workers)]
    cores = _own_cores(workers)
    processes: dict[int, Any] = {}
    while True:
        for index, share in enumerate(left):
            process = processes.get(index)
            if process is not None and process.is_alive():
                continue
            if process is not None and process.exitcode:
                _note_death(share, process.exitcode)
            left[index] = [run for run in share if outcome(run)["status"] == "not run"] if process else share
            if left[index]:
                processes[index] = context.Process(target=_work, args=(left[index], stopped, make_caches, cores[index]))
                _start(processes[index])
        keep()
        if not any(process.is_alive() for process in processes.values()):
            return
        time.sleep(0.2)


def _start(process: Any) -> None:
    """Start a worker that Ctrl-C does not reach, not even while it imports: it is told to stop by an event."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()  # it inherits the mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _own_cores(workers: int) -> list[set[int]]:
    """An equal share of this process's cores per worker; empty sets if there are too few, or no such system call.

    If the threads of all workers ran on all cores, they would wait for each other.
    """
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(there[worker::workers]) if len(there) >= workers else set() for worker in range(workers)]


def _note_death(share: list[Run], exit_code: int) -> None:
    """Record a worker's death as the failure of its current run: the first one without an outcome."""
    for run in share:
        if outcome(run)["status"] == "not run":
            Path(run.workdir).mkdir(parents=True, exist_ok=True)
            Path(run.workdir, "failure.json").write_text(
                json.dumps({"error": f"its process ended with exit code {exit_code}"}) + "\n"
            )
            return
