"""One network in PyTorch and in ours, on the same images with the same weights, layer by layer."""

import json
import re
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgkd_jax import models, torch_port
from dgkd_jax.errors import BadInput
from dgkd_jax.models import platform
from dgkd_jax.parity import golden_weights
from dgkd_jax.parity.findings import Report, Row, fixtures, relative_error
from dgkd_jax.torch_port.names import entry_name

# Of the largest difference in a layer's output, over the largest magnitude there. float64: the rounding of some 10^5
# additions; float32: up to a hundred layers of rounding at 6e-8 each, with room.
TOLERANCES = {"float64": 1e-10, "float32": 1e-4}
BATCH = 2
CLASSES = 10  # of random weights

_ROOT = ""  # the whole network, whose output is the logits
_SHOWN = 4  # layers that a note lists

Entries = dict[str, np.ndarray]


class Setting(NamedTuple):
    """A model of ours with weights under PyTorch's names, and where these come from."""

    name: str
    model: Any
    entries: Entries
    origin: str


def run(
    reference: ModuleType | None,
    *,
    name: str,
    weights: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    dtype: str = "float64",
    seed: int = 0,
) -> Report:
    """Compare the outputs of all layers; or the logits with recorded ones where there is no PyTorch network.

    Args:
        reference: the module `torch_networks`, or None where torch is not installed.
        name: of `dgkd_jax.models.NAMES`.
        weights: a file as `torch_port.load` takes it; None for random weights.
        image_size: side of the square images in pixels; None for the network's usual one.
        num_classes: None takes the number that the file's head has, or `CLASSES` for random weights.
        dtype: of `TOLERANCES`.
        seed: of the random images and the random weights, at least 0.

    Raises:
        BadInput: no such name or dtype, weights that do not fit, images too small for the network, or nothing to
            compare with.
    """
    if dtype not in TOLERANCES:
        raise BadInput(f"--dtype={dtype}: one of {', '.join(TOLERANCES)}")
    if seed < 0:
        raise BadInput(f"--seed={seed}: at least 0")
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        setting = _setting(name, weights, num_classes, dtype, seed)
        side = _checked_side(setting.model, image_size)
        if reference is None:
            return _against_fixtures(setting, weights, dtype, "torch is not installed")
        try:
            network = reference.create(name, setting.model, side=side)
        except reference.NotHere as error:
            return _against_fixtures(setting, weights, dtype, str(error))
        rng = np.random.Generator(np.random.Philox(key=seed))
        images = rng.standard_normal((BATCH, setting.model.image_shape[2], side, side)).astype(dtype)
        rows, unseen = _rows(reference, network, setting, images, dtype)
    notes = [_verdict(rows)]
    if unseen:
        notes.append(
            f"{len(unseen)} layers are no modules that both call, and show in the next one: {_first_few(unseen)}"
        )
    title = f"layers of {name}, {setting.origin}, {BATCH} images of {side}x{side} pixels, {dtype}"
    return Report(title, network.source, rows, rows, notes)


def _setting(name: str, weights: str | None, num_classes: int | None, dtype: str, seed: int) -> Setting:
    try:
        model = models.create(name, num_classes=CLASSES if num_classes is None else num_classes, dtype=dtype)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if weights is None:
        return Setting(name, model, _random_entries(model, name, seed), f"random weights of seed {seed}")
    entries = torch_port.load(weights)
    try:
        if num_classes is None:
            model = models.create(name, num_classes=torch_port.classes_of(entries, name), dtype=dtype)
        variables = torch_port.from_torch(entries, model, name)
    except BadInput as error:
        raise BadInput(f"weights {weights}: {error}") from error
    return Setting(name, model, _entries(variables, model, name), f"weights {weights}")


def _random_entries(model: Any, name: str, seed: int) -> Entries:
    """Fresh kernels; biases, scales and statistics moved away from the 0 and 1 that would hide a wrong one."""
    rng = np.random.Generator(np.random.Philox(key=seed))

    def moved(path: tuple, leaf: np.ndarray) -> np.ndarray:
        kind, noise = path[-1].key, rng.standard_normal(leaf.shape)
        if kind == "kernel":
            return leaf
        return leaf + (0.2 * np.abs(noise) if kind == "var" else 0.1 * noise).astype(leaf.dtype)

    variables = models.initialise(model, model.image_shape, seed)
    return _entries(jax.tree_util.tree_map_with_path(moved, variables), model, name)


