"""Many runs of one question: regimes × arms × seeds on one data set, each teacher trained once.

    python -m dgkd_jax.study --config=configs/study/mnist5k.py [--workers=N] [--seeds=0,1,…] [--regimes=NAME,…]
        [--arms=NAME,…] [--output=runs/study] [--cache-teacher]
    python -m dgkd_jax.study --config=FILE --config=FILE … --results=docs/results.md

Every run is a work directory of its own: the same command goes on where it was, runs only what is not finished, and
takes a run that fails for a row of its table, not for the end. It ends in the report page. With --cache-teacher the
arms of a seed share what their teacher says of the training images, which it is then asked but once; a run that began
without cannot go on with it. The second form runs nothing: it writes what all of these studies found, from the files
of their runs, as one document.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dgkd_jax import config as config_rules
from dgkd_jax import report
from dgkd_jax.analysis import results
from dgkd_jax.errors import BadInput, NumericFailure, Preempted, StorageFailure

OUTPUT = "runs/study"


class Study(NamedTuple):
    """What a file in configs/study defines as `get_study()`.

    Attributes:
        name: its folder is OUTPUT/NAME.
        about: a sentence or two for readers of the results: data, teacher, student.
        base: the configuration that everything overrides.
        seeds: of the students; the teachers keep the base's teacher.seed.
        arms: name -> overrides by dotted key; the methods that are compared.
        regimes: name -> (overrides, names of the arms that run in it).
        baseline: the arm that the others are compared with, by seed, within each regime.
    """

    name: str
    about: str
    base: ConfigDict
    seeds: tuple[int, ...]
    arms: dict[str, dict[str, Any]]
    regimes: dict[str, tuple[dict[str, Any], tuple[str, ...]]]
    baseline: str


class Run(NamedTuple):
    """One student of a study; its work directory is STUDY/REGIME/ARM-seedSEED."""

    regime: str
    arm: str
    seed: int
    config: ConfigDict
    workdir: str


def load(path: str) -> Study:
    """The study that a file defines.

    Raises:
        BadInput: no such file, or none that defines a study whose names fit each other.
    """
    if not os.path.isfile(path):
        raise BadInput(f"--config={path}: no such file")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # studies import their configurations
    spec = importlib.util.spec_from_file_location("study_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file's own code raises
        raise BadInput(f"--config={path}: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_study"):
        raise BadInput(f"--config={path}: no study, it defines no get_study(); see configs/study/mnist5k.py")
    study = module.get_study()
    for regime, (_, arms) in study.regimes.items():
        for arm in {*arms, study.baseline} - set(study.arms):
            raise BadInput(f"--config={path}: regime {regime!r} names the arm {arm!r}, which there is not")
    return study


def runs_of(
    study: Study, *, output: str, seeds: Iterable[int], regimes: Iterable[str], arms: Iterable[str]
) -> list[Run]:
    """The runs of a study, seed by seed, so that a study that is cut short has compared everything on fewer seeds.

    Raises:
        BadInput: an override that no configuration takes.
    """
    runs = []
    for seed in seeds:
        for regime in regimes:
            overrides, arms_there = study.regimes[regime]
            for arm in arms_there:
                if arm in arms:
                    runs.append(_run(study, output, regime, arm, seed, overrides | study.arms[arm]))
    return runs


def _run(study: Study, output: str, regime: str, arm: str, seed: int, overrides: dict[str, Any]) -> Run:
    config = study.base.copy_and_resolve_references()
    try:
        config.update_from_flattened_dict(overrides | {"seed": seed, "name": study.name})
        config_rules.validate(config)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"study {study.name}, regime {regime!r}, arm {arm!r}: {error}") from error
    folder = os.path.join(output, study.name)
    with config.unlocked():
        # Regimes that see other data or train otherwise have another teacher.
        identity = json.dumps(config_rules.identity(config_rules.of_teacher(config)), sort_keys=True)
        config.teacher.workdir = os.path.join(folder, f"teacher-{zlib.crc32(identity.encode()):08x}")
    return Run(regime, arm, seed, config, os.path.join(folder, regime, f"{arm}-seed{seed}"))


def with_cache(run: Run) -> Run:
    """The run with the folder of its teacher's logits, which runs share that have teacher, seed, images and epochs."""
    if run.config.method == "ce":
        return run
    config = run.config.copy_and_resolve_references()
    shared = [config_rules.of_batches(config), config.teacher.weights, config.epochs]
    name = zlib.crc32(json.dumps(shared, sort_keys=True).encode())
    config.teacher.cache = f"{config.teacher.workdir}-logits-{name:08x}"
    return run._replace(config=config)


