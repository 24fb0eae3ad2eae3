"""The same training in both frameworks: same initial weights, same batches, loss and weights after each step."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dgkd_jax import losses, models, torch_port
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import CE, DGKD, DKD, KD, Method
from dgkd_jax.models import resnet_cifar
from dgkd_jax.models.network import Network
from dgkd_jax.parity import golden_weights
from dgkd_jax.parity.bare_step import bare_step
from dgkd_jax.parity.findings import Report, Row, fixtures, relative_error
from dgkd_jax.training.optimizer import make_optimizer

METHODS = ("ce", "kd", "dkd", "dgkd")
CLASSES, BATCH, SHAPE = 10, 16, (32, 32, 3)
DTYPES = ("float64", "float32")

# float64: rounding of 1e-16 that training itself amplifies. float32 has no such figure, since the same rounding, 1e-7,
# is amplified as much: there PyTorch's own distance from its float64 run is the measure.
FLOAT64_TOLERANCE = 1e-8
FLOAT32_MULTIPLE, FLOAT32_ROUNDING = 10.0, 1e-5

Entries = dict[str, np.ndarray]


class Recipe(NamedTuple):
    """What is trained and how; SGD with weight decay on every parameter."""

    method: str
    convention: str | None
    epsilon: float = 0.0
    temperature: float = 4.0
    alpha: float = 1.0
    beta: float = 8.0
    warmup_steps: int = 4  # of the distillation terms, of DKD and DGKD only
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4

    @property
    def name(self) -> str:
        return f"{self.method} {self.convention}" if self.convention else self.method


class Setting(NamedTuple):
    """Networks with their initial weights under PyTorch's names, and the batches."""

    networks: dict[str, tuple[Any, str, Entries]]  # "student" and "teacher" -> model, its name, entries
    images: np.ndarray  # [steps, batch, 3, height, width], normalised
    labels: np.ndarray  # [steps, batch]


def run(reference: ModuleType | None, *, pair: str, count: int, method: str | None) -> Report:
    """Train the pair for `count` steps with each method in each dtype; or follow the recorded trajectories.

    Args:
        reference: the module `torch_reference`, or None where torch is not installed.
        pair: "TEACHER,STUDENT", two thin CIFAR ResNets.
        count: steps, at least 1.
        method: one of `METHODS`; None for all.

    Raises:
        BadInput: another pair, count or method; without torch: no fixture for what is asked.
    """
    teacher, student = _names(pair)
    if count < 1:
        raise BadInput(f"--steps={count}: at least 1")
    if method not in (*METHODS, None):
        raise BadInput(f"--method={method}: one of {', '.join(METHODS)}")
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        if reference is None:
            return _follow_fixtures((teacher, student), count, method)
        setting = _random_setting(teacher, student, count)
        rows = []
        for recipe in _recipes(method):
            rows += _live_rows(reference, setting, recipe)
    return Report(f"training of {student} taught by {teacher}", reference.VERSION, _last(rows), rows, [])


def _names(pair: str) -> list[str]:
    names = pair.split(",")
    if len(names) != 2 or any(name not in resnet_cifar.MODELS for name in names):
        raise BadInput(
            f"--pair={pair}: TEACHER,STUDENT, two of the thin CIFAR ResNets, whose PyTorch side is written here: "
            f"{', '.join(resnet_cifar.MODELS)}"
        )
    return names


def _recipes(method: str | None) -> list[Recipe]:
    recipes = [Recipe(name, None) for name in METHODS if name != "dgkd"]
    # ε as in the PyTorch repository where it divides or normalises; as in our default for the bare mean.
    epsilons = {"literal": 6.0, "normalized": 6.0}
    recipes += [Recipe("dgkd", convention, epsilons.get(convention, 0.1)) for convention in losses.CONVENTIONS]
    return [recipe for recipe in recipes if method in (None, recipe.method)]


def _random_setting(teacher: str, student: str, count: int) -> Setting:
    networks = {}
    for seed, (role, name) in enumerate((("student", student), ("teacher", teacher))):
        model = models.create(name, num_classes=CLASSES)
        variables = models.initialise(model, SHAPE, seed)
        networks[role] = (model, name, torch_port.to_torch(variables, model, name))
    rng = np.random.Generator(np.random.Philox(key=0))
    images = rng.standard_normal((count, BATCH, 3, 32, 32)).astype(np.float32)
    return Setting(networks, images, rng.integers(0, CLASSES, (count, BATCH)))


