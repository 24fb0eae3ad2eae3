"""Draws a study's differences from its baseline as a forest plot or along a sweep, and its gradients' norms."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dgkd_jax.report.figures import COLOURS, look
from dgkd_jax.study.norms import NAMES, ArmNorms
from dgkd_jax.study.results import WITHIN, Verdict

_COLOURS = {"better": "tab:green", "worse": "tab:red"}
_LINEAR = 2.0  # points; a scale that reaches further is logarithmic beyond
_WIDEST = 4.0  # points below the median that the colours still tell apart
_MOST_NAMES = 8  # points that are named


def forest(verdicts: Sequence[Verdict], path: os.PathLike) -> None:
    """Write the plot as a PNG: a line for each arm, regimes beneath each other; an arm without interval is hollow."""
    regimes = list(dict.fromkeys((verdict.study, verdict.regime) for verdict in verdicts))
    shown = [
        sorted((v for v in verdicts if (v.study, v.regime) == regime), key=lambda v: v.comparison.mean)
        for regime in regimes
    ]
    heights = [len(arms) + 1.5 for arms in shown]
    with look():
        figure = Figure(figsize=(7.5, max(2.5, 0.19 * sum(heights))), layout="constrained")
        axes = figure.subplots(max(len(shown), 1), 1, sharex=True, height_ratios=heights or None, squeeze=False)[:, 0]
        for axis, (study, regime), arms in zip(axes, regimes, shown, strict=False):
            axis.axvspan(-WITHIN, WITHIN, color="0.9", zorder=0)
            axis.axvline(0, color="0.4", linewidth=0.8)
            for place, verdict in enumerate(arms):
                interval, colour = verdict.comparison.interval, _COLOURS.get(verdict.says, "tab:blue")
                if interval is not None:
                    axis.plot(interval, (place, place), color=colour, linewidth=1.2)
                filled = "none" if interval is None else "full"
                axis.plot(verdict.comparison.mean, place, "o", color=colour, markersize=4, fillstyle=filled)
            axis.set_yticks(range(len(arms)), [verdict.arm for verdict in arms], fontsize=7)
            axis.set_ylim(-0.7, len(arms) - 0.3)
            axis.set_title(f"{study}: {regime}", fontsize=8)
            axis.tick_params(axis="x", labelsize=7)
        label = "difference from the baseline, points of accuracy"
        reach = max((abs(end) for verdict in verdicts for end in _ends(verdict)), default=0.0)
        if reach > _LINEAR:
            axes[-1].set_xscale("symlog", linthresh=_LINEAR)
            label += f" (beyond ± {_LINEAR:g} logarithmic)"
        axes[-1].set_xlabel(label, fontsize=8)
        _save(figure, path)


def _ends(verdict: Verdict) -> tuple[float, ...]:
    return verdict.comparison.interval or (verdict.comparison.mean,)


def norms(of_regimes: Mapping[str, Sequence[ArmNorms]], path: os.PathLike) -> None:
    """Write a PNG: a row for each regime, each arm a line in the colour of its accuracy; at the right their ends."""
    with look():
        figure = Figure(figsize=(9.5, 2.6 * len(of_regimes)), layout="constrained")
        rows = figure.subplots(len(of_regimes), 3, squeeze=False)
        for (regime, arms), (*curves, ends) in zip(of_regimes.items(), rows, strict=True):
            accuracies = [arm.accuracy for arm in arms]
            # An arm that failed must not make all others one colour.
            lowest = max(min(accuracies), float(np.median(accuracies)) - _WIDEST)
            colour = ScalarMappable(Normalize(lowest, max(accuracies)), "viridis")
            for axis, (name, term) in zip(curves, NAMES.items(), strict=True):
                for arm in arms:
                    axis.plot(arm.progress, arm.norms[name], color=colour.to_rgba(arm.accuracy), linewidth=1.1)
                axis.set_title(f"{regime}: {term}", fontsize=8)
                axis.set_xlabel("share of the training", fontsize=8)
                axis.set_ylabel("norm of the gradient", fontsize=8)
            shown = [arm for arm in arms if arm.accuracy >= lowest]
            accuracy = [arm.accuracy for arm in shown]
            ends.scatter([arm.last for arm in shown], accuracy, s=14, c=colour.to_rgba(accuracy))
            ends.margins(x=0.4, y=0.15)  # room for the names
            ends.xaxis.set_major_locator(MaxNLocator(4))
            middle = sum(ends.get_xlim()) / 2
            for arm in shown if len(shown) <= _MOST_NAMES else ():
                side, inwards = (1, "left") if arm.last <= middle else (-1, "right")
                at, offset = (arm.last, arm.accuracy), (3 * side, 3)
                ends.annotate(arm.arm, at, offset, textcoords="offset points", ha=inwards, fontsize=6)
            ends.set_title(f"{regime}: at the end", fontsize=8)
            ends.set_xlabel("norm of both gradients", fontsize=8)
            ends.set_ylabel("accuracy, %", fontsize=8)
            bar = figure.colorbar(colour, ax=curves, pad=0.01)
            bar.set_label("accuracy, %", fontsize=8)
            for axis in (*curves, ends, bar.ax):
                axis.tick_params(labelsize=7)
        _save(figure, path)


def sweep(of_regimes: Mapping[str, Sequence[tuple[float, Verdict]]], path: os.PathLike) -> None:
    """Write a PNG: a panel for each regime, the difference from the baseline over the setting; at 0 it is 0."""
    columns = min(4, len(of_regimes))
    lines = -(-len(of_regimes) // columns)
    with look():
        figure = Figure(figsize=(2.5 * columns, 2.2 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for panel in panels.flat[len(of_regimes) :]:
            panel.set_visible(False)
        for panel, (regime, points) in zip(panels.flat, of_regimes.items(), strict=False):
            panel.axhspan(-WITHIN, WITHIN, color="0.9", zorder=0)
            panel.axhline(0, color="0.4", linewidth=0.8)
            settings, means = zip(*((setting, verdict.comparison.mean) for setting, verdict in points), strict=True)
            panel.plot(settings, means, color=COLOURS[0], linewidth=1, marker="o", markersize=3)
            for setting, verdict in points:
                if verdict.comparison.interval is not None:
                    panel.plot((setting, setting), verdict.comparison.interval, color=COLOURS[0], linewidth=1)
            panel.set_xscale("symlog", linthresh=0.3)
            panel.set_title(regime, fontsize=8)
            panel.tick_params(labelsize=7)
        figure.supxlabel("setting", fontsize=8)
        figure.supylabel("difference from the baseline, points of accuracy", fontsize=8)
        _save(figure, path)


def _save(figure: Figure, path: os.PathLike) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
