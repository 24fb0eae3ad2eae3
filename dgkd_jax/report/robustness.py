"""The report's section on robustness: accuracy on every set that a run was evaluated on."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from dgkd_jax.report import figures, grouping, page, pictures, significance, untrusted, work_directories

_MOST_BARS = len(figures.COLOURS)  # groups in one figure of bars


class Accuracies(NamedTuple):
    """The accuracies of one group, in [0, 1].

    Attributes:
        place: of the group in the list; determines its colour.
        label: of the group.
        by_run: (set -> accuracy) for each run with an evaluation.
    """

    place: int
    label: str
    by_run: list[dict[str, float]]

    def spread(self, name: str) -> tuple[float, float | None] | None:
        """Mean and standard deviation over the runs evaluated on this set; None if there are none."""
        values = [values[name] for values in self.by_run if name in values]
        return significance.mean_and_deviation(values) if values else None


def section(groups: Sequence[grouping.Group], draw: Callable[[str, Figure], str]) -> str:
    """Bars, a curve over severity per corruption, and a table.

    Args:
        groups: coloured by their place in the list.
        draw: a function: (file's name, figure) -> SVG.
    """
    measured, teacher = _accuracies(groups)
    names = list(dict.fromkeys(name for group in measured for values in group.by_run for name in values))
    if not set(names) - {"clean"}:
        has = "Only the clean split was evaluated." if names else "There are no evaluations."
        return page.missing([page.Markup(f"{has} Make others: {_command([run for g in groups for run in g.runs])}")])
    names.sort(key=lambda name: name != "clean")  # clean first
    families = pictures.families(names)
    drawn = _bars(names, families, measured, teacher, draw)
    for kind, members in families.items():
        figure = _severity(kind, ["clean", *members], measured, teacher)
        drawn.append((f"Accuracy under {kind} by severity", draw(f"severity-{kind}", figure)))
    text = page.paragraph(
        "Bars: mean over the runs that were evaluated on the set, with the standard deviation where there are several; "
        "ticks: the teacher. A corruption with all five severities is one bar, their mean, and a figure of its own.",
        soft=True,
    )
    table = page.details("The accuracies [%]", _table(names, measured, teacher))
    return text + page.figure_grid(drawn) + table + _restricted(groups) + _lacking(groups)


def _command(runs: Sequence[work_directories.Run]) -> str:
    return page.code(grouping.evaluate_command(runs, "clean,corruptions,noised-8,scrambled-4"))


def _lacking(groups: Sequence[grouping.Group]) -> str:
    """For which runs there is no evaluation but the clean one, and the command for them."""
    every = [run for group in groups for run in group.runs]
    lacking = [run for run in every if not run.evaluations.keys() - {"clean"}]
    if not lacking:
        return ""
    names = page.escape(", ".join(run.name for run in lacking))
    return page.missing(
        [page.Markup(f"Missing here, of {len(lacking)} of {len(every)} runs ({names}): {_command(lacking)}")]
    )


def _accuracies(groups: Sequence[grouping.Group]) -> tuple[list[Accuracies], dict[str, float]]:
    """Accuracies of the groups that have any; and the teacher's by set, from the first run that has it."""
    measured = []
    teacher: dict[str, float] = {}
    for place, group in enumerate(groups):
        by_run = []
        for run in group.runs:
            student = {name: each.summary["student"].get("accuracy") for name, each in run.evaluations.items()}
            by_run.append({name: value for name, value in student.items() if untrusted.is_number(value)})
            for name, each in run.evaluations.items():
                accuracy = (each.summary.get("teacher") or {}).get("accuracy")
                if untrusted.is_number(accuracy):
                    teacher.setdefault(name, accuracy)
        if any(by_run):
            measured.append(Accuracies(place, group.label, [values for values in by_run if values]))
    return measured, teacher


def _bars(
    names: Sequence[str],
    families: dict[str, list[str]],
    measured: Sequence[Accuracies],
    teacher: dict[str, float],
    draw: Callable[[str, Figure], str],
) -> list[tuple[str, str]]:
    """Bar figures with at most `_MOST_BARS` groups each; a complete family of corruptions is shown by its mean."""
    inside = {name for members in families.values() for name in members}
    means = {f"{kind}, mean": members for kind, members in families.items()}
    shown = [*(name for name in names if name not in inside), *means]
    teacher = _with_means(teacher, means)
    measured = [group._replace(by_run=[_with_means(values, means) for values in group.by_run]) for group in measured]
    drawn = []
    for start in range(0, len(measured), _MOST_BARS):
        rows = [
            (group.label, figures.style(group.place)["color"], {name: s for name in shown if (s := group.spread(name))})
            for group in measured[start : start + _MOST_BARS]
        ]
        svg = draw(f"robustness-{start // _MOST_BARS + 1}", pictures.bars(shown, rows, teacher))
        drawn.append((f"Accuracy on {len(shown)} evaluation sets", svg))
    return drawn


def _with_means(values: dict[str, float], means: dict[str, list[str]]) -> dict[str, float]:
    """The values, plus the mean of each complete family."""
    complete = {name: members for name, members in means.items() if set(members) <= values.keys()}
    return values | {name: sum(values[m] for m in members) / len(members) for name, members in complete.items()}


def _severity(kind: str, names: list[str], measured: Sequence[Accuracies], teacher: dict[str, float]) -> Figure:
    rows = []
    for group in measured:
        spreads = [group.spread(name) for name in names]
        if any(spreads[1:]):
            rows.append((group.label, figures.style(group.place), [each and each[0] for each in spreads]))
    if any(name in teacher for name in names[1:]):
        rows.append(("teacher", figures.OF_TEACHER, [teacher.get(name) for name in names]))
    return pictures.severity_curves(kind, rows)


def _table(names: Sequence[str], measured: Sequence[Accuracies], teacher: dict[str, float]) -> str:
    def cell(spread: tuple[float, float | None] | None) -> str:
        if spread is None:
            return "–"
        mean, deviation = spread
        return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")

    rows = [
        [
            name,
            *(cell(group.spread(name)) for group in measured),
            cell((teacher[name], None) if name in teacher else None),
        ]
        for name in names
    ]
    return page.table(["set", *(group.label for group in measured), "teacher"], rows)


def _restricted(groups: Sequence[grouping.Group]) -> str:
    every = [each.summary for group in groups for run in group.runs for each in run.evaluations.values()]
    names = sorted({str(summary.get("data")) for summary in every if summary.get("restricted_to_classes")})
    if not names:
        return ""
    return page.paragraph(
        f"{', '.join(names)}: these sets have some of the classes only, and the choice was among these alone.",
        soft=True,
    )
