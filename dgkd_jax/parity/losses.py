"""Every loss, convention and gradient against PyTorch's autograd, over a grid of batches."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dgkd_jax import losses
from dgkd_jax.parity.findings import Report, Row, fixtures, relative_error

# (batch size, classes); two classes leave one non-target class, one sample makes every batch mean its own.
SHAPES = ((1, 5), (8, 2), (16, 10), (64, 100), (16, 1000))
TEMPERATURES = (1.0, 4.0, 20.0)
SCALES = (1.0, 3.0, 9.0)  # standard deviation of the logits
DTYPES = ("float64", "float32", "bfloat16")
WEIGHTS = {"alpha": 1.0, "beta": 8.0, "epsilon": 0.5}

# The peers, as functions of both logits and the labels. GDKD's k is 5, or all classes but one.
PEERS = {
    "kd standardized": lambda z, v, y, **own: losses.kd(*map(losses.standardize, (z, v)), **own),
    "dkd standardized": lambda z, v, y, **own: losses.dkd(*map(losses.standardize, (z, v)), y, **own),
    "nkd": losses.nkd,
    "dist": lambda z, v, y, **own: losses.dist(z, v, **own),
    "wttm": lambda z, v, y, **own: losses.wttm(z, v, **own),
    "rld": losses.rld,
    "gdkd": lambda z, v, y, **own: losses.gdkd(z, v, k=min(5, z.shape[-1] - 1), **own),
}
PEERS_WEIGHTS = {
    "kd standardized": {},
    "dkd standardized": {"alpha": 1.0, "beta": 8.0},
    "nkd": {"gamma": 1.5},
    "dist": {"beta": 2.0, "gamma": 2.0},
    "wttm": {"gamma": 0.3},
    "rld": {"alpha": 1.0, "beta": 8.0, "alpha_temperature": 2.0},
    "gdkd": {"w0": 1.0, "w1": 2.0, "w2": 8.0},
}

# Of a loss's value and of its gradient; the reference has the same, rounded logits in float64. bfloat16 logits are
# computed in float32. A KL of similar distributions is T² times a difference of logarithms near 1, so its value keeps
# fewer digits than its gradient.
TOLERANCES = {"float64": (1e-9, 1e-9), "float32": (1e-3, 5e-5), "bfloat16": (1e-3, 5e-5)}

# Where both networks are sure of the target, TCKD and its gradient are smaller than what PyTorch's form rounds away;
# errors there are relative to this times T² (value) or T (gradient).
_NEGLIGIBLE = 1e-6

_FAR = 10_000  # the margin up to which our losses are finite at T = 1


def run(
    reference: Any,
    *,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    temperatures: tuple[float, ...] = TEMPERATURES,
    scales: tuple[float, ...] = SCALES,
    dtypes: tuple[str, ...] = DTYPES,
) -> Report:
    """Compare all losses on random logits; or on the recorded batches where there is no torch.

    Args:
        reference: the module `torch_reference`, or None where torch is not installed.
        shapes, temperatures, scales, dtypes: the grid.
    """
    with jax.enable_x64(True):
        if reference is None:
            rows = _against_fixtures()
            notes = ["torch is not installed: these are the recorded batches of tests/golden, in float64 and float32."]
            return Report("losses", "fixtures recorded from PyTorch", _worst(rows), rows, notes)
        rows = []
        for dtype, (batch, classes), scale in itertools.product(dtypes, shapes, scales):
            student, teacher, labels = _random_logits(batch, classes, scale, dtype)
            for temperature in temperatures:
                exact = *(np.asarray(logits, np.float64) for logits in (student, teacher)), labels
                settings = {"temperature": temperature, "conventions": losses.CONVENTIONS, **WEIGHTS}
                peers = _settings_of_peers(temperature, classes)
                expected = _with_gradients(reference.evaluate(*exact, **settings)) | reference.peers(*exact, peers)
                place = {"T": temperature, "C": classes, "B": batch, "scale": scale}
                found = _ours(student, teacher, labels, temperature=temperature, **WEIGHTS)
                found |= _our_peers(student, teacher, labels, peers)
                rows += _compare(found, expected, dtype=dtype, place=place)
        breaking = breaking_points(reference)
    notes = ["Smallest margin of the target (logits) where the form that is usual in PyTorch is not finite in float32:"]
    notes += [
        f"  T = {row['T']:g}, {row['side']}: {row['loss']} from {row['value from']}, its gradient from "
        f"{row['gradient from']}; ours {'finite' if row['passed'] else 'NOT FINITE'} there and at {_FAR}"
        for row in breaking
    ]
    return Report("losses", reference.VERSION, _worst(rows), rows + breaking, notes)


def breaking_points(reference: Any) -> list[Row]:
    """Where the masked form stops being finite, found by bisection over the margin between target and the others."""
    rows = []
    sides = {"student right": (1, 0), "student wrong": (-1, 0), "both right": (1, 1), "both wrong": (-1, -1)}
    for temperature, (side, signs), name in itertools.product((1.0, 4.0), sides.items(), ("tckd", "dgkd per_sample")):

        def parts(margin, temperature=temperature, signs=signs, name=name):
            settings = {"temperature": temperature, "conventions": ("per_sample",), "dtype": "float32", **WEIGHTS}
            return reference.evaluate(*margin_logits(margin, signs), **settings)[name]

        margins = [first_failure(lambda margin, part=part, parts=parts: parts(margin)[part]) for part in (0, 1)]
        ours = [
            _ours(*margin_logits(margin, signs), temperature=temperature, **WEIGHTS)[name]
            for margin in (*margins, _FAR)
            if margin
        ]
        rows.append(
            {
                "T": temperature,
                "side": side,
                "loss": name,
                "value from": margins[0],
                "gradient from": margins[1],
                "passed": all(bool(np.isfinite(part).all()) for pair in ours for part in pair),
            }
        )
    return rows


def first_failure(values: Callable[[int], np.ndarray]) -> int | None:
    """Smallest integer at which not all of `values` are finite, up to `_FAR`; None where there is none."""
    low, high = 0, 1
    while np.isfinite(values(high)).all():
        if high >= _FAR:
            return None
        low, high = high, min(2 * high, _FAR)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if np.isfinite(values(middle)).all() else (low, middle)
    return high


def margin_logits(margin: float, signs: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One sample of ten classes whose target is ±margin above the others, which differ by up to 1."""
    others = np.linspace(-0.5, 0.5, 10, dtype=np.float32)
    student, teacher = others.copy()[None], others[::-1].copy()[None]
    student[0, 3] += signs[0] * margin
    teacher[0, 3] += signs[1] * margin
    return student, teacher, np.array([3])


