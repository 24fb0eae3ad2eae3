"""The report's tables: groups with mean ± standard deviation and paired tests, runs, configs, time."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dgkd_jax.report import figures, page, significance, work_directories
from dgkd_jax.runs.record import duration

_BASELINES = ("dkd", "kd", "ce")
# (key in the last evaluation, column heading, factor, digits).
_LAST = (
    ("accuracy", "accuracy [%]", 100, 2), ("ce", "CE [nats]", 1, 4), ("ece", "ECE [%]", 100, 2),
    ("kl", "KL(teacher ‖ student) [nats]", 1, 4), ("agreement", "agreement [%]", 100, 2),
    ("logit_msd", "mean ‖z − v‖²", 1, 2), ("nc1", "NC1", 1, 3), ("nc2_norms", "NC2 norms", 1, 3),
    ("nc2_angles", "NC2 angles", 1, 3), ("nc3", "NC3", 1, 3), ("nc4", "NC4", 1, 3),
)  # fmt: skip


class Against(NamedTuple):
    """A comparison of a group with its baseline.

    Attributes:
        group: the group.
        baseline: the group that it is compared with.
        seeds: that both groups have.
        test: of the differences group − baseline in last accuracy, in [0, 1]; None without common seeds.
        adjusted: p-value after Holm's correction; None if there is no test.
    """

    group: work_directories.Group
    baseline: work_directories.Group
    seeds: tuple[int, ...]
    test: significance.Comparison | None
    adjusted: float | None


def accuracies(group: work_directories.Group, key: str = "last_accuracy") -> dict[Any, float]:
    """Seed -> accuracy of the finished runs."""
    values = {run.seed: work_directories.of_student(run, key) for run in group.finished}
    return {seed: value for seed, value in values.items() if value is not None}


def compare(groups: Sequence[work_directories.Group]) -> list[Against]:
    """Compare every group with a baseline, paired by seed; p-values are corrected over all comparisons.

    The baseline is a group by DKD, else by KD, else by CE; among several, the one whose other settings differ in the
    fewest keys. Groups by the baseline's method are not compared.
    """
    candidates = {
        name: [each for each in groups if each.runs[0].method == name and accuracies(each)] for name in _BASELINES
    }
    method, baselines = next(((name, found) for name, found in candidates.items() if found), (None, []))
    if not baselines:
        return []
    found = []
    for group in groups:
        if group.runs[0].method == method:
            continue
        baseline = min(baselines, key=lambda other: (_distance(group, other), -len(other.finished)))
        mine, theirs = accuracies(group), accuracies(baseline)
        seeds = tuple(seed for seed in mine if seed in theirs)
        test = significance.paired([mine[s] for s in seeds], [theirs[s] for s in seeds]) if seeds else None
        found.append((group, baseline, seeds, test))
    tested = [test.p for *_, test in found if test and test.p is not None]
    adjusted = iter(significance.holm(tested))
    return [Against(*each, next(adjusted) if each[3] is not None and each[3].p is not None else None) for each in found]


def _distance(group: work_directories.Group, other: work_directories.Group) -> int:
    """The number of keys, read by both methods, in which the groups differ."""
    mine, theirs = work_directories.settings(group.runs[0]), work_directories.settings(other.runs[0])
    shared = [key for key in mine.keys() & theirs.keys() if key != "method"]
    return sum(mine[key] != theirs[key] for key in shared)


def groups_table(groups: Sequence[work_directories.Group], compared: Sequence[Against]) -> str:
    """A row per group: last and best accuracy over its finished runs, and the comparison with its baseline."""
    by_label = {each.group.label: each for each in compared}
    several = len({each.baseline.label for each in compared}) > 1
    header = ["group", "seeds", "last accuracy [%]", "best accuracy [%]"]
    if compared:
        against = "baseline" if several else compared[0].baseline.label
        header += [f"last − {against} [points]", "95 % CI", "pairs", "p", "p (Holm)"]
        header += ["baseline"] if several else []
    rows = []
    for place, group in enumerate(groups):
        row: list[object] = [
            page.swatch(figures.style(place)["color"], group.label),
            _seeds(group),
            _mean(list(accuracies(group).values())),
            _mean(list(accuracies(group, "best_accuracy").values())),
        ]
        if compared:
            row += _comparison(by_label.get(group.label), columns=6 if several else 5)
        rows.append(row)
    return page.table(header, rows, text=(0, 9) if several else (0,))


def _seeds(group: work_directories.Group) -> str:
    finished, every = len(group.finished), len(group.runs)
    return str(every) if finished == every else f"{finished} of {every}"


def _comparison(against: Against | None, *, columns: int) -> list[object]:
    if against is None:
        return ["baseline", *[""] * (columns - 1)]
    name = [against.baseline.label] if columns == 6 else []
    if against.test is None:
        return ["–", "–", "0", "no common seed", "–", *name]
    test = against.test
    error = "" if test.standard_error is None else f" ± {100 * test.standard_error:.2f}"
    interval = "–" if test.interval is None else f"{100 * test.interval[0]:+.2f} to {100 * test.interval[1]:+.2f}"
    p = test.reason or p_value(test.p)
    return [
        f"{100 * test.mean:+.2f}{error}".replace("-", "−"),
        interval.replace("-", "−"),
        test.pairs,
        p,
        p_value(against.adjusted),
        *name,
    ]


def p_value(p: float | None) -> object:
    """Rounded; bold below 0.05."""
    if p is None:
        return "–"
    text = "< 0.0001" if p < 1e-4 else f"{p:.1g}" if p < 0.001 else f"{p:.3f}"
    return page.Markup(f"<strong>{page.escape(text)}</strong>") if p < 0.05 else text


def _mean(values: Sequence[float], *, scale: float = 100, digits: int = 2) -> str:
    if not values:
        return "–"
    mean, deviation = significance.mean_and_deviation([scale * value for value in values])
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def last_evaluation(groups: Sequence[work_directories.Group]) -> str:
    """All metrics of the last evaluation of the finished runs; '' if there are none."""
    shown = [entry for entry in _LAST if any(_last(group, entry[0]) for group in groups)]
    if not shown:
        return ""
    rows = [
        [page.swatch(figures.style(place)["color"], group.label)]
        + [_mean(_last(group, key), scale=scale, digits=digits) for key, _, scale, digits in shown]
        for place, group in enumerate(groups)
    ]
    return page.table(["group", *(title for _, title, _, _ in shown)], rows)


def _last(group: work_directories.Group, key: str) -> list[float]:
    return [value for run in group.finished if (value := work_directories.last(run, key)) is not None]


def runs_table(groups: Sequence[work_directories.Group], teachers: Sequence[work_directories.Run]) -> str:
    """A row per run; the teachers' own runs are at the end."""
    rows = [_run(group.label, run) for group in groups for run in group.runs]
    rows += [_run("teacher's own run", run) for run in teachers]
    header = ["run", "group", "state", "student", "parameters", "last [%]", "best [%] (epoch)", "training"]
    return page.table(header, rows, text=(0, 1, 2, 3))