def _entries(variables: dict, model: Any, name: str) -> Entries:
    """`to_torch` without the buffers."""
    return {e: array for e, array in torch_port.to_torch(variables, model, name).items() if not _is_buffer(e)}


def _is_buffer(entry: str) -> bool:
    return entry.endswith((".num_batches_tracked", ".relative_position_index"))


def _checked_side(model: Any, image_size: int | None) -> int:
    side = model.image_shape[0] if image_size is None else image_size
    if side < 1:
        raise BadInput(f"--image_size={side}: at least 1")
    shape = (side, side, model.image_shape[2])
    try:
        outputs = jax.eval_shape(_capture(model), models.shapes(model, shape), np.zeros((1, *shape), np.float32))
    except ValueError as error:
        raise BadInput(f"--image_size={side}: {error}") from error
    if empty := [layer for layer, output in outputs.items() if not output.size]:
        raise BadInput(f"--image_size={side}: nothing is left of such images in {empty[0]}; take larger ones")
    return side


# ------------------------------------------------------------------------------------------------------------
# Layer by layer
# ------------------------------------------------------------------------------------------------------------


def _rows(
    reference: ModuleType, network: Any, setting: Setting, images: np.ndarray, dtype: str
) -> tuple[list[Row], list[str]]:
    """A row per layer and block in the order in which PyTorch computes them, and the layers that not both call."""
    name, model = setting.name, setting.model
    variables = torch_port.from_torch(setting.entries, model, name)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in _flat(variables)]
    submodules = _matched(paths, network.entry)
    module = reference.fill(
        network, {network.entry(path): setting.entries[entry_name(path, name)] for path in paths}, dtype
    )
    theirs = reference.outputs(module, images, submodules.values())
    ours = _our_outputs(model, variables, images, dtype)
    rows = []
    layers = {submodule: layer for layer, submodule in submodules.items()}
    for submodule, expected in theirs.items():
        layer = layers[submodule]
        if layer not in ours and platform.current() == "tpu":  # where attention's linear layers have no output
            continue
        found = np.asarray(ours[layer])
        difference, relative = _differences(found, expected)
        rows.append(
            {
                "layer": layer or "logits",
                "in PyTorch": submodule or "logits",
                "shape": "x".join(map(str, found.shape)),
                "largest difference": difference,
                "relative": relative,
                "tolerance": TOLERANCES[dtype],
                "passed": relative <= TOLERANCES[dtype],
            }
        )
    return rows, [layer for layer, submodule in submodules.items() if submodule not in theirs or layer not in ours]


def _matched(paths: list[str], entry: Any) -> dict[str, str]:
    """Our layers -> PyTorch's modules, by the names of their leaves: layer1_0/conv1 -> layer1.0.conv1.

    A layer holds leaves itself. Beside them are the network's blocks, which hold layers and add what bypasses them;
    what a block holds of further groups, such as an attention, is not matched: PyTorch cuts it otherwise.
    """
    holders = {path.split("/", 1)[1].rpartition("/")[0] for path in paths}
    blocks = {holder.split("/")[0] for holder in holders if "/" in holder}
    matched = {}
    for layer in sorted(holders | blocks | {_ROOT}):
        inside = [path for path in paths if path.split("/", 1)[1].startswith(f"{layer}/")]
        modules = [entry(path).split(".")[:-1] for path in inside] if layer else []
        common = [parts[0] for parts in zip(*modules, strict=False) if len(set(parts)) == 1]
        submodule = ".".join(common)
        # Where all of a block's layers are on the path beside its shortcut, that path has a name of its own.
        matched[layer] = re.sub(r"\.(conv|branch2|body)$", "", submodule) if layer in blocks else submodule
    return matched


def _our_outputs(model: Any, variables: dict, images: np.ndarray, dtype: str) -> dict[str, jax.Array]:
    as_dtype = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
    # It runs once, so that optimising it costs more than it saves.
    capture = jax.jit(_capture(model), compiler_options={"xla_backend_optimization_level": 0})
    return capture(as_dtype, jnp.asarray(images.transpose(0, 2, 3, 1)))


