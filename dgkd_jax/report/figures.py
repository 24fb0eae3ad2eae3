"""Figures of a report: the common style, curves over training, and embedding into the page.

Ink (text, axes, grid) has one colour, which the page replaces by its own text colour, so that a figure is readable on
a light and on a dark page. The PNG next to the page has a white background.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dgkd_jax.report import grouping
from dgkd_jax.report import work_directories as runs_lib

INK = "#1d1e20"
# After Okabe & Ito, "Color Universal Design" (2008): distinguishable with any colour vision. Left out: yellow, too
# light on white, and black, the ink. Blue is lighter, to be visible on black. After seven groups line styles change.
COLOURS = ("#1f7fbf", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
_LINES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))
_MARKERS = "osD^vPX"
OF_TEACHER = {"color": INK, "linestyle": (0, (4, 3)), "marker": None}
MOST_GROUPS = len(COLOURS) * len(_LINES)

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "path",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
}
_MOST_POINTS = 300  # in a curve; neighbours are averaged to get down to this
_LONGEST_NAME = 100  # characters of a file's name
_MANY = 8  # with this many entries or more, a legend is small
_MOST_THIN_LINES = 60  # runs drawn individually, in addition to their group's mean
_WIDTH = 4.8  # inches; about as wide as the page's column, so 10 points are readable


def look() -> Any:
    """Context manager with the reports' style: create and embed figures inside it."""
    return mpl.rc_context(_STYLE)


def new(height: float = 3.2) -> tuple[Figure, Any]:
    """A figure with one pair of axes; `height` in inches."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def style(place: int) -> dict[str, Any]:
    """Colour, line and marker of the group at this place in the list."""
    colour = place % len(COLOURS)
    return {
        "color": COLOURS[colour],
        "linestyle": _LINES[place // len(COLOURS) % len(_LINES)],
        "marker": _MARKERS[colour],
    }


def shorten(text: str, length: int) -> str:
    """At most `length` characters, with an ellipsis in the middle."""
    if len(text) <= length:
        return text
    keep = length - 1
    return f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}"


def literal(text: str, length: int) -> str:
    """A user's text, at most `length` characters of it, as matplotlib shows it: signs for formulas have no meaning."""
    return "".join(each if each.isprintable() else "\ufffd" for each in shorten(text, length)).replace("$", r"\$")


def add_legend(figure: Figure, axes: Any) -> None:
    """Add a legend below the axes; the figure grows by its rows. A legend with many entries is small."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    many = len(labels) > _MANY
    labels = [literal(label, 33 if many else 44) for label in labels]
    columns = max(1, min(len(labels), (80 if many else 58) // (max(map(len, labels)) + 6)))
    size = 7 if many else 8.5
    figure.set_figheight(figure.get_figheight() + 0.022 * size * -(-len(labels) // columns))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=size, handlelength=2.2, columnspacing=1.2
    )


def embed(figure: Figure, name: str, folder: epath.Path) -> str:
    """Write `name`.png to the folder; returns the figure as SVG for the page, its ids prefixed with `name`."""
    name = re.sub(r"[^a-zA-Z0-9_.-]+", "_", name)[:_LONGEST_NAME]
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=160, facecolor="white")
    (folder / f"{name}.png").write_bytes(png.getvalue())
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", transparent=True, dpi=160, metadata={"Date": None})
    text = svg.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return text.replace(INK, "currentColor")


class Curve(NamedTuple):
    """One metric over training.

    Attributes:
        key: in metrics.jsonl.
        kind: "train" or "eval".
        title: of the figure.
        unit: label of the vertical axis.
        scale: factor that converts to the unit.
        second_half: draw only the second half of the steps.
    """

    key: str
    kind: str
    title: str
    unit: str
    scale: float = 1.0
    second_half: bool = False


def curves(
    groups: Sequence[grouping.Group], what: Curve, *, reference: tuple[str, float] | None = None
) -> Figure | None:
    """A metric over training: a thin line per run, a thick line for the mean over seeds.

    Over epochs where the steps per epoch of all runs are known, else over steps. The mean is taken where all finished
    runs of the group have the metric. An unfinished run ends in a cross.

    Args:
        groups: coloured by their place in the list.
        what: the metric.
        reference: label and value of a horizontal line, in the curve's unit.

    Returns:
        None if no run has the metric.
    """
    by_epochs = in_epochs(groups)
    drawn = [(place, group, _series(group, what, by_epochs=by_epochs)) for place, group in enumerate(groups)]
    drawn = [(place, group, series) for place, group, series in drawn if series]
    if not drawn:
        return None
    figure, axes = new()
    thin = sum(len(series) for *_, series in drawn) <= _MOST_THIN_LINES
    for place, group, series in drawn:
        look_of = style(place)
        finished = [points for run, points in series if run.finished]
        averaged = _mean(finished) if len(finished) > 1 else None
        if averaged is not None:
            label = group.label if len(drawn) > _MANY else f"{group.label} (mean of {len(finished)})"
            _line(axes, *averaged, what, label=label, **look_of)
        for run, points in series:
            if averaged is not None and run.finished and not thin:
                continue
            if averaged is None and (run.finished or not finished):
                label = group.label if run is series[0][0] or run.finished else None
                _line(axes, *points, what, label=label, **look_of)
            else:
                axes.plot(*_thinned(*points), color=look_of["color"], linewidth=0.7, alpha=0.45)
            if not (run.at_the_end or runs_lib.is_teacher(run)):
                axes.plot(points[0][-1:], points[1][-1:], "x", color=look_of["color"], markersize=8, markeredgewidth=2)
    if reference is not None:
        axes.axhline(reference[1], color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=reference[0])
    shown = np.concatenate([points[1] for *_, series in drawn for _, points in series])
    if shown.min() > 0 and shown.max() > 30 * shown.min():
        axes.set_yscale("log")
    axes.set(title=what.title, xlabel="epoch" if by_epochs else "training step", ylabel=what.unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    add_legend(figure, axes)
    return figure


def in_epochs(groups: Sequence[grouping.Group]) -> bool:
    """Whether the curves of these groups can be drawn over epochs."""
    return all(run.steps_per_epoch for group in groups for run in group.runs)


def _series(
    group: grouping.Group, what: Curve, *, by_epochs: bool
) -> list[tuple[runs_lib.Run, tuple[np.ndarray, np.ndarray]]]:
    found = []
    for run in group.runs:
        steps, values = runs_lib.curve(run.train if what.kind == "train" else run.evals, what.key)
        if what.second_half and len(steps):
            later = steps >= steps[-1] / 2
            steps, values = steps[later], values[later]
        if by_epochs:
            steps = steps / run.steps_per_epoch
        if len(steps):
            found.append((run, (steps, values * what.scale)))
    return found


def _mean(series: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray] | None:
    common = series[0][0]
    for steps, _ in series[1:]:
        common = np.intersect1d(common, steps)
    if not len(common):
        return None
    return common, np.mean([values[np.isin(steps, common)] for steps, values in series], axis=0)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages of neighbouring points, at most `_MOST_POINTS`."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), _MOST_POINTS)
    return np.array([steps[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def _line(axes: Any, steps: np.ndarray, values: np.ndarray, what: Curve, *, marker: str, **look_of: Any) -> None:
    few = len(steps) <= 30 and what.kind == "eval"
    steps, values = _thinned(steps, values)
    axes.plot(steps, values, marker=marker if few or len(steps) == 1 else None, markersize=4, **look_of)
