"""Runs a study: regimes × arms × seeds on one data set; each teacher is trained once.

    python -m dgkd_jax.study --config=configs/study/mnist5k.py [--workers=N] [--seeds=0,1,…] [--regimes=NAME,…]
        [--arms=NAME,…] [--output=runs/study] [--cache-teacher]
    python -m dgkd_jax.study --config=FILE --config=FILE … --results=docs/results.md [--baseline=NAME]

Every run has its own work directory. The same command continues where it was and does only unfinished runs; a run that
fails becomes a row of the table and does not end the study. A study with a file of rows (`Study.rows`) adds a line to
it for each finished run, and a run with a line is never repeated. At the end the report page is written. With
--cache-teacher the arms of a seed share the teacher's logits, so the teacher sees each training batch once; a run that
began without the cache cannot continue with it. The second form runs nothing: it writes the results of all these
studies, read from their rows or their runs' files, as one document. With --baseline it compares the arms with another
one than the study's own; then nothing is tested, it only looks.
"""

import argparse
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from dgkd_jax import methods
from dgkd_jax.errors import ArgumentParser, BadInput, did_you_mean, exit_code_of
from dgkd_jax.report import compose
from dgkd_jax.study import figures, results, rows
from dgkd_jax.study.conduct import conduct, outcome
from dgkd_jax.study.plan import OUTPUT, Run, Study, load, runs_of, with_cache


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    return exit_code_of(lambda: _study(_arguments(argv)))


def _study(arguments: argparse.Namespace) -> None:
    studies = [_with_baseline(load(path), arguments.baseline) for path in arguments.config]
    if arguments.results:
        print(_write_results(arguments, studies))
        return
    (study,) = studies
    runs = _runs(arguments, study)
    if arguments.cache_teacher:
        runs = [with_cache(run) for run in runs]
    conduct(runs, workers=arguments.workers, kept=study.rows)
    found = _outcomes(study, runs)
    print(f"\n{table(found, baseline=study.baseline)}")
    done = [row["workdir"] for row in found if row["status"] == "done" and Path(row["workdir"]).exists()]
    if done:
        print(f"Pictures: {compose.write(done, os.path.join(arguments.output, study.name, 'report'))}")


def _with_baseline(study: Study, name: str | None) -> Study:
    """The study with another baseline; it decides nothing then, because its tests were planned against its own."""
    if name in (None, study.baseline):
        return study
    _check("baseline", name, name, list(study.arms))
    return study._replace(baseline=name, decides=False)


def _outcomes(study: Study, runs: list[Run]) -> list[dict[str, Any]]:
    """Of each run its row, if the study keeps rows and has it; otherwise what its files say."""
    there = rows.read(study.rows) if study.rows else []
    return [{"workdir": run.workdir} | (rows.find(there, run) or outcome(run)) for run in runs]


def _runs(arguments: argparse.Namespace, study: Study) -> list[Run]:
    given = arguments.seeds
    return runs_of(
        study,
        output=arguments.output,
        seeds=None if given is None else map(int, _chosen("seeds", given, [], free=True)),
        regimes=_chosen("regimes", arguments.regimes, list(study.regimes)),
        arms=_chosen("arms", arguments.arms, list(study.arms)),
    )


def _write_results(arguments: argparse.Namespace, studies: list[Study]) -> str:
    found = []
    for path, study in zip(arguments.config, studies, strict=True):
        runs = _runs(arguments, study)
        outcomes = _outcomes(study, runs)
        if not any(row["status"] == "done" for row in outcomes):
            raise BadInput(f"no run of {path} is done beneath {arguments.output}; first run it, without --results")
        planned = [(run.regime, run.arm, run.seed) for run in runs]
        about = study.name, path, study.about, study.baseline
        found.append(results.Found(*about, planned, outcomes, study.decides, _comparable(study, runs)))
    given = {
        "seeds": arguments.seeds,
        "regimes": arguments.regimes,
        "arms": arguments.arms,
        "baseline": arguments.baseline,
        "output": None if arguments.output == OUTPUT else arguments.output,
    }
    options = "".join(f" --{name}={shlex.quote(value)}" for name, value in given.items() if value is not None)
    options += " --cache-teacher" if arguments.cache_teacher else ""
    _draw(found, arguments.results)
    text = results.markdown(found, options=options, output=arguments.results)
    Path(arguments.results).write_text(text)
    return f"{arguments.results}: {sum(row['status'] == 'done' for study in found for row in study.rows)} runs"


def _draw(found: list[results.Found], output: str) -> None:
    verdicts = results.verdicts(found)
    figures.forest(verdicts, results.picture_of(output))
    for study in found:
        if of_regimes := results.norms_of(study):
            figures.norms(of_regimes, results.picture_of(output, f"{study.name}_norms"))
        if points := results.sweep_of(verdict for verdict in verdicts if verdict.study == study.name):
            figures.sweep(points, results.picture_of(output, f"{study.name}_sweep"))


def _comparable(study: Study, runs: list[Run]) -> frozenset[tuple[str, str]]:
    """The (regime, arm) pairs that read the teacher at the temperature of their regime's baseline."""
    configs = {(run.regime, run.arm): run.config for run in runs}
    temperature = {cell: methods.from_config(config).teacher_temperature for cell, config in configs.items()}
    return frozenset(
        (regime, arm)
        for regime, arm in configs
        if temperature[regime, arm] is not None
        and temperature[regime, arm] == temperature.get((regime, study.baseline))
    )


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m dgkd_jax.study",
        description=__doc__.splitlines()[0],
        example="python -m dgkd_jax.study --config=configs/study/mnist5k.py --workers=2 --seeds=0,1",
    )
    parser.add_argument("--config", required=True, action="append", metavar="FILE", help="of configs/study")
    parser.add_argument("--results", metavar="FILE", help="run nothing, write what these studies found")
    parser.add_argument("--workers", type=int, default=1, help="runs beside each other; one per device or core")
    parser.add_argument("--seeds", help="comma-separated; default: the study's")
    parser.add_argument("--regimes", help="comma-separated; default: all")
    parser.add_argument("--arms", help="comma-separated; default: all")
    parser.add_argument("--baseline", metavar="NAME", help="the arm to compare with; default: the study's")
    parser.add_argument("--cache-teacher", action="store_true", help="run each teacher once, for all arms of a seed")
    parser.add_argument("--output", default=OUTPUT, metavar="DIR", help=f"default {OUTPUT}")
    arguments = parser.parse_args(argv)
    if len(arguments.config) > 1 and not arguments.results:
        parser.error("several --config go with --results only; run the studies one after the other")
    if arguments.workers < 1:
        parser.error(f"--workers={arguments.workers}: 1 or more")
    return arguments


def _chosen(name: str, text: str | None, there: list[str], *, free: bool = False) -> list[str]:
    if text is None:
        return there
    chosen = text.split(",")
    for choice in chosen:
        if not free:
            _check(name, text, choice, there)
        elif not choice.isdecimal():
            raise BadInput(f"--{name}={text}: {choice!r} is no number")
    return chosen


def _check(name: str, text: str, choice: str, there: list[str]) -> None:
    if choice not in there:
        raise BadInput(f"--{name}={text}: no {choice!r}{did_you_mean(choice, there)}; there are {', '.join(there)}")


def table(rows: list[dict[str, Any]], *, baseline: str) -> str:
    """Table for the terminal: each arm's accuracy after the last epoch, mean ± standard deviation over its seeds."""
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
