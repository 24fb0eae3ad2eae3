"""Writes the results of studies as Markdown: every figure comes from the runs' files, comparisons are paired by seed.

A verdict needs two things: the difference from the baseline exceeds two standard errors, and its p-value (paired
t-test, corrected by Holm's method for all tests in the document) is below 5 %. Otherwise it is "not shown", beside the
difference that would have been seen; or, where two one-sided tests say so, within ± 0.3 points.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgkd_jax.report import significance
from dgkd_jax.study import inference, norms, rows

LEVEL = inference.LEVEL
WITHIN = 0.3  # points of accuracy that count as no difference
# Metrics of each run's last evaluation shown besides the accuracy: name in metrics.jsonl -> (heading, factor, digits).
MEASURES = {
    "agreement": ("agreement with the teacher, %", 100, 1),
    "logit_msd": ("‖z − v‖²", 1, 1),
    "ece": ("ECE, %", 100, 2),
    "nc1": ("NC1", 1, 3),
    "nc2_angles": ("NC2, angles", 1, 3),
    "nc3": ("NC3", 1, 3),
}


class Found(NamedTuple):
    """A study: its plan and its outcomes.

    Attributes:
        name: of the study.
        config: the file that defines it.
        about: one paragraph on data, teacher and student.
        baseline: the arm that the others are compared with.
        planned: (regime, arm, seed) of every run.
        rows: from `conduct.outcome`; finished runs also have "last", the metrics of their last evaluation.
        decides: see `plan.Study`.
        comparable: (regime, arm) pairs whose methods have the baseline's temperature, so that their gradients compare.
    """

    name: str
    config: str
    about: str
    baseline: str
    planned: Sequence[tuple[str, str, int]]
    rows: Sequence[dict[str, Any]]
    decides: bool = True
    comparable: frozenset[tuple[str, str]] = frozenset()


class Verdict(NamedTuple):
    """An arm against the baseline in one regime of one study, in points of accuracy.

    Attributes:
        differences: of each pair.
        corrected: p-value, corrected for all tests; None: too few pairs for a test.
        detectable: the true difference that the test would find with 80 % power; None likewise.
        decides: whether its study's comparisons are tested.
        is_equivalent: two one-sided tests at 5 % say that the true difference lies within ± WITHIN.
    """

    study: str
    regime: str
    arm: str
    comparison: significance.Comparison
    differences: tuple[float, ...]
    corrected: float | None = None
    detectable: float | None = None
    is_equivalent: bool = False
    decides: bool = True

    @property
    def says(self) -> str:
        """`better`, `worse`, `not shown`, `within ± 0.3`, `too few seeds` or `not tested`."""
        if not self.decides:
            return "not tested"
        if self.corrected is None:
            return "too few seeds" if self.comparison.pairs < significance.MIN_PAIRS else "not shown"
        if self.corrected < LEVEL and self.is_apart:
            return "better" if self.comparison.mean > 0 else "worse"
        return f"within ± {WITHIN}" if self.is_equivalent else "not shown"

    @property
    def is_apart(self) -> bool:
        """Whether the difference was tested and exceeds two standard errors, before any correction."""
        return self.comparison.p is not None and abs(self.comparison.mean) > 2 * self.comparison.standard_error


def verdicts(studies: Iterable[Found]) -> list[Verdict]:
    """Verdicts on all arms that share a seed with their regime's baseline; p-values are corrected over all of them."""
    found = []
    for study in studies:
        for regime, arm in _cells(study):
            pairs = _pairs(study, regime, arm, "last_accuracy")
            if arm != study.baseline and pairs:
                ours, baseline = zip(*pairs, strict=True)
                comparison = significance.paired([100 * v for v in ours], [100 * v for v in baseline])
                differences = tuple(100 * (a - b) for a, b in pairs)
                found.append(Verdict(study.name, regime, arm, comparison, differences, decides=study.decides))
    tested = [index for index, verdict in enumerate(found) if verdict.decides and verdict.comparison.p is not None]
    corrected = significance.holm([found[index].comparison.p for index in tested])
    for index, p in zip(tested, corrected, strict=True):
        count, error = found[index].comparison.pairs, found[index].comparison.standard_error
        found[index] = found[index]._replace(
            corrected=p,
            detectable=inference.smallest_detectable(error * count**0.5, count, tests=len(tested)),
            is_equivalent=inference.equivalence(found[index].differences, within=WITHIN) < LEVEL,
        )
    return found