def _random_logits(batch: int, classes: int, scale: float, dtype: str) -> tuple[jax.Array, jax.Array, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(key=[batch, classes]))
    student, teacher = scale * rng.standard_normal((2, batch, classes))
    labels = rng.integers(0, classes, batch)
    return jnp.asarray(student, dtype), jnp.asarray(teacher, dtype), labels


# Each program runs a few times only, so that optimising it costs more than it saves.
@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _ours(student, teacher, labels, *, temperature, alpha, beta, epsilon) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Name -> (value, gradient); the gradients' closed forms and their autodiff twins have no value."""
    inputs, at_temperature = (teacher, labels), {"temperature": temperature}
    wide = jnp.promote_types(student.dtype, jnp.float32)

    def scalars(z):
        values = {
            "ce": jnp.mean(losses.cross_entropy(z, labels)),
            "kd": jnp.mean(losses.kd(z, teacher, **at_temperature)),
            "tckd": jnp.mean(losses.tckd(z, *inputs, **at_temperature)),
            "nckd": jnp.mean(losses.nckd(z, *inputs, **at_temperature)),
            "logit_mse": jnp.mean(losses.logit_mse(z, teacher)),
            "dkd": jnp.mean(losses.dkd(z, *inputs, alpha=alpha, beta=beta, **at_temperature)),
        }
        for convention in losses.CONVENTIONS:
            settings = {"convention": convention, **at_temperature}
            values[f"coupling {convention}"] = losses.gradient_coupling(z, *inputs, **settings)
            values[f"dgkd {convention}"] = losses.dgkd(z, *inputs, alpha=alpha, beta=beta, epsilon=epsilon, **settings)
        return values

    # A gradient has its input's dtype; bfloat16 logits are widened first, lest the gradient be rounded to bfloat16.
    values, pull_back = jax.vjp(scalars, student.astype(wide))
    units = dict(zip(values, jnp.eye(len(values), dtype=wide), strict=True))
    (gradients,) = jax.vmap(pull_back)(units)
    found = dict(zip(values, zip(values.values(), gradients, strict=True), strict=True))
    for method in ("closed_form", "autodiff"):
        for name, gradient in (("tckd", losses.tckd_gradient), ("nckd", losses.nckd_gradient)):
            of_mean = gradient(student, *inputs, method=method, **at_temperature) / len(labels)
            found[f"{name} {method}"] = (None, of_mean)
    return found


def _settings_of_peers(temperature: float, classes: int) -> dict[str, dict[str, float]]:
    """Two standardised logits are ±1/√2, whatever they are: their gradient is rounding alone, so they are left out."""
    kept = {name: own for name, own in PEERS_WEIGHTS.items() if classes > 2 or not name.endswith("standardized")}
    return {name: own if name == "wttm" else own | {"temperature": temperature} for name, own in kept.items()}


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _our_peers(student, teacher, labels, settings) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Name -> (value, gradient) of the peers that `settings` names."""

    def value(z, name):
        return jnp.mean(PEERS[name](z, teacher, labels, **settings[name]))

    student = student.astype(jnp.promote_types(student.dtype, jnp.float32))
    return {name: jax.value_and_grad(value)(student, name) for name in settings}


def _with_gradients(expected: dict) -> dict:
    """PyTorch's autograd of TCKD and NCKD is the reference of both of our forms of these gradients."""
    both = itertools.product(("tckd", "nckd"), ("closed_form", "autodiff"))
    return expected | {f"{name} {method}": (None, expected[name][1]) for name, method in both}