def outcome(run: Run) -> dict[str, Any]:
    """A row: what became of a run, from the files that it left."""
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
    """One worker: its runs one after the other, until all are done or the study is ended, even by a kill.

    A failure is left as a file beside what the run had written.

    Args:
        make_caches: of the runs that name one; no two workers may have runs with the same.
        cores: that this worker keeps to; empty: it goes where the system puts it.
    """
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX makes its threads, as many as there are cores
    from dgkd_jax import cache_teacher, job, main

    def stop() -> bool:
        return stopped.is_set() or not multiprocessing.parent_process().is_alive()

    main.set_up(runs[0].config)
    for run in runs:
        if stop():
            return
        failure = Path(run.workdir, "failure.json")
        try:
            if make_caches and run.config.teacher.cache:
                cache_teacher.make(run.config, run.config.teacher.cache, stop=stop)
            job.run(run.config, run.workdir, stop=stop)
            failure.unlink(missing_ok=True)
        except Preempted:
            return
        except Exception as error:
            known = isinstance(error, (BadInput, NumericFailure, StorageFailure))
            message = str(error) if known else f"{type(error).__name__}: {error}"
            failure.parent.mkdir(parents=True, exist_ok=True)
            failure.write_text(json.dumps({"error": message}) + "\n")
            print(f"{run.workdir}: {message}", file=sys.stderr, flush=True)


def conduct(runs: list[Run], *, workers: int) -> None:
    """Do all runs that are not finished.

    Args:
        workers: processes that work beside each other; each compiles and reads the data for itself.

    Raises:
        Preempted: interrupted; the same call goes on.
    """
    context = multiprocessing.get_context("spawn")
    stopped = context.Event()
    waiting = [run for run in runs if outcome(run)["status"] != "done"]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already", file=sys.stderr, flush=True)
    try:
        for share, make_caches in _phases(waiting):
            _share_out(share, context, stopped, workers, make_caches)
    except KeyboardInterrupt:
        stopped.set()
        raise Preempted("interrupted; the same command goes on from there") from None


def _phases(runs: list[Run]) -> list[tuple[list[Run], bool]]:
    """(runs that may go on beside each other, whether they make the caches that they name), one after the other.

    A teacher is trained by the first run that needs it, alone; likewise its logits for a seed and its images.
    """
    trainers, others = _first_with(runs, lambda config: config.teacher.workdir)
    makers, rest = _first_with(
        others, lambda config: config.teacher.cache, but={run.config.teacher.cache for run in trainers}
    )
    return [(trainers, True), (makers, True), (rest, False)]


def _first_with(
    runs: list[Run], key: Callable[[ConfigDict], str], but: Iterable[str] = ()
) -> tuple[list[Run], list[Run]]:
    """The first run with a teacher of each value of `key` that is not '' or one of `but`; and all others."""
    seen = {"", *but}
    first, rest = [], []
    for run in runs:
        new = run.config.method != "ce" and key(run.config) not in seen
        (first if new else rest).append(run)
        if new:
            seen.add(key(run.config))
    return first, rest


def _share_out(runs: list[Run], context: Any, stopped: Any, workers: int, make_caches: bool) -> None:
    """Workers take the runs in turn; what a worker that died had left is done by the next one."""
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
                processes[index].start()
        if not any(process.is_alive() for process in processes.values()):
            return
        time.sleep(0.2)


def _own_cores(workers: int) -> list[set[int]]:
    """An even share of this process's cores for each worker; empty sets where there are fewer, or no such system call.

    Where the threads of all workers are on all cores, they wait for each other.
    """
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(there[worker::workers]) if len(there) >= workers else set() for worker in range(workers)]


