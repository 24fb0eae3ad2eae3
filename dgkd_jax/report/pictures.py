"""Pictures of per-example measurements (reliability, confusion, features), and bars over evaluation sets."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from dgkd_jax.evaluate import calibration
from dgkd_jax.report import figures, grouping

_NUMBERED = re.compile(r"(?P<kind>.+)-(?P<number>\d+)")
# From nothing to blue, so that a light page and a dark one show through where the counts are small.
_BLUES = LinearSegmentedColormap.from_list("blues", [(0.06, 0.36, 0.66, 0.0), (0.06, 0.36, 0.66, 1.0)])
_DARK = 25  # percent; above it blue is dark on any page
_NAMED_CLASSES = 20  # with more classes a picture does not show their names


def reliability_diagram(curves: Sequence[tuple[str, dict[str, Any], np.ndarray, np.ndarray]]) -> Figure:
    """Accuracy against confidence in 15 bins, and below it the share of examples per bin.

    Args:
        curves: label, style, confidences and correctness of each.
    """
    figure = Figure(figsize=(4.8, 4.4), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 100], [0, 100], color=figures.INK, linewidth=1, linestyle=(0, (1, 2)), label="perfectly calibrated")
    for label, look_of, confidence, correct in curves:
        bins = calibration.reliability(confidence, correct)
        error = calibration.calibration_error(confidence, correct)
        shown = bins["share"] > 0
        axes.plot(
            100 * bins["confidence"][shown],
            100 * bins["accuracy"][shown],
            label=f"{figures.shorten(label, 26)}: ECE {100 * error:.1f} %",
            markersize=4,
            **look_of,
        )
        below.stairs(
            100 * bins["share"], np.linspace(0, 100, calibration.BINS + 1), color=look_of["color"], linewidth=1.3
        )
    axes.set(title="Reliability diagram", ylabel="accuracy in bin [%]", ylim=(-3, 103))
    below.set(xlabel="confidence (probability of the top class) [%]", ylabel="examples [%]", xlim=(0, 102))
    figures.add_legend(figure, axes)
    return figure


def confusion(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Counts `[classes, classes]`: the teacher chose the row, the student the column."""
    classes = int(max(student.max(initial=0), teacher.max(initial=0))) + 1
    return np.bincount(teacher * classes + student, minlength=classes**2).reshape(classes, classes)


def confusion_picture(label: str, student: np.ndarray, teacher: np.ndarray) -> Figure:
    """The student's classes given the teacher's class, in percent of each row, without the agreement."""
    counts = confusion(student, teacher)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = figures.new(4.2)
    image = axes.imshow(shares, cmap=_BLUES, norm="asinh", vmin=0, vmax=100, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, label="of the teacher's choice [%]", shrink=0.85)
    bar.solids.set_rasterized(True)  # as shapes, its translucent steps would show seams
    bar.set_ticks([0, 1, 10, 100], labels=["0", "1", "10", "100"])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    classes = len(shares)
    if classes <= 10:
        for row, column in zip(*np.nonzero(counts), strict=True):
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=7.5,
                      color="white" if shares[row, column] > _DARK else figures.INK)  # fmt: skip
    if classes <= _NAMED_CLASSES:
        axes.set_xticks(range(classes))
        axes.set_yticks(range(classes))
    axes.grid(False)
    axes.set(title=figures.literal(label, 40), xlabel="student's class", ylabel="teacher's class")
    return figure


