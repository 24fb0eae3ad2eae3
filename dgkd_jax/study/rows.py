"""Keeps one line for each finished run of a study in a file that is committed: its work directory may be lost."""

import base64
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dgkd_jax.errors import BadInput
from dgkd_jax.runs import config as config_rules
from dgkd_jax.study.plan import Run

_CURVES = ("target_gradmag", "nontarget_gradmag", "tckd", "nckd", "accuracy")  # of the training images
_POINTS = 10  # of each curve
_NEEDED = {"regime", "arm", "seed", "made_by", "status"}


def made_by(run: Run) -> str:
    """Eight hexadecimal digits that change with every key that decides the run or its teacher's own training."""
    of_both = [config_rules.identity(config) for config in (run.config, config_rules.of_teacher(run.config))]
    return f"{zlib.crc32(json.dumps(of_both, sort_keys=True).encode()):08x}"


def read(path: str) -> list[dict[str, Any]]:
    """The rows of a file, in its order; [] if there is no file.

    Raises:
        BadInput: a line is no row.
    """
    if not os.path.exists(path):
        return []
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not row.keys() >= _NEEDED:
            raise BadInput(f"{path}, line {number} is no row of a study; mend or remove it")
        rows.append(row)
    return rows


def find(rows: Iterable[dict[str, Any]], run: Run) -> dict[str, Any] | None:
    """The row of a run, if it was made with the same settings."""
    wanted = (run.regime, run.arm, run.seed, made_by(run))
    for row in rows:
        if (row["regime"], row["arm"], row["seed"], row["made_by"]) == wanted:
            return row
    return None


def append(path: str, run: Run, outcome: dict[str, Any]) -> None:
    """Add the row of a finished run; a line is written whole.

    Args:
        outcome: of `conduct.outcome`, of a run that is done.
    """
    row = {key: value for key, value in outcome.items() if key != "workdir"} | {
        "made_by": made_by(run),
        "teacher_seed": run.config.teacher.seed,
        "curves": _curves(run.workdir),
        "wrong": _wrong(run.workdir),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def wrong_examples(row: dict[str, Any]) -> np.ndarray:
    """Which evaluated examples the student got wrong: bool `[examples]`, in the order of the split."""
    packed = np.frombuffer(zlib.decompress(base64.b85decode(row["wrong"]["bits"])), np.uint8)
    return np.unpackbits(packed, count=row["wrong"]["examples"]).astype(bool)


def _wrong(workdir: str) -> dict[str, Any]:
    with np.load(Path(workdir, "evaluations", "clean.npz")) as evaluated:
        wrong = evaluated["student_prediction"] != evaluated["label"]
    bits = base64.b85encode(zlib.compress(np.packbits(wrong).tobytes(), 9)).decode()
    return {"examples": len(wrong), "bits": bits}


def _curves(workdir: str) -> dict[str, list[float]]:
    """Training metrics at up to ten places along the run, each the mean since the log before it."""
    lines = map(json.loads, Path(workdir, "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if line["kind"] == "train"]
    places = sorted({round(place) for place in np.linspace(0, len(logged) - 1, _POINTS)})
    kept = [logged[place] for place in places]
    curves = {name: [float(f"{line[name]:.5g}") for line in kept] for name in _CURVES if name in logged[0]}
    return {"step": [line["step"] for line in kept]} | curves
