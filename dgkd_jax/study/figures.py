"""Draws a study's differences from its baseline with their intervals (a forest plot)."""

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dgkd_jax.report.figures import look
from dgkd_jax.study.results import WITHIN, Verdict

_COLOURS = {"better": "tab:green", "worse": "tab:red"}


def forest(verdicts: Sequence[Verdict], path: os.PathLike) -> None:
    """Write the plot as a PNG: a line for each arm, regimes beneath each other; an arm without interval is hollow."""
    regimes = list(dict.fromkeys((verdict.study, verdict.regime) for verdict in verdicts))
    shown = [
        sorted((v for v in verdicts if (v.study, v.regime) == regime), key=lambda v: v.comparison.mean)
        for regime in regimes
    ]
    heights = [len(arms) + 1.5 for arms in shown]
    with look():
        figure = Figure(figsize=(7.5, max(2.0, 0.19 * sum(heights))), layout="constrained")
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
        axes[-1].set_xscale("symlog", linthresh=2.0)
        axes[-1].set_xlabel("difference from the baseline, points of accuracy (beyond ± 2 logarithmic)", fontsize=8)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