def feature_picture(label: str, embedding: np.ndarray, classes: np.ndarray) -> Figure:
    """The features of examples in two dimensions, one colour a class.

    Args:
        embedding: `[examples, 2]`.
        classes: `[examples]`, labels.
    """
    figure, axes = figures.new(4.2)
    present = np.unique(classes)
    # Colours repeat, so each class number is also written at the centre of its points.
    for place, number in enumerate(present):
        points = embedding[classes == number]
        axes.scatter(*points.T, s=7, alpha=0.75, linewidths=0, rasterized=True,
                     color=figures.COLOURS[place % len(figures.COLOURS)],
                     marker="os^Dv"[place // len(figures.COLOURS) % 5])  # fmt: skip
    if len(present) <= _NAMED_CLASSES:
        halo = [patheffects.withStroke(linewidth=3, foreground="white")]
        for number in present:
            x, y = np.median(embedding[classes == number], axis=0)
            axes.text(x, y, str(number), color="black", fontsize=11, fontweight="bold", ha="center", va="center",
                      path_effects=halo)  # fmt: skip
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(title=figures.literal(label, 40), xlabel="first principal component", ylabel="second principal component")
    return figure


def families(names: Sequence[str]) -> dict[str, list[str]]:
    """The corruptions with all five severities: kind -> their names by severity."""
    numbers: dict[str, dict[int, str]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            numbers.setdefault(match["kind"], {})[int(match["number"])] = name
    return {
        kind: [names_of[number] for number in range(1, 6)]
        for kind, names_of in numbers.items()
        if sorted(names_of) == [1, 2, 3, 4, 5]
    }


def bars(sets: Sequence[str], rows: Sequence[tuple[str, str, dict[str, tuple[float, float | None]]]],
         teacher: dict[str, float]) -> Figure:  # fmt: skip
    """Accuracy on evaluation sets: a bar for each group, a tick for the teacher.

    Args:
        sets: from top to bottom.
        rows: (label, colour, set -> mean and standard deviation in [0, 1]; None for a single run) of each group.
        teacher: set -> accuracy in [0, 1].
    """
    thickness = 0.8 / len(rows)
    figure, axes = figures.new(max(2.4, 0.9 + len(sets) * max(0.3, 0.13 * len(rows) + 0.08)))
    place = {name: number for number, name in enumerate(sets)}
    for number, (label, colour, values) in enumerate(rows):
        there = [name for name in sets if name in values]
        offset = (number - (len(rows) - 1) / 2) * thickness
        axes.barh(
            [place[name] + offset for name in there],
            [100 * values[name][0] for name in there],
            height=0.92 * thickness,
            xerr=[100 * (values[name][1] or 0) for name in there] if any(values[n][1] for n in there) else None,
            error_kw={"elinewidth": 0.9, "ecolor": figures.INK},
            color=colour,
            label=label,
        )
    there = [name for name in sets if name in teacher]
    if there:
        look_of = {"linestyle": "none", "marker": "|", "markersize": 13, "markeredgewidth": 2.2, "color": figures.INK}
        axes.plot([100 * teacher[name] for name in there], [place[name] for name in there], label="teacher", **look_of)
    axes.set_yticks(range(len(sets)), labels=[figures.literal(name, 26) for name in sets])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(title="Accuracy by evaluation set", xlabel="accuracy [%]", xlim=(0, 100))
    figures.add_legend(figure, axes)
    return figure


def severity_curves(kind: str, rows: Sequence[tuple[str, dict[str, Any], list[float | None]]]) -> Figure:
    """Accuracy against a corruption's severity.

    Args:
        kind: of corruption.
        rows: (label, style, accuracies in [0, 1] at severities 0 (clean) to 5; None: not evaluated) of each group.
    """
    figure, axes = figures.new()
    for label, look_of, accuracies in rows:
        points = [(severity, 100 * value) for severity, value in enumerate(accuracies) if value is not None]
        axes.plot(*zip(*points, strict=True), label=label, markersize=4, **look_of)
    axes.set(
        title=f"Accuracy under {figures.literal(kind, 26)}",
        xlabel="severity (0 = clean)",
        ylabel="accuracy [%]",
        ylim=(0, 102),
    )
    axes.set_xticks(range(6))
    figures.add_legend(figure, axes)
    return figure


def class_accuracies(groups: Sequence[grouping.Group]) -> Figure | None:
    """Accuracy per class at the last evaluation, mean over seeds; None if no run has it."""
    found = []
    for place, group in enumerate(groups):
        rows = [run.evals[-1]["class_accuracy"] for run in group.finished or group.runs
                if run.evals and isinstance(run.evals[-1].get("class_accuracy"), list)]  # fmt: skip
        rows = [[np.nan if value is None else value for value in row] for row in rows]
        if rows and len({len(row) for row in rows}) == 1:
            found.append((place, group.label, 100 * np.mean(rows, axis=0)))
    if not found:
        return None
    figure, axes = figures.new()
    classes = len(found[0][2])
    for place, label, accuracy in found:
        look_of = figures.style(place)
        if classes <= _NAMED_CLASSES:
            axes.plot(range(classes), accuracy, label=label, markersize=5, **(look_of | {"linestyle": "none"}))
        else:
            axes.plot(np.sort(accuracy), label=label, **(look_of | {"marker": None}))
    named = classes <= _NAMED_CLASSES
    axes.set(title="Accuracy by class", ylabel="accuracy [%]",
             xlabel="class" if named else "classes, by ascending accuracy of each group")  # fmt: skip
    if named:
        axes.set_xticks(range(classes))
    figures.add_legend(figure, axes)
    return figure