def _compare(found: dict, expected: dict, *, dtype: str, place: Row) -> list[Row]:
    rows = []
    for name, parts in expected.items():
        # Couplings are small by their definition: their errors are relative to themselves.
        floor = 0.0 if name.startswith("coupling") else _NEGLIGIBLE
        floors = (floor * place["T"] ** 2, floor * place["T"])
        errors = [
            None if part is None else relative_error(ours, part, floor=floor)
            for ours, part, floor in zip(found[name], parts, floors, strict=True)
        ]
        row = {"loss": name, "dtype": dtype, **place}
        for what, error, tolerance in zip(("value", "gradient"), errors, TOLERANCES[dtype], strict=True):
            row |= {f"{what} error": error, f"{what} tolerance": None if error is None else tolerance}
        passed = [error <= most for error, most in zip(errors, TOLERANCES[dtype], strict=True) if error is not None]
        rows.append(row | {"passed": all(passed)})
    return rows


def _worst(rows: list[Row]) -> list[Row]:
    """Per loss and dtype: the largest errors, and where the gradient's (or a miss) is."""
    shown = []
    for dtype, loss in dict.fromkeys((row["dtype"], row["loss"]) for row in rows):
        same = [row for row in rows if (row["dtype"], row["loss"]) == (dtype, loss)]
        worst = max(same, key=lambda row: (not row["passed"], row["gradient error"] or 0.0))
        row = {"loss": loss, "dtype": dtype}
        for what in ("value", "gradient"):
            errors = [row[f"{what} error"] for row in same if row[f"{what} error"] is not None]
            row |= {f"{what} error": max(errors, default=None), f"{what} tolerance": worst[f"{what} tolerance"]}
        place = " ".join(f"{key}={worst[key]:g}" for key in ("T", "C", "B", "scale") if worst[key] is not None)
        shown.append(row | {"worst at": place, "passed": all(row["passed"] for row in same)})
    return shown


def _against_fixtures() -> list[Row]:
    rows = []
    for path in sorted(fixtures("losses").glob("*.npz")):
        with np.load(path) as file:
            recorded = dict(file)
        expected = {
            "ce": (recorded["ce/loss"], None),
            "kd": (recorded["kd/loss"], recorded["kd/grad"]),
            "tckd": (recorded["tckd"], recorded["tckd_grad"]),
            "nckd": (recorded["nckd"], recorded["nckd_grad"]),
            "dkd": (recorded["dkd/loss"], recorded["dkd/grad"]),
            "coupling literal": (recorded["grad_mse"], None),
            "dgkd literal": (recorded["literal/loss"], recorded["literal/grad"]),
            "dgkd normalized": (recorded["normalized/loss"], recorded["normalized/grad"]),
        }
        batch, classes = recorded["student_logits"].shape
        place = {"T": float(recorded["temperature"]), "C": classes, "B": batch, "scale": None}
        settings = {name: float(recorded[name]) for name in ("temperature", "alpha", "beta", "epsilon")}
        for dtype in ("float64", "float32"):
            logits = (jnp.asarray(recorded[f"{who}_logits"], dtype) for who in ("student", "teacher"))
            found = _ours(*logits, recorded["labels"], **settings)
            rows += _compare(found, _with_gradients(expected), dtype=dtype, place=place)
    for path in sorted(fixtures("peers").glob("b*.npz")):
        rows += _peers_against_fixture(path)
    return rows


def _peers_against_fixture(path: Path) -> list[Row]:
    with np.load(path) as file:
        recorded = dict(file)
    batch, classes = recorded["student_logits"].shape
    rows = []
    for figure in dict.fromkeys(key.split("/")[0] for key in recorded if "/" in key):
        name = figure.rsplit("_t", 1)[0].replace("_", " ")
        if classes == 2 and name.endswith("standardized"):
            continue  # as in `_settings_of_peers`
        own = {key.removeprefix(f"{figure}/"): value for key, value in recorded.items() if key.startswith(f"{figure}/")}
        expected = {name: (own.pop("loss"), own.pop("grad"))}
        own.pop("k", None)
        place = {"T": float(own.get("temperature", 1.0)), "C": classes, "B": batch, "scale": None}
        for dtype in ("float64", "float32"):
            logits = (jnp.asarray(recorded[f"{who}_logits"], dtype) for who in ("student", "teacher"))
            settings = {name: {key: float(value) for key, value in own.items()}}
            rows += _compare(_our_peers(*logits, recorded["labels"], settings), expected, dtype=dtype, place=place)
    return rows