def pooled(found: Iterable[Verdict]) -> dict[str, tuple[int, inference.Estimate]]:
    """Arm -> (number of cells, mean difference over them, where each has its own at random); arms of several cells."""
    of_arm: dict[str, list[Verdict]] = {}
    for verdict in found:
        if verdict.comparison.pairs > 1:
            of_arm.setdefault(verdict.arm, []).append(verdict)
    estimates = {}
    for arm, cells in of_arm.items():
        if len(cells) > 1:
            groups = [(cell.study, cell.regime) for cell in cells for _ in cell.differences]
            every = [difference for cell in cells for difference in cell.differences]
            estimates[arm] = len(cells), inference.pooled(every, [groups.index(group) for group in groups])
    return estimates


def picture_of(output: str, shows: str = "forest") -> Path:
    """The file of a picture beside a document: `forest`, or of a study `NAME_norms` or `NAME_sweep`."""
    return Path(output).parent / "figures" / f"{Path(output).stem}_{shows}.png"


def norms_of(study: Found) -> dict[str, list[norms.ArmNorms]]:
    """Regime -> the gradients of its comparable arms along the training, for regimes with two such arms or more."""
    found = {}
    for regime in dict.fromkeys(regime for regime, _ in _cells(study)):
        arms = [arm for other, arm in _cells(study) if other == regime and (regime, arm) in study.comparable]
        these = norms.of_regime([row for row in study.rows if row["regime"] == regime], arms)
        if len(these) > 1:
            found[regime] = these
    return found


def sweep_of(found: Iterable[Verdict]) -> dict[str, list[tuple[float, Verdict]]]:
    """Regime -> (setting, its difference from the baseline) by rising setting, of a study whose arms are numbers."""
    points: dict[str, list[tuple[float, Verdict]]] = {}
    for verdict in found:
        try:
            points.setdefault(verdict.regime, []).append((float(verdict.arm), verdict))
        except ValueError:
            return {}
    return {regime: sorted(these, key=lambda point: point[0]) for regime, these in points.items()}


def markdown(studies: Sequence[Found], *, options: str, output: str) -> str:
    """The whole document; it shows `picture_of(output)`, which `figures.forest` draws.

    Args:
        options: of the commands in the document, each after a space, for example " --seeds=5,6".
        output: the file that it will be written to.
    """
    command = "python -m dgkd_jax.study " + " ".join(f"--config={study.config}" for study in studies)
    command += f"{options} --results={output}"
    found = verdicts(studies)
    parts = [
        f"# Results: {', '.join(study.name for study in studies)}\n",
        f"Written by the command `{command}` from the files that the runs left; run the studies first:\n",
        "\n".join(f"    python -m dgkd_jax.study --config={study.config}{options}" for study in studies) + "\n",
        _answer(studies, found),
        f"![Differences from the baseline](figures/{picture_of(output).name})\n",
        "*Each arm's difference from the baseline in points of accuracy, with its 95 % interval over seeds; "
        f"grey: ± {WITHIN} points.*\n",
        _pooled_table(found),
        *(_study(study, [verdict for verdict in found if verdict.study == study.name], output) for study in studies),
        "## How to read this\n",
        "A verdict needs a difference from the baseline of more than two standard errors and a p-value (paired t-test, "
        f'corrected by Holm\'s method for all tests) below 5 %; else it is "not shown", or "within ± {WITHIN}" where '
        "two one-sided tests at 5 % say that the difference is no larger. Not shown does not mean absent: the column "
        '"would see" has the true difference that the test finds with a probability of 80 %. '
        "Accuracies are of the last epoch, in percent, mean ± standard deviation over seeds of the student (order, "
        "initial weights, augmentation). Differences are in points, ± their standard error. "
        "NC1–NC3 fall towards 0 as a network collapses (Papyan et al. 2020).\n",
    ]
    return "\n".join(parts)


