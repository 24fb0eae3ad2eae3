"""What a comparison found: a table for the terminal and a file for programs."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dgkd_jax.errors import BadInput

Row = dict[str, Any]

# Recorded PyTorch figures, for where torch is not installed. They lie beside the package in a clone, not inside it.
FIXTURES = Path(__file__).parents[2] / "tests" / "golden"


class Report(NamedTuple):
    """One sub-command's findings.

    Attributes:
        title: what was compared.
        reference: what with: a version of PyTorch, or the fixtures.
        shown: rows of the table on the terminal; `passed` in each that is held to a tolerance.
        rows: everything measured, for the JSON file.
        notes: lines below the table.
    """

    title: str
    reference: str
    shown: list[Row]
    rows: list[Row]
    notes: list[str]

    @property
    def passed(self) -> bool:
        return all(row.get("passed", True) for row in [*self.shown, *self.rows])


def fixtures(folder: str) -> Path:
    """`tests/golden/FOLDER` of this clone.

    Raises:
        BadInput: it is not there.
    """
    found = FIXTURES / folder
    if not found.is_dir():
        raise BadInput(
            f"neither torch nor the recorded figures ({found}) are here: "
            "python -m pip install 'torch>=2.4', or run from a clone of the repository"
        )
    return found


def effect(deviation: str, setting: str, quantity: str, value: float | None) -> Row:
    """One measured figure that no tolerance judges; with `value` None, `quantity` holds the reason."""
    return {"deviation": deviation, "setting": setting, "quantity": quantity, "value": value}


def relative_error(found: np.ndarray, expected: np.ndarray, *, floor: float = 0.0) -> float:
    """Largest difference over the largest expected magnitude, or over `floor` where that is larger.

    NaN anywhere gives infinity. The floor is at least 1e-12: where all that is expected is 0, so may be its rounding.
    """
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), floor, 1e-12)
    return float(error) if math.isfinite(error) else math.inf


def text(report: Report) -> str:
    """The report as lines for the terminal."""
    lines = [f"{report.title}, against {report.reference}", ""]
    if report.shown:
        lines += _table(report.shown)
    lines += ["", *report.notes] if report.notes else []
    if not any("passed" in row for row in report.rows):
        return "\n".join(lines)
    missed = sum(not row["passed"] for row in report.rows)
    verdict = f"{missed} of {len(report.rows)} comparisons missed their tolerance"
    return "\n".join([*lines, "", f"all {len(report.rows)} comparisons passed" if report.passed else verdict])


def write(report: Report, path: str) -> None:
    """Write everything that was measured as JSON.

    Raises:
        BadInput: the file cannot be written.
    """
    content = report._asdict() | {"passed": report.passed}
    try:
        Path(path).write_text(json.dumps(_plain(content), indent=1) + "\n")
    except OSError as error:
        raise BadInput(f"--output={path}: cannot be written: {error.strerror}") from error


def _table(rows: list[Row]) -> list[str]:
    columns = list(rows[0])
    cells = [columns, *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)


def _plain(value: Any) -> Any:
    """JSON has no infinity: it becomes the string "inf"."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
