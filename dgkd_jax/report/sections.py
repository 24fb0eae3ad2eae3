"""The sections of a report: their figures, tables and text, and what is missing and how to get it."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from dgkd_jax.methods import TERM_UNITS, needs_teacher
from dgkd_jax.report import (
    evaluations,
    figures,
    grouping,
    metric_lines,
    page,
    per_example,
    robustness,
    significance,
    tables,
    untrusted,
    work_directories,
)
from dgkd_jax.report.figures import Curve

# A function: (file's name, figure) -> SVG.
Draw = Callable[[str, Figure], str]

_ACCURACY = (
    Curve("accuracy", "eval", "Accuracy on the evaluation split", "accuracy [%]", 100),
    Curve("accuracy", "eval", "The same, second half of training", "accuracy [%]", 100, second_half=True),
    Curve("ce", "eval", "Cross-entropy on the evaluation split", "CE [nats]"),
    Curve("accuracy", "train", "Accuracy on training batches", "accuracy [%]", 100),
    Curve("loss", "train", "Training loss", "loss"),
    Curve("grad_norm", "train", "Gradient of the loss by the parameters", "norm"),
)
_PARTS = tuple(Curve(term, "train", f"{term} on training batches", unit) for term, unit in TERM_UNITS.items())
_GRADIENTS = (
    Curve("grad_similarity", "train", "Similarity of the two gradients", "mean cos(∇TCKD, ∇NCKD)"),
    Curve("covariance", "train", "Covariance of the two gradients", "covariance, normalised"),
    Curve("target_gradmag", "train", "Target gradient", "‖∇ mean TCKD‖"),
    Curve("nontarget_gradmag", "train", "Non-target gradient", "‖∇ mean NCKD‖"),
    Curve("target_norm", "train", "Target logits of the student", "norm over the batch"),
    Curve("nontarget_norm", "train", "Non-target logits of the student", "norm over the batch"),
)
_TEACHER = (
    Curve("logit_msd", "eval", "Distance of the logits, evaluation split", "mean ‖z − v‖²"),
    Curve("agreement", "eval", "Agreement with the teacher, evaluation split", "same top class [%]", 100),
    Curve("kl", "eval", "KL(teacher ‖ student), evaluation split", "KL at T = 1 [nats]"),
    Curve("logit_msd", "train", "Distance of the logits, training batches", "mean ‖z − v‖²"),
    Curve("agreement", "train", "Agreement with the teacher, training batches", "same top class [%]", 100),
)
_ECE = (Curve("ece", "eval", "Expected calibration error", "ECE [%]", 100),)
_COLLAPSE = (
    Curve("nc1", "eval", "NC1: variability within classes", "tr(Σ_W Σ_B⁺) / C"),
    Curve("nc2_norms", "eval", "NC2: class means of unequal norm", "coefficient of variation"),
    Curve("nc2_angles", "eval", "NC2: class means off equal angles", "mean |cos + 1/(C − 1)|"),
    Curve("nc3", "eval", "NC3: classifier against class means", "distance after normalising"),
    Curve("nc4", "eval", "NC4: network agrees with nearest mean", "share of examples"),
)
_LONGEST_CONFIGURATION = 100_000  # characters
_DIAGNOSE = "Evaluations record it with --config.diagnose=true: train anew with this version, in a new work directory."


def sections(
    groups: Sequence[grouping.Group], teachers: Sequence[work_directories.Run], *, draw: Draw
) -> list[page.Section]:
    """All sections about the runs of one data set, most important first.

    Args:
        groups: sections with figures show the first `figures.MOST_GROUPS`.
        teachers: the teachers' own runs.
        draw: writes a figure and returns it as SVG.
    """
    shown = groups[: figures.MOST_GROUPS]
    arrays: dict[str, dict[str, Any]] = {}

    def rows_of(run: work_directories.Run) -> dict[str, Any]:
        key = str(run.path)
        if key not in arrays:
            arrays[key] = evaluations.arrays(run.evaluations["clean"]) if "clean" in run.evaluations else {}
        return arrays[key]

    def section(name: str, title: str, make: Callable[..., str], *arguments: Any) -> page.Section:
        try:
            return page.Section(name, title, make(*arguments))
        except OSError:  # the folder cannot be written
            raise
        except Exception as error:  # so that the other sections are there, whatever stands in a file
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            sentence = f"This section could not be made ({reason}). The rest of the page does not depend on it."
            return page.Section(name, title, page.missing([sentence]))

    return [
        section("results", "Results", _results, groups, teachers),
        section("curves", "Accuracy and loss", _accuracy, shown, teachers, draw),
        section("gradients", "Gradient similarity and norms", _gradients, shown, draw),
        section("teacher", "Distance to the teacher", _to_the_teacher, shown, rows_of, draw),
        section("calibration", "Calibration", _calibration, shown, rows_of, draw),
        section("collapse", "Neural collapse", _collapse, shown, draw),
        section("features", "Features in two dimensions", per_example.features, shown, rows_of, draw),
        section("robustness", "Robustness", robustness.section, shown, draw),
        section("configurations", "Configurations", _configurations, groups),
        section("time", "Where the time went", _time, groups, teachers),
    ]


def _results(groups: Sequence[grouping.Group], teachers: Sequence[work_directories.Run]) -> str:
    compared = tables.compare(groups)
    body = page.paragraph(
        "Mean ± standard deviation over the seeds of the finished runs. last: after the last epoch. best: the highest "
        "of all evaluations; best is chosen on the evaluation split itself, so it is optimistic: quote last.",
        soft=True,
    )
    body += tables.groups_table(groups, compared, teachers)
    if compared:
        tests = sum(each.adjusted is not None for each in compared)
        corrected = f"p (Holm) is corrected for the {tests} comparisons of this table. " if tests else ""
        body += page.paragraph(
            "Differences are paired by seed: mean ± standard error, 95 % confidence interval and two-sided paired "
            f"t-test of the last accuracy. {corrected}Fewer than {significance.MIN_PAIRS} pairs: n too small. The test "
            "speaks of other seeds, not of other evaluation images.",
            soft=True,
        )
    elif len(groups) > 1:
        body += page.paragraph("No comparison: no run by dkd, kd or ce is finished as its baseline.", soft=True)
    body += _chance_of_the_split(groups)
    at_the_end = tables.last_evaluation(groups, teachers)
    if at_the_end:
        body += "<h3>At the last evaluation</h3>" + at_the_end
    every = [run for group in groups for run in group.runs]
    runs_table = tables.runs_table(groups, teachers)
    body += page.details(f"All {len(every)} runs", runs_table) if len(every) > 8 else "<h3>Runs</h3>" + runs_table
    if len(groups) > figures.MOST_GROUPS:
        body += page.paragraph(
            f"The sections with figures show the first {figures.MOST_GROUPS} of {len(groups)} groups; name fewer work "
            "directories to see the others."
        )
    return body + page.missing(
        [_unfinished(run) for run in every if not run.finished]
        + [note for run in [*every, *teachers] for note in run.notes]
        + [_thinned(run) for run in [*every, *teachers] if run.thinned]
    )


def _unfinished(run: work_directories.Run) -> str:
    reason = f": {run.failure}" if run.failure else ""
    return f"{run.path}: {tables.state(run)}{reason}. It is in no mean; the command that started it goes on with it."


def _thinned(run: work_directories.Run) -> str:
    return (
        f"{run.path}: {run.thinned:,} of its lines in metrics.jsonl are not in the curves: of each kind they show "
        f"up to {metric_lines.MOST_LINES:,}, evenly chosen, with the first, the last and the most accurate."
    )


def _chance_of_the_split(groups: Sequence[grouping.Group]) -> str:
    """A sentence on the binomial standard error of an accuracy on this evaluation split."""
    sizes = {(run.result.get("evaluation") or {}).get("examples") for group in groups for run in group.finished}
    values = [value for group in groups for value in tables.accuracies(group).values()]
    if len(sizes) != 1 or not values or not untrusted.is_number(size := sizes.pop()) or size < 1:
        return ""
    mean = significance.mean_and_deviation(values)[0]
    return page.paragraph(
        f"The evaluation split has {size:,} images: from them alone, an accuracy of {100 * mean:.1f} % has a standard "
        f"error of {100 * (mean * (1 - mean) / size) ** 0.5:.2f} points.",
        soft=True,
    )


def _accuracy(groups: Sequence[grouping.Group], teachers: Sequence[work_directories.Run], draw: Draw) -> str:
    text = page.paragraph(
        "Thin lines are single runs, thick ones means over seeds; a cross ends a run that is not finished. The "
        "training loss is each method's own objective and cannot be compared between methods. On training batches: "
        "augmented images, with the weights as they were at that step.",
        soft=True,
    )
    body = text + _curves(_ACCURACY, groups, draw, reference=_teachers_accuracy(groups, teachers))
    if teachers:
        own = [grouping.Group(run.name, [run]) for run in teachers]
        wanted = [_ACCURACY[0], _ACCURACY[4]]
        body += "<h3>The teacher's own run</h3>" + _curves(wanted, own, draw, prefix="own-run-of-the-teacher-")
    return body


def _teachers_accuracy(
    groups: Sequence[grouping.Group], teachers: Sequence[work_directories.Run]
) -> tuple[str, float] | None:
    """Label and value of a line in the accuracy figure, if there is one teacher."""
    values = {(run.result.get("teacher") or {}).get("last_accuracy") for group in groups for run in group.finished}
    values = {value for value in values if untrusted.is_number(value)}
    values = values or {
        value for run in teachers if (value := work_directories.of_student(run, "last_accuracy")) is not None
    }
    return ("teacher", 100 * values.pop()) if len(values) == 1 else None


def _curves(curves: Sequence[Curve], groups: Sequence[grouping.Group], draw: Draw, **knobs: Any) -> str:
    """The figures of `_drawn`, in a grid."""
    return page.figure_grid(_drawn(curves, groups, draw, **knobs))


def _drawn(
    curves: Sequence[Curve],
    groups: Sequence[grouping.Group],
    draw: Draw,
    *,
    reference: tuple[str, float] | None = None,
    prefix: str = "",
) -> list[tuple[str, str]]:
    """The figures of those metrics that a run has; `reference` is a line in the figures of evaluation accuracy."""
    drawn = []
    for what in curves:
        line = reference if (what.key, what.kind) == ("accuracy", "eval") else None
        figure = figures.curves(groups, what, reference=line)
        if figure is not None:
            name = f"{prefix}{what.key}-{what.kind}{'-second-half' if what.second_half else ''}"
            over = "epochs" if figures.in_epochs(groups) else "steps"
            drawn.append((f"{what.title} ({what.unit}) over the training {over}", draw(name, figure)))
    return drawn


def _lacking(curves: Sequence[Curve], groups: Sequence[grouping.Group]) -> list[str]:
    """The keys of the metrics that no run has."""

    def has(what: Curve) -> bool:
        lines = (run.train if what.kind == "train" else run.evals for group in groups for run in group.runs)
        return any(len(work_directories.curve(each, what.key)[0]) for each in lines)

    return [what.key for what in curves if not has(what)]


def _without_teacher(groups: Sequence[grouping.Group]) -> bool:
    return not any(needs_teacher(group.runs[0].method) for group in groups)


def _gradients(groups: Sequence[grouping.Group], draw: Draw) -> str:
    if _without_teacher(groups):
        return page.missing(["These need a teacher; every run here was trained by ce, without one."])
    lacking = _lacking(_GRADIENTS, groups)
    notes = [f'No "train" line of metrics.jsonl has {", ".join(lacking)}: train anew with this version.']
    text = page.paragraph(
        "TCKD is the target part of the distillation loss, NCKD the non-target part; gradients are by the student's "
        "logits. Similarity 1: both pull the same way; 0: at right angles.",
        soft=True,
    )
    parts = _curves(_PARTS, groups, draw)
    return (
        text
        + _curves(_GRADIENTS, groups, draw)
        + (f"<h3>Parts of the loss</h3>{parts}" if parts else "")
        + page.missing(notes if lacking else [])
    )


def _to_the_teacher(groups: Sequence[grouping.Group], rows_of: per_example.RowsOf, draw: Draw) -> str:
    if _without_teacher(groups):
        return page.missing(["Every run here was trained by ce, without a teacher."])
    lacking = _lacking([what for what in _TEACHER if what.kind == "eval"], groups)
    notes = [f'No "eval" line of metrics.jsonl has {", ".join(lacking)}. {_DIAGNOSE}'] if lacking else []
    confusion = per_example.confusion(groups, rows_of, draw)
    return (
        _curves(_TEACHER, groups, draw)
        + page.missing(notes)
        + f"<h3>Confusion of student against teacher</h3>{confusion}"
    )


def _calibration(groups: Sequence[grouping.Group], rows_of: per_example.RowsOf, draw: Draw) -> str:
    notes = [f'No "eval" line of metrics.jsonl has ece. {_DIAGNOSE}'] if _lacking(_ECE, groups) else []
    return per_example.calibration(groups, rows_of, draw, also=_drawn(_ECE, groups, draw)) + page.missing(notes)


def _collapse(groups: Sequence[grouping.Group], draw: Draw) -> str:
    text = page.paragraph(
        "Of the features before the classifier, on the evaluation split (Papyan, Han & Donoho 2020). In full collapse "
        "NC1, NC2 and NC3 are 0 and NC4 is 1.",
        soft=True,
    )
    lacking = _lacking(_COLLAPSE, groups)
    notes = [f'No "eval" line of metrics.jsonl has {", ".join(lacking)}. {_DIAGNOSE}'] if lacking else []
    return text + _curves(_COLLAPSE, groups, draw) + page.missing(notes)


def _configurations(groups: Sequence[grouping.Group]) -> str:
    differing = tables.differences(groups)
    if differing:
        body = page.paragraph(
            "The keys in which groups that read them differ; –: the method does not read it, or the run is from before "
            "the key. Seeds are above.",
            soft=True,
        )
    else:
        body = page.paragraph("Nothing differs but seeds and places.", soft=True)
    body += differing
    for group in groups:
        run = group.runs[0]
        content = json.dumps(run.config, indent=1, ensure_ascii=False)
        if len(content) > _LONGEST_CONFIGURATION:
            content = (
                f"{content[:_LONGEST_CONFIGURATION]}\n… {len(content):,} characters in all: {run.path}/config.json"
            )
        title = f"{group.label}: the whole configuration ({run.path}, seed {run.seed})"
        body += page.details(title, f"<pre>{page.escape(content)}</pre>")
    return body


def _time(groups: Sequence[grouping.Group], teachers: Sequence[work_directories.Run]) -> str:
    spent = tables.time_spent(groups, teachers)
    if not spent:
        return page.missing(['No "goodput" line in metrics.jsonl: train anew with this version.'])
    return page.paragraph("Mean of the runs, from the newest account of each; restarts are in it.", soft=True) + spent