def _answer(studies: Sequence[Found], found: list[Verdict]) -> str:
    lines = ["## The answer\n"]
    for study in studies:
        planned = Counter(regime for regime, _, _ in study.planned)
        done = Counter(row["regime"] for row in study.rows if row["status"] == "done")
        lines += [
            f"- {study.name}, {regime}: {done[regime]} of {runs} planned runs are done, so what is said of them is "
            "interim, and all corrected p-values are."
            for regime, runs in planned.items()
            if study.decides and done[regime] < runs
        ]
    names = {study.name for study in studies if study.decides}
    if not names:
        lines.append("- Nothing is tested: this only looks. Its intervals are over seeds, uncorrected.")
    else:
        lines += [*_better_and_worse(found, names), *_candidates(found, names), *_tests(found)]
    return "\n".join(lines) + "\n"


def _better_and_worse(found: list[Verdict], names: set[str]) -> list[str]:
    lines = []
    for says, title in (("better", "Better than the baseline"), ("worse", "Worse than the baseline")):
        where: dict[tuple[str, str], set[str]] = {}
        for verdict in found:
            if verdict.says == says:
                where.setdefault((verdict.regime, verdict.arm), set()).add(verdict.study)
        on_all = [f"{arm} ({regime})" for (regime, arm), sets in where.items() if sets == names]
        on_some = [
            f"{arm} ({regime}; {', '.join(sorted(sets))})" for (regime, arm), sets in where.items() if sets != names
        ]
        if len(names) == 1:
            lines.append(f"- {title}: {', '.join(on_all) or 'none'}.")
        else:
            lines.append(f"- {title} on every set: {', '.join(on_all) or 'none'}.")
            lines.append(f"- {title} on some: {', '.join(on_some) or 'none'}.")
    return lines


def _candidates(found: list[Verdict], names: set[str]) -> list[str]:
    """The arms that are ahead in every study, but not shown to be better in all."""
    ahead = Counter((v.regime, v.arm) for v in found if v.is_apart and v.comparison.mean > 0)
    shown = Counter((v.regime, v.arm) for v in found if v.says == "better")
    candidates = [
        f"{arm} ({regime})"
        for (regime, arm), sets in ahead.items()
        if sets == len(names) and shown[regime, arm] < len(names)
    ]
    if not candidates:
        return []
    everywhere = " on every set" if len(names) > 1 else ""
    return [
        f"- Not shown, but ahead by more than two standard errors{everywhere} before any correction, so to be looked "
        f"at again on fresh seeds: {', '.join(candidates)}."
    ]


def _tests(found: list[Verdict]) -> list[str]:
    tested = [verdict for verdict in found if verdict.corrected is not None]
    if not tested:
        return ["- No comparison has the three seeds that a test needs."]
    said = Counter(verdict.says for verdict in tested)
    typical = statistics.median(verdict.detectable for verdict in tested)
    spread = max(verdict.comparison.standard_error * verdict.comparison.pairs**0.5 for verdict in tested)
    needed = inference.pairs_needed(spread, WITHIN, tests=len(tested))
    others = (
        "; the others have fewer than three seeds, equal pairs, or are of a study that only looks"
        if len(tested) < len(found)
        else ""
    )
    return [
        f"- {len(tested)} of {len(found)} comparisons were tested{others}. Not shown: {said['not shown']}. "
        f"Within ± {WITHIN} points: {said[f'within ± {WITHIN}']}. "
        f"The tests would see {typical:.1f} points (median; 80 % power).",
        f"- The differences' largest standard deviation is {spread:.2f} points: to see {WITHIN} points with 80 % power "
        f"in each takes {needed} seeds.",
    ]


