"""Draws DGKD's loss and its parts for three classes: the target and two others.

A student is then a point (p, s): p is its probability of the target, s the first other class's share of the rest. The
teacher is (q, t). The figures, one PNG each:

    target.png     TCKD, NCKD, coupling and total over p and q, with the p that minimises the total for each q
    student.png    the same over all students (p, s) for one teacher, with the minimum
    profiles.png   total and parts along p (s = t) and along s (p = q): the two cuts through the teacher's point
    direction.png  where the coupling pushes against DKD's own gradient, and where along it

Losses are per sample and without cross-entropy, at any temperature (p, q, s and t are probabilities at it).
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from dgkd_jax import losses
from dgkd_jax.data import quiet
from dgkd_jax.errors import ArgumentParser, BadInput, exit_code_of

CLASSES = 3
_CELLS = 161  # per axis; odd, so that 1/2 is on the grid
_EDGE = 0.005  # the grid's distance from 0 and 1, where KL is unbounded
_UNIT = "T²·nats"
_PARTS = ("tckd", "nckd", "coupling", "total")


class Settings(NamedTuple):
    """The loss, and the teacher and student where a figure holds them fixed.

    Attributes:
        temperature, alpha, beta, epsilon, convention, kappa: as for `losses.dgkd`.
        batch: the batch size in `literal` and `normalized`.
        teacher_target, teacher_share: q and t, in (0, 1).
        student_share: s in the figure over p and q, in (0, 1).
    """

    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0
    epsilon: float = 0.1
    convention: str = "per_sample"
    kappa: float = 1e-8
    batch: int = 64
    teacher_target: float = 0.8
    teacher_share: float = 0.7
    student_share: float = 0.5


class Landscape(NamedTuple):
    """The weighted parts of the loss at each point of a grid, and the cosine of two gradients.

    Attributes:
        tckd: α·TCKD.
        nckd: β·NCKD.
        coupling: the function whose gradient the convention descends: −ε·G; for conventions that divide by G it is
            −ε·log(1 + G/κ), because the value itself is nearly the constant −ε.
        total: their sum.
        opposition: cos(∇DKD, ∇G) with respect to the logits; above 0 the coupling (ε > 0) pushes against DKD.
    """

    tckd: np.ndarray
    nckd: np.ndarray
    coupling: np.ndarray
    total: np.ndarray
    opposition: np.ndarray


def evaluate(p, s, q, t, settings: Settings) -> Landscape:
    """The loss of students (p, s) against teachers (q, t).

    Args:
        p, s, q, t: probabilities in (0, 1) that broadcast to one shape.
        settings: of the loss; its teacher and student are not read.

    Returns:
        Arrays of the broadcast shape, float64.
    """
    p, s, q, t = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (p, s, q, t)))
    z, v = (
        settings.temperature * np.log(np.stack([target, (1 - target) * share, (1 - target) * (1 - share)], -1))
        for target, share in ((p, s), (q, t))
    )
    inputs = z, v, np.zeros(p.shape, np.int32)
    at = {"temperature": settings.temperature}

    def coupling(student, teacher):
        one = student[None], teacher[None], np.zeros(1, np.int32)
        return losses.gradient_coupling(*one, convention="per_sample", **at)

    with jax.enable_x64(True):
        tckd = settings.alpha * np.asarray(losses.tckd(*inputs, **at))
        nckd = settings.beta * np.asarray(losses.nckd(*inputs, **at))
        of_dkd = settings.alpha * losses.tckd_gradient(*inputs, **at) + settings.beta * losses.nckd_gradient(
            *inputs, **at
        )
        flat = (logits.reshape(-1, CLASSES) for logits in (z, v))
        g, of_g = jax.jit(jax.vmap(jax.value_and_grad(coupling)))(*flat)
        g, of_g, of_dkd = (np.asarray(x) for x in (g, of_g, of_dkd))
    g, of_g = g.reshape(p.shape), of_g.reshape(z.shape)
    coupled = _coupled(g, settings)
    lengths = np.linalg.norm(of_dkd, axis=-1) * np.linalg.norm(of_g, axis=-1)
    cosine = np.divide((of_dkd * of_g).sum(-1), lengths, out=np.zeros(p.shape), where=lengths > 0)
    return Landscape(tckd, nckd, coupled, tckd + nckd + coupled, cosine)


def _coupled(g: np.ndarray, settings: Settings) -> np.ndarray:
    per_literal = float(settings.batch) ** 2 * CLASSES
    if settings.convention == "per_sample":
        return -settings.epsilon * g
    if settings.convention == "literal":
        return -settings.epsilon * g / per_literal
    kappa = settings.kappa if settings.convention == "self_normalized" else losses.NORMALIZED_GUARD * per_literal
    return -settings.epsilon * np.log1p(g / kappa)


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def over_target(settings: Settings) -> Figure:
    """The parts over p and q, for fixed s and t."""
    axis = _grid()
    found = evaluate(axis[None, :], settings.student_share, axis[:, None], settings.teacher_share, settings)
    figure = _figure(settings, f"s = {settings.student_share:g}, t = {settings.teacher_share:g}")
    lowest = axis[np.argmin(found.total, axis=1)]
    for axes, part in zip(figure.subplots(2, 2).flat, _PARTS, strict=True):
        _map(axes, axis, axis, getattr(found, part), _title(part, settings))
        axes.set_ylim(0, 1)
        axes.plot([0, 1], [0, 1], color="white", linestyle=":", linewidth=1.2, label="p = q")
        if part == "total":
            _line(axes, lowest, axis, label="lowest total for each q")
        _label(axes, "p: student's probability of the target", "q: teacher's probability of the target")
        axes.legend(loc="upper left", facecolor="#555555", labelcolor="white", framealpha=0.9)
    return figure


def over_students(settings: Settings) -> Figure:
    """The parts over all students (p, s), for one teacher."""
    axis = _grid()
    q, t = settings.teacher_target, settings.teacher_share
    found = evaluate(axis[None, :], axis[:, None], q, t, settings)
    figure = _figure(settings, f"teacher: q = {q:g}, t = {t:g}")
    row, column = np.unravel_index(np.argmin(found.total), found.total.shape)
    for axes, part in zip(figure.subplots(2, 2).flat, _PARTS, strict=True):
        _map(axes, axis, axis, getattr(found, part), _title(part, settings))
        axes.set_ylim(0, 1)
        _teacher(axes, q, t)
        if part == "total":
            lowest = f"lowest: p = {axis[column]:.2f}, s = {axis[row]:.2f}"
            _point(axes, axis[column], axis[row], label=lowest)
        _label(axes, "p: student's probability of the target", "s: share of the first other class")
        axes.legend(loc="lower left", facecolor="#555555", labelcolor="white", framealpha=0.9)
    return figure


def profiles(settings: Settings) -> Figure:
    """Total and parts along p with s = t, and along s with p = q."""
    axis = _grid()
    q, t = settings.teacher_target, settings.teacher_share
    figure = _figure(settings, f"teacher: q = {q:g}, t = {t:g}", size=(11, 5))
    cuts = (
        (evaluate(axis, t, q, t, settings), q, f"p (s = t = {t:g})"),
        (evaluate(q, axis, q, t, settings), t, f"s (p = q = {q:g})"),
    )
    styles = (
        ("tckd", "#0072B2", "--"),
        ("nckd", "#009E73", "-."),
        ("coupling", "#D55E00", ":"),
        ("total", "black", "-"),
    )
    for axes, (found, teacher, name) in zip(figure.subplots(1, 2), cuts, strict=True):
        for part, colour, line in styles:
            axes.plot(
                axis, getattr(found, part), color=colour, linestyle=line, linewidth=2, label=_title(part, settings)
            )
        index = np.argmin(found.total)
        axes.axvline(teacher, color="#777777", linewidth=1, label="teacher")
        axes.plot(axis[index], found.total[index], "o", color="black", label=f"lowest total: {axis[index]:.2f}")
        shown = np.concatenate([np.quantile(getattr(found, part), [0.03, 0.97]) for part in _PARTS])
        room = 0.08 * np.ptp(shown)
        axes.set_ylim(shown.min() - room, shown.max() + room)
        axes.grid(alpha=0.3)
        _label(axes, name, f"loss ({_UNIT})")
        axes.legend(fontsize="small")
    return figure


def direction(settings: Settings) -> Figure:
    """cos(∇DKD, ∇G) over all students, for one teacher."""
    axis = _grid()
    q, t = settings.teacher_target, settings.teacher_share
    found = evaluate(axis[None, :], axis[:, None], q, t, settings)
    figure = _figure(settings, f"teacher: q = {q:g}, t = {t:g}", size=(7.5, 6))
    axes = figure.subplots()
    drawn = axes.contourf(axis, axis, found.opposition, levels=np.linspace(-1, 1, 21), cmap="PuOr_r")
    axes.contour(axis, axis, found.opposition, levels=[0.0], colors="black", linewidths=1)
    bar = figure.colorbar(drawn, ax=axes, ticks=np.linspace(-1, 1, 5))
    bar.set_label("cos(∇DKD, ∇G), with respect to the logits")
    against = "against" if settings.epsilon > 0 else "along"
    along = "along" if settings.epsilon > 0 else "against"
    axes.set_title(f"Orange: the coupling pushes {against} DKD; purple: {along} it")
    axes.set_ylim(0, 1)
    _teacher(axes, q, t)
    _label(axes, "p: student's probability of the target", "s: share of the first other class")
    axes.legend(loc="lower left", facecolor="#555555", labelcolor="white")
    return figure


FIGURES = {"target": over_target, "student": over_students, "profiles": profiles, "direction": direction}


def _grid() -> np.ndarray:
    return np.linspace(_EDGE, 1 - _EDGE, _CELLS)


def _figure(settings: Settings, held: str, *, size: tuple[float, float] = (11, 9)) -> Figure:
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    loss = f"{settings.convention}, ε = {settings.epsilon:g}, α = {settings.alpha:g}, β = {settings.beta:g}"
    if settings.convention in ("literal", "normalized"):
        loss += f", batch {settings.batch}"
    if settings.convention == "self_normalized":
        loss += f", κ = {settings.kappa:g}"
    figure.suptitle(f"DGKD, {loss}, T = {settings.temperature:g}\nthree classes; {held}", fontsize="large")
    return figure


def _title(part: str, settings: Settings) -> str:
    if part == "coupling":
        divided = settings.convention in ("normalized", "self_normalized")
        return "coupling: −ε·log(1 + G/κ)" if divided else "coupling: −ε·G"
    return {"tckd": "α·TCKD", "nckd": "β·NCKD", "total": "total"}[part]


def _map(axes: Axes, x: np.ndarray, y: np.ndarray, values: np.ndarray, title: str) -> None:
    # KL is unbounded at the edges, so the colours cover the lowest 95 % of the values, and they are closest together
    # at the lowest values, to show the valley.
    low, high = values.min(), np.quantile(values, 0.95)
    if high - low < 1e-9 * max(abs(high), 1.0):
        low, high = low - 0.5, low + 0.5  # constant up to rounding
        title += " (constant)"
    share = np.linspace(0, 1, 25) ** 2
    norm = PowerNorm(0.5, vmin=low, vmax=high)
    drawn = axes.contourf(x, y, values, levels=low + (high - low) * share, norm=norm, cmap="cividis", extend="max")
    bar = axes.figure.colorbar(drawn, ax=axes, ticks=low + (high - low) * share[::4])
    bar.ax.set_yticklabels([f"{tick:.3g}" if abs(tick) > 1e-9 else "0" for tick in bar.get_ticks()])
    bar.set_label(_UNIT)
    axes.set_title(title)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, *, label: str) -> None:
    # Drawn as points: the minimum may jump from one valley to another.
    axes.plot(x, y, ".", color="white", markersize=4, label=label)


def _point(axes: Axes, x: float, y: float, *, label: str) -> None:
    axes.plot(x, y, "o", color="#56B4E9", markeredgecolor="black", markersize=9, label=label)


def _teacher(axes: Axes, q: float, t: float) -> None:
    axes.plot(q, t, "X", color="white", markeredgecolor="black", markersize=13, label="teacher (q, t)")


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xlim(0, 1)


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""

    def work() -> None:
        quiet.for_good()
        options = vars(_parser().parse_args(arguments))
        folder = Path(options.pop("output"))
        settings = _check(Settings(**options))
        for name, draw in FIGURES.items():
            print(_save(draw(settings), folder / f"{name}.png"))

    return exit_code_of(work, command="dgkd_jax.landscape")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m dgkd_jax.landscape",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        example="python -m dgkd_jax.landscape --output=runs/landscape --temperature=4",
    )
    said = {
        "temperature": "T > 0",
        "alpha": "α ≥ 0, weight of TCKD",
        "beta": "β ≥ 0, weight of NCKD",
        "epsilon": "ε; above 0 pushes the two gradients apart, below 0 brings them together",
        "convention": f"one of {', '.join(losses.CONVENTIONS)}",
        "kappa": "κ > 0 of self_normalized",
        "batch": "batch size ≥ 1 in literal and normalized",
        "teacher_target": "q in (0, 1): the teacher's probability of the target",
        "teacher_share": "t in (0, 1): the first other class's share of the teacher's rest",
        "student_share": "s in (0, 1), the student's share, in target.png",
    }
    parser.add_argument("--output", default="runs/landscape", metavar="DIR", help="folder of the figures (%(default)s)")
    for name, default in Settings()._asdict().items():
        kind = type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=f"{said[name]} (%(default)s)")
    return parser


def _check(settings: Settings) -> Settings:
    for name in ("temperature", "kappa"):
        if not 0 < getattr(settings, name) < math.inf:
            raise BadInput(f"--{name}={getattr(settings, name):g}: finite and greater than 0")
    for name in ("alpha", "beta"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise BadInput(f"--{name}={getattr(settings, name):g}: finite and at least 0")
    if not math.isfinite(settings.epsilon):
        raise BadInput(f"--epsilon={settings.epsilon:g}: a finite number")
    if settings.convention not in losses.CONVENTIONS:
        raise BadInput(f"--convention={settings.convention}: one of {', '.join(losses.CONVENTIONS)}")
    if settings.batch < 1:
        raise BadInput(f"--batch={settings.batch}: at least 1")
    for name in ("teacher_target", "teacher_share", "student_share"):
        if not _EDGE <= getattr(settings, name) <= 1 - _EDGE:
            raise BadInput(f"--{name}={getattr(settings, name):g}: between {_EDGE} and {1 - _EDGE}")
    return settings


def _save(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise BadInput(f"--output={path.parent}: cannot be written: {error.strerror}") from error
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
