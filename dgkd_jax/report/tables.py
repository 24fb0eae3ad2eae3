"""The report's tables: groups with mean ± standard deviation and paired tests, runs, configs, time."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dgkd_jax.report import figures, grouping, page, significance, untrusted, work_directories
from dgkd_jax.runs.record import duration

_BASELINES = ("dkd", "kd", "ce")
# Column headings that a reader may not know.
_MEANINGS = {
    "CE [nats]": "cross-entropy with the labels", "ECE [%]": "expected calibration error: mean gap between confidence "
    "and accuracy", "agreement [%]": "how often student and teacher choose the same class",
    "mean ‖z − v‖²": "squared distance between the logits of student and teacher",
    "NC1": "neural collapse 1: spread within the classes against the spread between them; 0 is full collapse",
    "NC2 norms": "neural collapse 2: how much the class means differ in norm; 0 is full collapse",
    "NC2 angles": "neural collapse 2: how far the class means are off equal angles; 0 is full collapse",
    "NC3": "neural collapse 3: distance of the classifier from the class means; 0 is full collapse",
    "NC4": "neural collapse 4: how often the network chooses the class with the nearest mean; 1 is full collapse",
}  # fmt: skip
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

    group: grouping.Group
    baseline: grouping.Group
    seeds: tuple[int, ...]
    test: significance.Comparison | None
    adjusted: float | None


def accuracies(group: grouping.Group, key: str = "last_accuracy") -> dict[Any, float]:
    """Seed -> accuracy of the finished runs."""
    values = {run.seed: work_directories.of_student(run, key) for run in group.finished}
    return {seed: value for seed, value in values.items() if value is not None}


def compare(groups: Sequence[grouping.Group]) -> list[Against]:
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


def _distance(group: grouping.Group, other: grouping.Group) -> int:
    """The number of keys, read by both methods, in which the groups differ."""
    mine, theirs = grouping.settings(group.runs[0]), grouping.settings(other.runs[0])
    shared = [key for key in mine.keys() & theirs.keys() if key != "method"]
    return sum(mine[key] != theirs[key] for key in shared)


class Teacher(NamedTuple):
    """A teacher as a student's result.json describes it, or as its own run does.

    Attributes:
        model: its name; '' if unknown.
        last, best: accuracies; None: unknown.
    """

    model: str
    last: float | None
    best: float | None

    @property
    def label(self) -> str:
        """For the first column."""
        return f"the teacher, {self.model}" if self.model else "the teacher"


def teachers_of(
    groups: Sequence[grouping.Group], own: Sequence[work_directories.Run]
) -> dict[Teacher, work_directories.Run | None]:
    """The teachers of these groups, each with its own run if that is among `own`."""
    found: dict[Teacher, work_directories.Run | None] = {}
    for run in own:
        best = max(work_directories.curve(run.evals, "accuracy")[1], default=None)
        model = str(run.config.get("student.model", ""))
        found[Teacher(model, work_directories.last(run, "accuracy"), None if best is None else float(best))] = run
    for group in groups:
        for run in group.finished:
            section = run.result.get("teacher") or {}
            accuracies_of = [section.get(key) for key in ("last_accuracy", "best_accuracy")]
            model = section.get("model") if isinstance(section.get("model"), str) else ""
            last, best = (value if untrusted.is_number(value) else None for value in accuracies_of)
            if last is not None and not any((each.model, each.last) == (model, last) for each in found):
                found[Teacher(model, last, best)] = None
    return found


def groups_table(
    groups: Sequence[grouping.Group],
    compared: Sequence[Against],
    own: Sequence[work_directories.Run] = (),
) -> str:
    """A row per group: last and best accuracy over its finished runs, and the comparison with its baseline.

    The teachers follow; `own` are their own runs.
    """
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
    for teacher in teachers_of(groups, own):
        row = [page.swatch("currentColor", teacher.label), "", _percent(teacher.last), _percent(teacher.best)]
        rows.append(row + [""] * (len(header) - len(row)))
    return page.table(header, rows, text=(0, 9) if several else (0,))


def _seeds(group: grouping.Group) -> str:
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


def last_evaluation(groups: Sequence[grouping.Group], own: Sequence[work_directories.Run] = ()) -> str:
    """All metrics of the last evaluation of the finished runs and of the teachers' `own`; '' if there are none."""
    shown = [entry for entry in _LAST if any(_last(group, entry[0]) for group in groups)]
    if not shown:
        return ""
    rows = [
        [page.swatch(figures.style(place)["color"], group.label)]
        + [_mean(_last(group, key), scale=scale, digits=digits) for key, _, scale, digits in shown]
        for place, group in enumerate(groups)
    ]
    for teacher, run in teachers_of(groups, own).items():
        if run is not None:
            values = [work_directories.last(run, key) for key, *_ in shown]
            cells = [
                "–" if value is None else f"{scale * value:.{digits}f}"
                for value, (_, _, scale, digits) in zip(values, shown, strict=True)
            ]
            rows.append([page.swatch("currentColor", teacher.label), *cells])
    titles = [title for _, title, _, _ in shown]
    titles = [page.abbreviation(title, _MEANINGS[title]) if title in _MEANINGS else title for title in titles]
    collapse = any(key.startswith("nc") for key, *_ in shown)
    text = page.paragraph(
        "NC1 to NC4 measure neural collapse, the features of a class drawing together (Papyan, Han & Donoho 2020). "
        "NC1: spread within the classes against the spread between them. NC2: class means of unequal norm, and off "
        "equal angles. NC3: distance of the classifier from the class means. NC4: how often the network chooses the "
        "class with the nearest mean. In full collapse NC1, NC2 and NC3 are 0 and NC4 is 1.",
        soft=True,
    )
    return page.table(["group", *titles], rows) + (text if collapse else "")


