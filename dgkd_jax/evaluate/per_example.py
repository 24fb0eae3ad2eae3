"""Writes the files of an evaluation in a work directory.

`evaluations/NAME.npz` holds the measurements of each example, `evaluations/NAME.json` the figures computed from them.
The JSON is written last: if it is there, the arrays are complete.
"""

import io
import json
import re
from typing import Any

import jax
import numpy as np
from etils import epath

from dgkd_jax.evaluate import calibration
from dgkd_jax.runs.files import write_whole


def summary(
    rows: dict[str, np.ndarray], *, data: str, step: int, classes: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The content of `evaluations/NAME.json`.

    Args:
        rows: from an `Evaluation`.
        data: name of the set, as the user gave it.
        step: of the checkpoint.
        classes: of the `EvaluationSet`.

    Returns:
        Accuracies and agreement in [0, 1], `ce` in nats, `logit_msd` the mean of ‖z − v‖². `teacher`, `agreement` and
        `logit_msd` are None without a teacher; `restricted_to_classes` is None if all classes were allowed.
    """

    def of(who: str) -> dict[str, float]:
        correct = rows[f"{who}_prediction"] == rows["label"]
        return {
            "accuracy": int(correct.sum()) / len(correct),
            "ce": float(rows[f"{who}_nll"].mean(dtype=np.float64)),
            "ece": calibration.calibration_error(rows[f"{who}_confidence"], correct),
        }

    taught = "teacher_prediction" in rows
    agreeing = rows["student_prediction"] == rows["teacher_prediction"] if taught else None
    return {
        "data": data,
        "examples": len(rows["label"]),
        "checkpoint_step": step,
        "student": of("student"),
        "teacher": of("teacher") if taught else None,
        "agreement": int(agreeing.sum()) / len(agreeing) if taught else None,
        "logit_msd": float(np.square(rows["logit_distance"], dtype=np.float64).mean()) if taught else None,
        "restricted_to_classes": None if classes is None else len(classes),
    }


def file_name(data: str) -> str:
    """The NAME of an evaluation's files: characters other than letters, digits, `.`, `_` and `-` become `_`."""
    return re.sub(r"[^\w.-]+", "_", data).strip("_")


def write(folder: epath.Path, values: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
    """Write both files of an evaluation, from the first process."""
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **rows)
    name = file_name(values["data"])
    (folder / f"{name}.json").unlink(missing_ok=True)  # must never be next to another evaluation's arrays
    write_whole(folder / f"{name}.npz", buffer.getvalue())
    write_whole(folder / f"{name}.json", json.dumps(values, indent=2) + "\n")


def is_there(folder: epath.Path, *, step: int, taught: bool) -> bool:
    """Whether `clean.json` is there for this step, with or without a teacher as `taught` says."""
    try:
        values = json.loads((folder / "clean.json").read_text())
        return values["checkpoint_step"] == step and (values["teacher"] is not None) == taught
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False  # missing or half-written