def _note_death(share: list[Run], exit_code: int) -> None:
    """Blame the run that a dead worker was at: the first without an outcome."""
    for run in share:
        if outcome(run)["status"] == "not run":
            Path(run.workdir).mkdir(parents=True, exist_ok=True)
            Path(run.workdir, "failure.json").write_text(
                json.dumps({"error": f"its process ended with exit code {exit_code}"}) + "\n"
            )
            return


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    try:
        arguments = _arguments(argv)
        studies = [load(path) for path in arguments.config]
        if arguments.results:
            print(_write_results(arguments, studies))
            return 0
        (study,) = studies
        runs = _runs(arguments, study)
        if arguments.cache_teacher:
            runs = [with_cache(run) for run in runs]
        conduct(runs, workers=arguments.workers)
        rows = [outcome(run) for run in runs]
        print(f"\n{table(rows, baseline=study.baseline)}")
        done = [row["workdir"] for row in rows if row["status"] == "done"]
        if done:
            print(f"Pictures: {report.write(done, os.path.join(arguments.output, study.name, 'report'))}")
    except (BadInput, Preempted) as error:
        print(f"dgkd_jax: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _runs(arguments: argparse.Namespace, study: Study) -> list[Run]:
    return runs_of(
        study,
        output=arguments.output,
        seeds=map(int, _chosen("seeds", arguments.seeds, [str(seed) for seed in study.seeds], free=True)),
        regimes=_chosen("regimes", arguments.regimes, list(study.regimes)),
        arms=_chosen("arms", arguments.arms, list(study.arms)),
    )


def _write_results(arguments: argparse.Namespace, studies: list[Study]) -> str:
    found = []
    for path, study in zip(arguments.config, studies, strict=True):
        runs = _runs(arguments, study)
        rows = [outcome(run) for run in runs]
        if not any(row["status"] == "done" for row in rows):
            raise BadInput(f"no run of {path} is done beneath {arguments.output}; first run it, without --results")
        planned = [(run.regime, run.arm, run.seed) for run in runs]
        found.append(results.Found(study.name, path, study.about, study.baseline, planned, rows))
    given = {
        "seeds": arguments.seeds,
        "regimes": arguments.regimes,
        "arms": arguments.arms,
        "output": None if arguments.output == OUTPUT else arguments.output,
    }
    options = "".join(f" --{name}={shlex.quote(value)}" for name, value in given.items() if value is not None)
    options += " --cache-teacher" if arguments.cache_teacher else ""
    text = results.markdown(found, options=options, output=arguments.results)
    Path(arguments.results).write_text(text)
    return f"{arguments.results}: {sum(row['status'] == 'done' for study in found for row in study.rows)} runs"


def _arguments(argv: list[str]) -> argparse.Namespace:
    def refuse(message: str) -> None:
        raise BadInput(f"{message}; try: python -m dgkd_jax.study --help")

    parser = argparse.ArgumentParser(
        prog="python -m dgkd_jax.study", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.error = refuse  # argparse prints two lines, and exits from within
    parser.add_argument("--config", required=True, action="append", metavar="FILE", help="of configs/study")
    parser.add_argument("--results", metavar="FILE", help="run nothing, write what these studies found")
    parser.add_argument("--workers", type=int, default=1, help="runs beside each other; one per device or core")
    parser.add_argument("--seeds", help="comma-separated; default: the study's")
    parser.add_argument("--regimes", help="comma-separated; default: all")
    parser.add_argument("--arms", help="comma-separated; default: all")
    parser.add_argument("--cache-teacher", action="store_true", help="run each teacher once, for all arms of a seed")
    parser.add_argument("--output", default=OUTPUT, metavar="DIR", help=f"default {OUTPUT}")
    arguments = parser.parse_args(argv)
    if len(arguments.config) > 1 and not arguments.results:
        refuse("several --config go with --results only; run the studies one after the other")
    if arguments.workers < 1:
        refuse(f"--workers={arguments.workers}: 1 or more")
    return arguments


def _chosen(name: str, text: str | None, there: list[str], *, free: bool = False) -> list[str]:
    if text is None:
        return there
    chosen = text.split(",")
    for choice in chosen:
        if free and not choice.isdecimal():
            raise BadInput(f"--{name}={text}: {choice!r} is no number")
        if not free and choice not in there:
            raise BadInput(
                f"--{name}={text}: no {choice!r}{config_rules.nearest(choice, there)}; there are {', '.join(there)}"
            )
    return chosen


def table(rows: list[dict[str, Any]], *, baseline: str) -> str:
    """For the terminal: each arm's accuracy of the last epoch, mean ± standard deviation over its seeds."""
    import statistics

    lines = [f"{'regime':<12} {'arm':<28} {'last accuracy, %':<18} {'runs':>4}  failed"]
    for regime, arm in dict.fromkeys((row["regime"], row["arm"]) for row in rows):
        these = [row for row in rows if (row["regime"], row["arm"]) == (regime, arm)]
        values = [100 * row["student"]["last_accuracy"] for row in these if row["status"] == "done"]
        failed = sum(row["status"] == "failed" for row in these)
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        shown = f"{statistics.mean(values):.2f}{spread}" if values else "–"
        mark = " (baseline)" if arm == baseline else ""
        lines.append(f"{regime:<12} {arm + mark:<28} {shown:<18} {len(values):>4}  {failed or ''}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
