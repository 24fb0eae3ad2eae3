"""Reads the evaluations of a work directory: their summaries and, when they are needed, their arrays by example."""

import io
import zipfile
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dgkd_jax.report.untrusted import LARGEST, is_number, json_object, text_of

_MOST_CLASSES = 1_000_000
_MOST_ARRAY_BYTES = 4 << 30  # of one evaluation


class Evaluation(NamedTuple):
    """An evaluation of a run: `evaluations/NAME.json` and the path of its arrays.

    Attributes:
        summary: content of the JSON.
        arrays: path of `NAME.npz`.
    """

    summary: dict[str, Any]
    arrays: epath.Path


def read(folder: epath.Path, notes: list[str]) -> dict[str, Evaluation]:
    """The evaluations in a folder, by name of the set; about each that is damaged a sentence is added to `notes`."""
    if not folder.is_dir():
        return {}
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json_object(path, notes)
        if content is None or not isinstance(content.get("student"), dict):
            continue
        summary: dict[str, Any] = {"data": text_of(content.get("data", path.stem))}
        for who in ("student", "teacher"):
            section = content.get(who) if isinstance(content.get(who), dict) else {}
            accuracy = section.get("accuracy")
            summary[who] = {"accuracy": accuracy} if is_number(accuracy) and 0 <= accuracy <= 1 else {}
            if "accuracy" in section and not summary[who] and accuracy is not None:
                notes.append(f"{path}: the accuracy of the {who} is left out, it is damaged: {text_of(accuracy)[:40]}")
        summary["restricted_to_classes"] = bool(content.get("restricted_to_classes"))
        found[summary["data"]] = Evaluation(summary, folder / f"{path.stem}.npz")
    return found


def arrays(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """The arrays of an evaluation, those that are as they should be; {} if they are not readable.

    By example: `label` and predictions are classes, confidences in [0, 1]. Of some examples: `embedding` `[_, 2]` and
    `embedding_label`.
    """
    try:
        content = io.BytesIO(evaluation.arrays.read_bytes())
        with zipfile.ZipFile(content) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_ARRAY_BYTES:
                return {}
        with np.load(content) as stored:
            found = dict(stored)
    except Exception:  # a damaged archive makes zipfile and numpy raise anything
        return {}
    rows = {name: array for name, array in found.items() if array.ndim == 1 and array.dtype.kind in "iuf"}
    fine = {name: array for name, array in rows.items() if _is_as_it_should_be(name, array)}
    embedding, of = found.get("embedding"), fine.pop("embedding_label", None)
    examples = len(fine["label"]) if "label" in fine else 0
    fine = {name: array for name, array in fine.items() if len(array) == examples > 0}
    if (
        of is not None
        and embedding is not None
        and embedding.dtype.kind == "f"
        and embedding.shape == (len(of), 2)
        and bool((np.abs(embedding.astype(np.float64)) < LARGEST).all())
    ):
        fine |= {"embedding": embedding, "embedding_label": of}
    for who, needed in (("student", "student"), ("teacher", "student"), ("teacher", "teacher")):
        if f"{needed}_prediction" not in fine:  # without it nothing else of this network is of use
            fine = {name: array for name, array in fine.items() if not name.startswith(f"{who}_")}
    return fine if "student_prediction" in fine or "embedding" in fine else {}


def _is_as_it_should_be(name: str, array: np.ndarray) -> bool:
    if name == "label" or name.endswith(("_prediction", "_label")):
        return array.dtype.kind in "iu" and bool(((array >= 0) & (array < _MOST_CLASSES)).all())
    if name.endswith("_confidence"):
        return array.dtype.kind == "f" and bool(((array >= 0) & (array <= 1)).all())
    return True