def _run(label: str, run: work_directories.Run) -> list[object]:
    last, best, epoch = (
        work_directories.of_student(run, key) for key in ("last_accuracy", "best_accuracy", "best_epoch")
    )
    if not run.finished:
        last, best = (
            work_directories.last(run, "accuracy"),
            max(work_directories.curve(run.evals, "accuracy")[1], default=None),
        )
    parameters, seconds = work_directories.of_student(run, "parameters"), work_directories.of_student(run, "seconds")
    return [
        run.name,
        label,
        state(run),
        run.config.get("student.model", "–"),
        "–" if parameters is None else f"{parameters:,.0f}",
        _percent(last),
        _percent(best) + ("" if epoch is None else f" ({epoch:.4g})"),
        "–" if seconds is None else duration(seconds),
    ]


def state(run: work_directories.Run) -> str:
    """The state of a run in words."""
    if run.finished:
        return "finished"
    if work_directories.is_teacher(run) and not run.failure:
        return f"at step {run.last_step:,}"  # a teacher's own run has no result.json
    return f"{'failed' if run.failure else 'unfinished'} at step {run.last_step:,}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def differences(groups: Sequence[work_directories.Group]) -> str:
    """The keys in which the groups differ; '' if there are none."""
    settings = [work_directories.settings(group.runs[0]) for group in groups]
    keys = work_directories.differing(settings)
    if not keys:
        return ""
    rows = [
        [page.swatch(figures.style(place)["color"], group.label), *(_value(own.get(key)) for key in keys)]
        for place, (group, own) in enumerate(zip(groups, settings, strict=True))
    ]
    return page.table(["group", *keys], rows, text=range(len(keys) + 1))


def _value(value: Any) -> str:
    return "–" if value is None else str(value)


def time_spent(groups: Sequence[work_directories.Group], teachers: Sequence[work_directories.Run]) -> str:
    """Mean seconds per run and part, and their shares; '' if not measured."""
    rows = [(group.label, [run.goodput for run in group.runs if run.goodput]) for group in groups]
    rows += [("teacher's own run", [run.goodput for run in teachers if run.goodput])]
    rows = [(label, counted) for label, counted in rows if counted]
    if not rows:
        return ""
    parts = list(dict.fromkeys(part for _, counted in rows for each in counted for part in each))
    cells = []
    for label, counted in rows:
        means = [math.fsum(each.get(part, 0.0) for each in counted) / len(counted) for part in parts]
        total = math.fsum(means)
        shares = [f"{mean:.1f} s ({100 * mean / total:.0f} %)" if total else "0 s" for mean in means]
        cells.append([label, len(counted), *shares, duration(total)])
    return page.table(["group", "runs", *parts, "total"], cells)


def both(groups: Sequence[work_directories.Group], rows_of: Callable[[work_directories.Run], dict[str, Any]]) -> str:
    """How often student and teacher are right on the same examples, mean over seeds; '' if unknown.

    Args:
        rows_of: a function: run -> the arrays of its clean evaluation, {} if there are none.
    """
    rows = []
    for place, group in enumerate(groups):
        shares = []
        for run in group.runs:
            arrays = rows_of(run)
            if "teacher_prediction" in arrays:
                student = arrays["student_prediction"] == arrays["label"]
                teacher = arrays["teacher_prediction"] == arrays["label"]
                same = ~student & ~teacher & (arrays["student_prediction"] == arrays["teacher_prediction"])
                cases = (student & teacher, student & ~teacher, teacher & ~student, ~student & ~teacher, same)
                shares.append([float(case.mean()) for case in cases])
        if shares:
            columns = [_mean(list(column)) for column in zip(*shares, strict=True)]
            rows.append([page.swatch(figures.style(place)["color"], group.label), *columns])
    header = ["group, in % of the examples", "both right", "only student", "only teacher", "both wrong",
              "both wrong, same class"]  # fmt: skip
    return page.table(header, rows) if rows else ""