def _live_rows(reference: ModuleType, setting: Setting, recipe: Recipe) -> list[Row]:
    theirs = {dtype: list(_torch_steps(reference, setting, recipe, dtype)) for dtype in DTYPES}
    # What float32 costs PyTorch by itself, up to each step: the weights' drift is the measure of the loss too, since
    # a loss that happens to agree at one step says little about the next.
    own = [max(_errors(narrow, wide)) for narrow, wide in zip(theirs["float32"], theirs["float64"], strict=True)]
    allowed = {
        "float64": [FLOAT64_TOLERANCE] * len(own),
        "float32": FLOAT32_MULTIPLE * np.maximum.accumulate(own) + FLOAT32_ROUNDING,
    }
    rows = []
    for dtype in DTYPES:
        found = _our_steps(setting, recipe, dtype)
        for step, (ours, expected) in enumerate(zip(found, theirs[dtype], strict=True)):
            tolerance = float(allowed[dtype][step])
            rows.append(_row(recipe, dtype, step, ours[0], expected[0], _errors(ours, expected), tolerance))
    return rows


def _errors(ours: tuple[float, Entries], theirs: tuple[float, Entries]) -> tuple[float, float]:
    """(relative difference of the loss, ‖difference‖/‖theirs‖ over all parameters and running statistics)."""
    names = [name for name in theirs[1] if not name.endswith("num_batches_tracked")]
    flat = [np.concatenate([np.ravel(side[1][name]).astype(np.float64) for name in names]) for side in (ours, theirs)]
    drift = float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))
    return relative_error(np.array(ours[0]), np.array(theirs[0])), drift if np.isfinite(drift) else np.inf


def _row(recipe, dtype, step, loss, expected, errors, tolerance) -> Row:
    return {
        "method": recipe.name,
        "dtype": dtype,
        "step": step + 1,
        "loss": float(loss),
        "PyTorch's": float(expected),
        "loss error": errors[0],
        "weight drift": errors[1],
        "tolerance": tolerance,
        "passed": all(error <= tolerance for error in errors if error is not None),
    }


def _last(rows: list[Row]) -> list[Row]:
    """Per method and dtype the last step, or the first one that misses its tolerance."""
    runs = dict.fromkeys((row["method"], row["dtype"]) for row in rows)
    same = [[row for row in rows if (row["method"], row["dtype"]) == run] for run in runs]
    return [next((row for row in run if not row["passed"]), run[-1]) for run in same]


