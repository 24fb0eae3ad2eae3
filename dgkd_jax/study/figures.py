"""Draws a study's differences from its baseline with their intervals (a forest plot)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_NEGLIGIBLE = 0.3  # points, shaded


def forest(verdicts: Sequence[Any], path: os.PathLike) -> None:
    """Write the plot as a PNG: one line for each arm of each regime, the regimes beneath each other.

    Args:
        verdicts: `results.Verdict`s; an arm without an interval is a point.
    """
    regimes = list(dict.fromkeys((verdict.study, verdict.regime) for verdict in verdicts))
    shown = [[v for v in verdicts if (v.study, v.regime) == regime] for regime in regimes]
    heights = [len(each) + 1.5 for each in shown]
    figure = Figure(figsize=(7.5, max(2.0, 0.19 * sum(heights))), layout="constrained")
    axes = figure.subplots(len(shown) or 1, 1, sharex=True, height_ratios=heights or None, squeeze=False)[:, 0]
    for axis, (study, regime), arms in zip(axes, regimes, shown, strict=False):
        axis.axvspan(-_NEGLIGIBLE, _NEGLIGIBLE, color="0.9", zorder=0)
        axis.axvline(0, color="0.4", linewidth=0.8)
        for place, verdict in enumerate(sorted(arms, key=lambda verdict: verdict.comparison.mean)):
            mean, interval = verdict.comparison.mean, verdict.comparison.interval
            color = {"better": "tab:green", "worse": "tab:red"}.get(verdict.says, "tab:blue")
            if interval is not None:
                axis.plot(interval, (place, place), color=color, linewidth=1.2)
            axis.plot(
                mean,
                place,
                "o",
                color=color,
                markersize=4,
                fillstyle="full" if interval else "none",
            )
        axis.set_yticks(range(len(arms)), [v.arm for v in sorted(arms, key=lambda v: v.comparison.mean)], fontsize=7)
        axis.set_ylim(-0.7, len(arms) - 0.3)
        axis.set_title(f"{study}: {regime}", fontsize=8, loc="left")
        axis.tick_params(axis="x", labelsize=7)
    axes[-1].set_xscale("symlog", linthresh=2.0)
    axes[-1].set_xlabel(
        "difference from the baseline, points of accuracy (beyond ± 2 the scale is logarithmic)", fontsize=8
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