def _capture(model: Any) -> Any:
    """variables, images -> path of every module of ours -> what its call returns."""

    def outputs(variables: dict, images: jax.Array) -> dict[str, jax.Array]:
        _, captured = model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
        return {
            "/".join(str(key.key) for key in path[:-2]): output for path, output in _flat(captured["intermediates"])
        }

    return outputs


def _flat(tree: dict) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _differences(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """(largest difference, relative to the largest magnitude expected); infinite where the shapes differ."""
    # PyTorch's maps have their channels first, except in transformers; torchvision keeps a pooled map's single pixel;
    # and timm's last norm sees all tokens, ours only the class token. Maps with as many channels as pixels fit both
    # ways: then the right one is the nearer.
    layouts = [expected]
    if expected.ndim == 4:
        layouts.append(expected.transpose(0, 2, 3, 1))
    if expected.shape[2:] == (1, 1):
        layouts.append(expected[:, :, 0, 0])
    if expected.ndim == found.ndim + 1:
        layouts.append(expected[:, 0])
    fitting = [layout for layout in layouts if layout.shape == found.shape]
    errors = [(_largest(found - layout), relative_error(found, layout)) for layout in fitting]
    return min(errors, key=lambda pair: pair[1], default=(np.inf, np.inf))


def _largest(difference: np.ndarray) -> float:
    largest = float(np.max(np.abs(difference)))
    return largest if np.isfinite(largest) else np.inf


def _verdict(rows: list[Row]) -> str:
    worst = max(rows, key=lambda row: row["relative"])
    if all(row["passed"] for row in rows):
        return f"no layer differs; the largest relative difference is {worst['relative']:.2g}, in {worst['layer']}"
    index, first = next((index, row) for index, row in enumerate(rows) if not row["passed"])
    before = f"the one before, {rows[index - 1]['layer']}, agrees" if index else "it is the first of all"
    return (
        f"the first layer that differs: {first['layer']}, in PyTorch {first['in PyTorch']}, by "
        f"{first['relative']:.2g} relative ({before})"
    )


def _first_few(layers: list[str]) -> str:
    return ", ".join(layers[:_SHOWN]) + (", …" if len(layers) > _SHOWN else "")


# ------------------------------------------------------------------------------------------------------------
# Without a PyTorch network
# ------------------------------------------------------------------------------------------------------------


def _against_fixtures(setting: Setting, weights: str | None, dtype: str, reason: str) -> Report:
    """Our logits against those recorded from PyTorch, for the recorded weights and images."""
    name, folder = setting.name, fixtures("models")
    recorded = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    fitting = {}
    for path, fixture in recorded.items():
        shapes = {entry: tuple(shape) for entry, shape in fixture["state_dict"].items() if not _is_buffer(entry)}
        if shapes.keys() != setting.entries.keys():
            continue
        model = models.create(name, num_classes=len(fixture["logits"][0]), dtype=dtype)
        own = _entries(models.initialise(model, model.image_shape, 0), model, name)
        if shapes == {entry: array.shape for entry, array in own.items()}:
            fitting[path] = (model, fixture)
    if not fitting:
        raise BadInput(f"{reason}; and no logits of {name} are recorded in {folder}")
    rows = []
    for path, (model, fixture) in fitting.items():
        variables = torch_port.from_torch(golden_weights.weights(fixture), model, name)
        images = golden_weights.images(fixture).astype(dtype)
        found = _our_outputs(model, variables, images, dtype)[_ROOT]
        difference, relative = _differences(np.asarray(found), np.asarray(fixture["logits"]))
        rows.append(
            {
                "layer": "logits",
                "recorded in": path.name,
                "shape": "x".join(map(str, found.shape)),
                "largest difference": difference,
                "relative": relative,
                "tolerance": TOLERANCES[dtype],
                "passed": relative <= TOLERANCES[dtype],
            }
        )
    notes = [f"{reason}: these are recorded logits, for the record's own weights and images; no layer is compared."]
    if weights is not None:
        notes.append(f"{weights} was read and fits {name}, but there is nothing to run it in for comparison.")
    return Report(f"logits of {name}, {dtype}", "fixtures recorded from PyTorch", rows, rows, notes)