def _pooled_table(found: list[Verdict]) -> str:
    estimates = pooled(found)
    if not estimates:
        return ""
    lines = [
        "## Pooled over sets and regimes\n",
        "Each cell (a set and a regime) has a difference of its own, drawn at random (a mixed model).\n",
        "| arm | cells | difference, points | 95 % interval |",
        "|---|---|---|---|",
    ]
    for arm, (cells, (mean, error, (low, high))) in sorted(estimates.items(), key=lambda item: -item[1][1].mean):
        lines.append(f"| {arm} | {cells} | {mean:+.2f} ± {error:.2f} | {low:+.2f} … {high:+.2f} |")
    return "\n".join(lines) + "\n"


def _study(study: Found, found: list[Verdict], output: str) -> str:
    done = [row for row in study.rows if row["status"] == "done"]
    failed = [row for row in study.rows if row["status"] == "failed"]
    seconds_on: dict[str, list[float]] = {}
    for row in done:
        seconds_on.setdefault(_machine(row["machine"]), []).append(row["student"]["seconds"])
    several = len(seconds_on) > 1
    hours = [
        f"{sum(seconds) / 3600:.2f} hours of training{f' in {len(seconds)} runs' if several else ''} on {machine}"
        for machine, seconds in sorted(seconds_on.items())
    ]
    lines = [
        f"## {study.name}\n",
        f"{study.about} {len(done)} of {len(study.planned)} planned runs are done, {len(failed)} failed; "
        f"{'; '.join(hours) or 'none begun'}.\n",
    ]
    regimes = list(dict.fromkeys(regime for regime, _ in _cells(study)))
    for regime in regimes:
        lines += [f"### {study.name}: {regime}\n", *_table(study, regime, found), ""]
    lines += [_norms(study, output), _sweep(study, found, output)]
    for row in failed:
        lines.append(f"- failed: {row['regime']} / {row['arm']}, seed {row['seed']}: {row['error']}")
    missing: dict[str, list[str]] = {}
    for regime, arm in dict.fromkeys((regime, arm) for regime, arm, _ in study.planned):
        if (regime, arm) not in _cells(study):
            missing.setdefault(regime, []).append(arm)
    if missing:
        listed = "; ".join(f"{regime}: {', '.join(arms)}" for regime, arms in missing.items())
        lines.append(f"\nPlanned and not run, so nothing can be said of them: {listed}.\n")
    return "\n".join(lines)


def _norms(study: Found, output: str) -> str:
    of_regimes = norms_of(study)
    if not of_regimes:
        return ""
    found = {regime: (len(arms), norms.rank_correlation(arms)) for regime, arms in of_regimes.items()}
    said = [f"{regime} {rho:+.2f} ({count} arms)" for regime, (count, rho) in found.items() if rho is not None]
    lines = [
        f"### {study.name}: norms of the gradients\n",
        f"![Norms of the gradients](figures/{picture_of(output, f'{study.name}_norms').name})\n",
        "*Norm of TCKD's and of NCKD's gradient with respect to the logits along the training, and of both at the end "
        "beside the accuracy; arms with the baseline's temperature, means over seeds.*\n",
    ]
    if said:
        lines.append(f"Rank correlation of the norm at the end with the accuracy, over arms: {'; '.join(said)}.\n")
    return "\n".join(lines)


def _sweep(study: Found, found: list[Verdict], output: str) -> str:
    if not sweep_of(found):
        return ""
    return (
        f"![Differences along the sweep](figures/{picture_of(output, f'{study.name}_sweep').name})\n\n"
        "*Difference from the baseline in points of accuracy by the arm's setting, with 95 % intervals over seeds.*\n"
    )


