"""The results of a run: the content of result.json, and the table on the terminal."""

import json
import math
from importlib.metadata import version
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dgkd_jax import __version__
from dgkd_jax.data.source import Source
from dgkd_jax.models.onednn import library as onednn
from dgkd_jax.runs.record import duration
from dgkd_jax.training.loop import Trained
from dgkd_jax.training.teacher import Taught


def describe(
    config: ConfigDict, workdir: epath.Path, trained: Trained, *, source: Source, taught: Taught | None
) -> dict[str, Any]:
    """The content of a finished run's result.json."""
    history = trained.history
    return {
        "name": config.name,
        "method": config.method,
        "seed": config.seed,
        "workdir": str(workdir),
        "mock": config.data.mock,
        "evaluation": {
            "split": source.eval_split,
            "examples": source.num_eval,
            "note": "best_accuracy is the highest of all evaluations on this split, so it was chosen on it; "
            "last_accuracy was not",
        },
        "teacher": taught and _teacher_row(taught, workdir),
        "student": {
            "model": config.student.model,
            "parameters": trained.parameters,
            "last_accuracy": history.last_accuracy,
            "best_accuracy": history.best_accuracy,
            "best_epoch": history.best_step / source.steps_per_epoch(config.batch_size),
            "epochs": config.epochs,
            "seconds": history.seconds,
        },
        "machine": {
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "convolutions": onednn.name(),
            "dgkd_jax": __version__,
            **{package: version(package) for package in ("jax", "flax")},
        },
    }


def _teacher_row(taught: Taught, workdir: epath.Path) -> dict[str, Any]:
    """The teacher's entry in `result.json`; an entry from an earlier run is kept, so it is not evaluated again."""
    try:
        before = json.loads((workdir / "result.json").read_text())["teacher"]
    except (FileNotFoundError, ValueError):
        before = None
    if before and before["fingerprint"] == taught.row["fingerprint"]:
        return before
    return taught.row | taught.evaluation()


def table(results: list[dict[str, Any]]) -> str:
    """The results of one data set as a table for the terminal."""
    first = results[0]
    rows = [("", "model", "parameters", "last", "best (epoch)", "training")]
    if first["teacher"]:
        rows.append(_row("teacher", first["teacher"]))
    rows += [_row(result["method"], result["student"]) for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_align(i, cell, width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    evaluation = first["evaluation"]
    mock = ", mock data: the accuracies mean nothing" if first["mock"] else ""
    return "\n".join(
        [
            f"{first['name']}: accuracy on {evaluation['examples']:,} images of split "
            f"'{evaluation['split']}', seed {first['seed']}{mock}",
            *(line.rstrip() for line in lines),
            "last: after the last epoch. best: the highest of all epochs, chosen on this same split.",
        ]
    )


def _row(title: str, network: dict[str, Any]) -> tuple[str, ...]:
    def percent(key: str) -> str:
        accuracy = network.get(key)
        return "–" if accuracy is None or math.isnan(accuracy) else f"{100 * accuracy:.2f} %"

    epoch = f" ({network['best_epoch']:.4g})" if "best_epoch" in network else ""
    seconds = network["seconds"]
    return (
        title,
        network["model"],
        f"{network['parameters']:,}",
        percent("last_accuracy"),
        percent("best_accuracy") + epoch,
        "–" if seconds is None else duration(seconds),
    )


def _align(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)