def _torch_steps(
    reference: ModuleType, setting: Setting, recipe: Recipe, dtype: str
) -> Iterator[tuple[float, Entries]]:
    networks = {}
    for role, (model, _, entries) in setting.networks.items():
        structure = {name: getattr(model, name) for name in ("stage_sizes", "widths", "stem_width", "num_classes")}
        networks[role] = reference.fill(reference.ThinResNet(**structure), entries, dtype)
    batches = (
        (images, labels, min(step / recipe.warmup_steps, 1.0))
        for step, (images, labels) in enumerate(zip(setting.images, setting.labels, strict=True))
    )
    return reference.train(
        networks["student"],
        networks["teacher"],
        batches,
        terms=_weights(_method(recipe)),
        convention=recipe.convention,
        epsilon=recipe.epsilon,
        temperature=recipe.temperature,
        learning_rate=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def _method(recipe: Recipe) -> Method:
    """An epoch of its warm-up is a step here."""
    if recipe.method == "ce":
        return CE()
    if recipe.method == "kd":
        return KD(temperature=recipe.temperature)
    dkd = DKD(alpha=recipe.alpha, beta=recipe.beta, temperature=recipe.temperature, warmup_epochs=recipe.warmup_steps)
    return DGKD(dkd=dkd, epsilon=recipe.epsilon, convention=recipe.convention) if recipe.method == "dgkd" else dkd


def _weights(method: Method) -> dict[str, float]:
    """Of the batch means that the loss adds up, but for the coupling."""
    if isinstance(method, CE):
        return {"ce": 1.0}
    if isinstance(method, KD):
        return {"ce": method.ce_weight, "kd": method.weight}
    dkd = method.dkd if isinstance(method, DGKD) else method
    return {"ce": dkd.ce_weight, "tckd": dkd.alpha, "nckd": dkd.beta}


def _our_steps(setting: Setting, recipe: Recipe, dtype: str) -> list[tuple[float, Entries]]:
    """(loss, entries after the step) for each batch, by the step of a run in this dtype."""
    with jax.enable_x64(dtype == "float64"):
        return list(_steps(setting, recipe, dtype))


def _steps(setting: Setting, recipe: Recipe, dtype: str) -> Iterator[tuple[float, Entries]]:
    networks = {}
    for role, (model, name, entries) in setting.networks.items():
        variables = torch_port.from_torch(entries, model, name)
        as_dtype = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
        apply = models.create(name, num_classes=model.num_classes, dtype=dtype).apply
        networks[role] = Network(apply, as_dtype, (), ())
    sgd = ConfigDict(
        {
            "name": "sgd",
            "momentum": recipe.momentum,
            "nesterov": False,
            "weight_decay": recipe.weight_decay,
            "decay_on": "all",
            "clip_norm": 0.0,
        }
    )
    optimizer = make_optimizer(sgd, lambda step: jnp.asarray(recipe.learning_rate, dtype))
    step, current = bare_step(networks["student"], method=_method(recipe), optimizer=optimizer)
    step, empty = jax.jit(step), current.totals
    model, name, _ = setting.networks["student"]
    for images, labels in zip(setting.images, setting.labels, strict=True):
        batch = {
            "image": jnp.asarray(images.transpose(0, 2, 3, 1), dtype),
            "label": jnp.asarray(labels, jnp.int32),
        }
        current = step(current.replace(totals=empty), networks["teacher"], batch)
        entries = torch_port.to_torch(jax.tree.map(np.asarray, current.variables), model, name)
        yield float(current.totals["loss"][0]), entries


# ------------------------------------------------------------------------------------------------------------
# Without torch
# ------------------------------------------------------------------------------------------------------------


def _follow_fixtures(pair: tuple[str, str], count: int, method: str | None) -> Report:
    folder = fixtures("trajectories")
    paths = sorted(folder.glob("{}_{}_*.npz".format(*pair)))
    paths = [path for path in paths if method is None or path.stem.split("_")[2] == method]
    if not paths:
        raise BadInput(
            f"torch is not installed, and nothing is recorded for {method or 'any method'} with {','.join(pair)}; "
            f"recorded: {', '.join(path.stem for path in sorted(folder.glob('*.npz')))}"
        )
    rows = []
    for path in paths:
        with np.load(path) as file:
            rows += _fixture_rows(path.stem.split("_", 2)[2], dict(file), pair, count)
    notes = [
        "torch is not installed: these are the recorded trajectories of tests/golden, in float64; of the weights",
        "their norm is recorded, after the last step. CE, KD and the other conventions need torch.",
    ]
    title = "training of {1} taught by {0}".format(*pair)
    return Report(title, "fixtures recorded from PyTorch", _last(rows), rows, notes)


def _fixture_rows(name: str, recorded: dict, pair: tuple[str, str], count: int) -> list[Row]:
    recorded_steps = int(recorded["steps"])
    if count > recorded_steps:
        raise BadInput(f"--steps={count}: torch is not installed, and {recorded_steps} steps are recorded")
    method, _, convention = name.partition("_")
    same = ("alpha", "beta", "epsilon", "temperature", "momentum", "weight_decay")
    recipe = Recipe(
        method,
        convention or None,
        warmup_steps=int(recorded["warmup_steps"]),
        learning_rate=float(recorded["lr"]),
        **{key: float(recorded[key]) for key in same},
    )
    networks = {}
    for role, network in (("teacher", pair[0]), ("student", pair[1])):
        model = models.create(network, num_classes=CLASSES)
        shapes = torch_port.to_torch(models.initialise(model, SHAPE, 0), model, network)
        seed = int(recorded[f"{role}_seed"])
        entries = {entry: golden_weights.weight(entry, array.shape, seed) for entry, array in shapes.items()}
        networks[role] = (model, network, entries)
    rng = np.random.Generator(np.random.Philox(key=int(recorded["images_seed"])))
    images = rng.standard_normal((recorded_steps, int(recorded["batch"]), 3, 32, 32)).astype(np.float32)
    setting = Setting(networks, images[:count], recorded["labels"][:count])
    rows = []
    for step, (loss, entries) in enumerate(_our_steps(setting, recipe, "float64")):
        drift = None
        if step + 1 == recorded_steps:
            learned = [w for entry, w in entries.items() if "running" not in entry and "num_batches" not in entry]
            norm = np.sqrt(sum(np.sum(np.square(w)) for w in learned))
            drift = relative_error(norm, recorded["final_params_l2"])
        expected = recorded["loss"][step]
        errors = (relative_error(np.array(loss), expected), drift)
        rows.append(_row(recipe, "float64", step, loss, expected, errors, FLOAT64_TOLERANCE))
    return rows
