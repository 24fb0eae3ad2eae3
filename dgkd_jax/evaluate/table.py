"""Evaluations as a table for the terminal."""

from typing import Any

import numpy as np

from dgkd_jax.evaluate import corruptions


def table(summaries: list[dict[str, Any]]) -> str:
    """Evaluations as a table for the terminal; a corruption with all severities also gets a row with their mean."""
    taught = summaries[0]["teacher"] is not None
    header = ["set", "examples"]
    for figure in ("accuracy", "CE", "ECE"):
        header += [figure, "teacher's"] if taught else [figure]
    rows = [(*header, "agreement") if taught else tuple(header)]
    full = []
    for position, values in enumerate(summaries):
        rows.append(_row(values["data"], values))
        five = summaries[max(position - 4, 0) : position + 1]
        kind = values["data"].rsplit("-", 1)[0]
        if kind in corruptions.CORRUPTIONS and [v["data"] for v in five] == [
            f"{kind}-{s}" for s in corruptions.SEVERITIES
        ]:
            rows.append(_row(f"{kind}: mean", _mean(five)))
            full += five
    if len(full) == 5 * len(corruptions.CORRUPTIONS):
        rows.append(_row("corruptions: mean", _mean(full)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]
    restricted = sorted({values["restricted_to_classes"] for values in summaries} - {None})
    notes = ["CE in nats; ECE: expected calibration error, 15 bins"]
    if taught:
        notes.append("agreement: student and teacher choose the same class")
    if restricted:
        notes.append(f"sets with {' or '.join(map(str, restricted))} of the classes: the choice is among these alone")
    return "\n".join([*lines, "; ".join(notes)])


def _mean(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every figure over several sets."""
    first = summaries[0]
    mean = {"examples": first["examples"], "agreement": None, "teacher": None}
    for who in ("student", "teacher"):
        if first[who]:
            mean[who] = {key: float(np.mean([values[who][key] for values in summaries])) for key in first[who]}
    if first["teacher"]:
        mean["agreement"] = float(np.mean([values["agreement"] for values in summaries]))
    return mean


def _row(name: str, values: dict[str, Any]) -> tuple[str, ...]:
    networks = [values[who] for who in ("student", "teacher") if values[who]]
    agreement = [] if values["agreement"] is None else [f"{100 * values['agreement']:.2f} %"]
    return (
        name,
        f"{values['examples']:,}",
        *(f"{100 * network['accuracy']:.2f} %" for network in networks),
        *(f"{network['ce']:.3f}" for network in networks),
        *(f"{100 * network['ece']:.2f} %" for network in networks),
        *agreement,
    )