def _last(group: grouping.Group, key: str) -> list[float]:
    return [value for run in group.finished if (value := work_directories.last(run, key)) is not None]


def runs_table(groups: Sequence[grouping.Group], teachers: Sequence[work_directories.Run]) -> str:
    """A row per run; the teachers' own runs are at the end."""
    every = [run for group in groups for run in group.runs]
    rows = [_run(group.label, run) for group in groups for run in group.runs]
    rows += [_run("teacher's own run", run, told=_told_of(run, every)) for run in teachers]
    header = ["run", "group", "state", "student", "parameters", "last [%]", "best [%] (epoch)", "training"]
    return page.table(header, rows, text=(0, 1, 2, 3))


def _told_of(teacher: work_directories.Run, students: Sequence[work_directories.Run]) -> dict[str, Any]:
    """What a student's result.json says of its teacher, whose own run has no such file; {} if it is another's."""
    for run in students:
        told = (run.result or {}).get("teacher") or {}
        if told.get("model") == teacher.config.get("student.model") and (
            told.get("last_accuracy") == work_directories.last(teacher, "accuracy")
        ):
            return told
    return {}


def _run(label: str, run: work_directories.Run, *, told: dict[str, Any] | None = None) -> list[object]:
    last, best, epoch = (
        work_directories.of_student(run, key) for key in ("last_accuracy", "best_accuracy", "best_epoch")
    )
    if not run.finished:
        last, best = (
            work_directories.last(run, "accuracy"),
            max(work_directories.curve(run.evals, "accuracy")[1], default=None),
        )
    parameters, seconds = (
        (told or {}).get(key, work_directories.of_student(run, key)) for key in ("parameters", "seconds")
    )
    parameters, seconds = (value if untrusted.is_number(value) else None for value in (parameters, seconds))
    return [
        page.shortened(run.name, 60),
        page.shortened(label, 60),
        state(run),
        page.shortened(run.config.get("student.model", "–"), 40),
        "–" if parameters is None else f"{parameters:,.0f}",
        _percent(last),
        _percent(best) + ("" if epoch is None else f" ({epoch:.4g})"),
        "–" if seconds is None else duration(seconds),
    ]


def state(run: work_directories.Run) -> str:
    """The state of a run in words."""
    if run.at_the_end:
        return "finished"
    if work_directories.is_teacher(run) and not run.failure:
        return f"at step {run.last_step:,}"  # a teacher's own run has no result.json
    return f"{'failed' if run.failure else 'unfinished'} at step {run.last_step:,}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def differences(groups: Sequence[grouping.Group]) -> str:
    """The keys in which groups that read them differ, and in a box those that only some read; '' if there are none."""
    settings = [grouping.settings(group.runs[0]) for group in groups]
    keys, of_some = [], []
    for key in grouping.differing(settings):
        values = [own[key] for own in settings if key in own]
        if len(grouping.differing([{key: value} for value in values])):
            keys.append(key)
        else:
            of_some.append(key)
    rows = [
        [page.swatch(figures.style(place)["color"], group.label), *(_value(own, key) for key in keys)]
        for place, (group, own) in enumerate(zip(groups, settings, strict=True))
    ]
    body = page.table(["group", *keys], rows, text=range(len(keys) + 1)) if keys else ""
    if of_some:
        read_by = [[group.label for group, own in zip(groups, settings, strict=True) if key in own] for key in of_some]
        values = [next(_value(own, key) for own in settings if key in own) for key in of_some]
        rows = [
            [key, value, page.shortened(", ".join(labels), 60)]
            for key, value, labels in zip(of_some, values, read_by, strict=True)
        ]
        body += page.details(
            f"{len(of_some)} keys that only some groups read, with the same value in each",
            page.table(["key", "value", "read by"], rows, text=(0, 1, 2)),
        )
    return body


def _value(settings: dict[str, Any], key: str) -> str:
    return page.shortened(settings[key]) if settings.get(key) is not None else "–"


def time_spent(groups: Sequence[grouping.Group], teachers: Sequence[work_directories.Run]) -> str:
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


def both(groups: Sequence[grouping.Group], rows_of: Callable[[work_directories.Run], dict[str, Any]]) -> str:
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
