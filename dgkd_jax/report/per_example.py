"""The report's sections about each example of the evaluation split: confusion, calibration, features."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dgkd_jax.report import figures, grouping, page, pictures, tables, work_directories

# A function: (file's name, figure) -> SVG.
Draw = Callable[[str, Figure], str]
# A function: run -> the arrays of its clean evaluation, {} if there are none.
RowsOf = Callable[[work_directories.Run], dict[str, Any]]

_MOST_CLASSES = 2000  # of a confusion picture, whose counts take the square of it
_MOST_PICTURES = 12  # largest number of groups with confusion and feature pictures


def confusion(groups: Sequence[grouping.Group], rows_of: RowsOf, draw: Draw) -> str:
    """The examples for which student and teacher choose different classes, and which of them is right."""
    drawn, too_many = [], []
    for group, run in _pictured(groups):
        rows = rows_of(run)
        if "teacher_prediction" in rows and _classes(rows) > _MOST_CLASSES:
            too_many.append(f"{run.path}: no picture of the confusion of {_classes(rows):,} classes")
        elif "teacher_prediction" in rows:
            label = _of_run(group, run)
            figure = pictures.confusion_picture(label, rows["student_prediction"], rows["teacher_prediction"])
            drawn.append((f"Confusion of student and teacher, {label}", draw(f"confusion-{len(drawn)}", figure)))
    if not drawn and not too_many:
        return page.missing([_needs_evaluation("The confusion of student against teacher", groups)])
    text = page.paragraph(
        "Of the examples that the teacher puts into the class of the row, how many percent the student puts into the "
        "class of the column; clean evaluation split.",
        soft=True,
    )
    pictures_of = (text if drawn else "") + page.figure_grid(drawn) + page.missing(too_many)
    return tables.both(groups, rows_of) + pictures_of + _left_out(groups)


def _classes(rows: dict[str, Any]) -> int:
    return int(max(rows["student_prediction"].max(), rows["teacher_prediction"].max())) + 1


def _pictured(groups: Sequence[grouping.Group]) -> list[tuple[grouping.Group, work_directories.Run]]:
    """The groups to draw, each with its first run that has a clean evaluation."""
    found = []
    for group in groups[:_MOST_PICTURES]:
        run = next((run for run in group.runs if "clean" in run.evaluations), None)
        if run is not None:
            found.append((group, run))
    return found


def _of_run(group: grouping.Group, run: work_directories.Run) -> str:
    return f"{group.label}, seed {run.seed}" if len(group.runs) > 1 else group.label


def _left_out(groups: Sequence[grouping.Group]) -> str:
    if len(groups) <= _MOST_PICTURES:
        return ""
    return page.paragraph(
        f"Drawn for the first {_MOST_PICTURES} of {len(groups)} groups; name fewer work directories to see others.",
        soft=True,
    )


def _needs_evaluation(what: str, groups: Sequence[grouping.Group]) -> page.Markup:
    runs = [run for group in groups for run in group.runs]
    command = page.code(grouping.evaluate_command(runs, "clean"))
    return page.Markup(f"{page.escape(what)} needs evaluations/clean.npz. Make it: {command}")


def calibration(
    groups: Sequence[grouping.Group], rows_of: RowsOf, draw: Draw, *, also: Sequence[tuple[str, str]]
) -> str:
    """The reliability diagram, the accuracy per class, and the figures `also`."""
    shown, teacher = [], None
    for place, group in enumerate(groups):
        rows = [each for run in group.runs if "student_confidence" in (each := rows_of(run))]
        if rows:
            confidence = np.concatenate([each["student_confidence"] for each in rows])
            correct = np.concatenate([each["student_prediction"] == each["label"] for each in rows])
            shown.append((group.label, figures.style(place), confidence, correct))
            with_teacher = [each for each in rows if "teacher_confidence" in each]
            if teacher is None and with_teacher:
                first = with_teacher[0]
                right = first["teacher_prediction"] == first["label"]
                teacher = ("teacher", figures.OF_TEACHER, first["teacher_confidence"], right)
    drawn, notes = [], []
    if shown:
        figure = pictures.reliability_diagram(shown + ([teacher] if teacher else []))
        drawn.append(("Reliability diagram: accuracy against confidence", draw("reliability", figure)))
    else:
        notes.append(_needs_evaluation("The reliability diagram", groups))
    by_class = pictures.class_accuracies(groups)
    if by_class is not None:
        drawn.append(("Accuracy by class at the last evaluation", draw("class_accuracy", by_class)))
    text = page.paragraph(
        "Below the diagonal the network is surer than it is right. 15 bins of equal width; the expected calibration "
        "error (ECE) is the mean gap, weighted by the examples in a bin. Seeds of a group are pooled here, so this ECE "
        "is not the mean of the runs' own.",
        soft=True,
    )
    return text + page.figure_grid([*drawn, *also]) + page.missing(notes)


def features(groups: Sequence[grouping.Group], rows_of: RowsOf, draw: Draw) -> str:
    """The features on their first two principal components."""
    drawn = []
    for group, run in _pictured(groups):
        rows = rows_of(run)
        if {"embedding", "embedding_label"} <= rows.keys() and len(rows["embedding"]):
            label = _of_run(group, run)
            figure = pictures.feature_picture(label, rows["embedding"], rows["embedding_label"])
            drawn.append((f"Features in two dimensions, {label}", draw(f"features-{len(drawn)}", figure)))
    if not drawn:
        return page.missing([_needs_evaluation("The picture of the features", groups)])
    text = page.paragraph(
        "Features of the clean evaluation split on their first two principal components; the number is the class, at "
        "the median of its examples. Each picture has axes of its own.",
        soft=True,
    )
    return text + page.figure_grid(drawn) + _left_out(groups)