def _table(study: Found, regime: str, found: list[Verdict]) -> list[str]:
    verdict_of = {verdict.arm: verdict for verdict in found if verdict.regime == regime}
    arms = [arm for r, arm in _cells(study) if r == regime]
    measures = {key: value for key, value in MEASURES.items() if any(_values(study, regime, a, key) for a in arms)}
    wide = {arm: interval for arm in arms if (interval := _wide_interval(study, regime, arm))}
    heading = ["arm", "seeds", "accuracy, %", f"− {study.baseline}", "p (Holm)", "would see", "verdict"]
    heading += ["95 % with teachers and test images"] if wide else []
    heading += [title for title, _, _ in measures.values()]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    for arm in arms:
        values = _values(study, regime, arm, "last_accuracy")
        cells = [arm, str(len(values)), _spread([100 * value for value in values], 2)]
        verdict = verdict_of.get(arm)
        if verdict is None:
            cells += ["", "", "", "baseline" if arm == study.baseline else "no pair"]
        else:
            error = verdict.comparison.standard_error
            shown = f"{verdict.comparison.mean:+.2f}" + ("" if error is None else f" ± {error:.2f}")
            p, seen = verdict.corrected, verdict.detectable
            cells += [shown, "–" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"]
            cells += ["–" if seen is None else f"{seen:.2f}", verdict.says]
        if wide:
            cells.append("{:+.2f} … {:+.2f}".format(*wide[arm]) if arm in wide else "")
        for key, (_, scale, digits) in measures.items():
            cells.append(_spread([scale * value for value in _values(study, regime, arm, key)], digits))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _wide_interval(study: Found, regime: str, arm: str) -> tuple[float, float] | None:
    """The interval of `inference.with_test_images`, where the rows have the wrong examples of three seeds or more."""
    of_arms = [
        {row["seed"]: row for row in study.rows if (row["regime"], row["arm"]) == (regime, name) and "wrong" in row}
        for name in (arm, study.baseline)
    ]
    seeds = sorted(of_arms[0].keys() & of_arms[1].keys())
    if arm == study.baseline or len(seeds) < significance.MIN_PAIRS:
        return None
    ours, theirs = (np.stack([rows.wrong_examples(one[seed]) for seed in seeds]) for one in of_arms)
    return inference.with_test_images(ours, theirs, [_teacher(of_arms[1][seed]) for seed in seeds]).interval


def _teacher(row: dict[str, Any]) -> str:
    """Seed and weights: on another machine the same seed gives another teacher."""
    return f"{row['teacher_seed']} {(row['teacher'] or {}).get('fingerprint', '')}"


def _cells(study: Found) -> list[tuple[str, str]]:
    """(regime, arm) pairs with a finished run, in the order of the plan."""
    done = {(row["regime"], row["arm"]) for row in study.rows if row["status"] == "done"}
    return [cell for cell in dict.fromkeys((regime, arm) for regime, arm, _ in study.planned) if cell in done]


def _by_seed(study: Found, regime: str, arm: str, key: str) -> dict[int, float]:
    found = {}
    for row in study.rows:
        if row["status"] == "done" and (row["regime"], row["arm"]) == (regime, arm):
            value = row["student"].get(key, row["last"].get(key))
            if isinstance(value, (int, float)) and math.isfinite(value):
                found[row["seed"]] = value
    return found


def _values(study: Found, regime: str, arm: str, key: str) -> list[float]:
    return list(_by_seed(study, regime, arm, key).values())


def _pairs(study: Found, regime: str, arm: str, key: str) -> list[tuple[float, float]]:
    ours, baseline = (_by_seed(study, regime, name, key) for name in (arm, study.baseline))
    return [(ours[seed], baseline[seed]) for seed in sorted(ours.keys() & baseline.keys())]


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean, deviation = significance.mean_and_deviation(values)
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _machine(machine: dict[str, Any]) -> str:
    return f"{machine['devices']} × {machine['device']} (jax {machine['jax']}, flax {machine['flax']})"
