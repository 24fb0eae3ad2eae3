"""Converts between variables and PyTorch entries: renames, transposes and checks them; lossless in both directions."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dgkd_jax import models
from dgkd_jax.errors import BadInput
from dgkd_jax.models import swin
from dgkd_jax.torch_port.files import DOWNLOADS, load
from dgkd_jax.torch_port.names import entry_name

__all__ = ["DOWNLOADS", "classes_of", "from_torch", "load", "to_torch"]

# A kernel's axes, by rank: convolution HWIO <-> OIHW, linear [in, out] <-> [out, in].
_TORCH_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}
_OUR_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}

_RUNNING_VAR = ".running_var"
_COUNTER = ".num_batches_tracked"  # PyTorch's count of training steps; files from before 2018 lack it
_BIAS_TABLE = ".relative_position_bias_table"
_INDEX = ".relative_position_index"  # the table's row for each pair of tokens; a constant
_SHOWN = 4  # entries of each kind that an error lists
_MARK = 1_000_003  # an impossible number of classes: it marks the head's shapes


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    model: Any,
    name: str,
    *,
    image_shape: tuple[int, int, int] | None = None,
    replace_head: bool = False,
) -> dict:
    """Convert PyTorch entries to the model's variables.

    Args:
        state_dict: entry name -> array in PyTorch's layout: convolutions [out, in, height, width], linear
            layers [out, in]. `num_batches_tracked` and `relative_position_index` are optional and not kept.
        model: from `models.create(name, …)`.
        name: the model's name; it selects the table of names.
        image_shape: (height, width, channels) of the images where they are not the family's usual ones.
        replace_head: allow entries for another number of classes: the head gets fresh values (`models.initialise`,
            seed 0) and must be trained. A head of the right shape is kept. No config key sets this, because a teacher
            with a fresh head has nothing to teach.

    Returns:
        {"params": …, "batch_stats": …} of numpy arrays in the entries' own dtypes.

    Raises:
        BadInput: entries are missing, surplus, of another shape (the message names a model that they would fit),
            not floating-point, or not finite; `relative_position_index` is not the network's; or no table covers
            the name.
    """
    image_shape = image_shape or model.image_shape
    leaves, structure = _leaves(models.shapes(model, image_shape))
    expected = _torch_shapes(leaves, name)
    if replace_head:
        state_dict = _with_fresh_head(state_dict, model, name, image_shape, expected)
    given = _without_buffers({entry: np.shape(array) for entry, array in state_dict.items()}, expected)
    if problems := _differences(given, expected):
        raise BadInput(f"these PyTorch entries are not those of {name}: {problems}. {_what_fits(given)}")
    for entry in expected:
        _check_numbers(entry, state_dict[entry])
    for entry, buffer in _buffers(expected).items():
        if entry.endswith(_INDEX) and not np.array_equal(state_dict.get(entry, buffer), buffer):
            raise BadInput(f"PyTorch entry {entry} is not that of {name}: its windows or their tokens lie otherwise")
    return structure.unflatten([_transposed(path, state_dict[entry_name(path, name)], _OUR_AXES) for path in leaves])


def to_torch(
    variables: Mapping[str, Any],
    model: Any,
    name: str,
    *,
    image_shape: tuple[int, int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Convert the model's variables to PyTorch entries: the inverse of `from_torch`.

    Args:
        variables: {"params": …, "batch_stats": …} of arrays.
        model: from `models.create(name, …)`.
        name: the model's name; it selects the table of names.
        image_shape: (height, width, channels) of the images where they are not the family's usual ones.

    Returns:
        Entry name -> numpy array in PyTorch's layout and the leaf's dtype, and PyTorch's int64 buffers:
        `num_batches_tracked` (always 0) and `relative_position_index`.

    Raises:
        BadInput: leaves are missing, surplus or of another shape, or no table covers the name.
    """
    expected, _ = _leaves(models.shapes(model, image_shape or model.image_shape))
    leaves, _ = _leaves(variables)
    if problems := _differences(_shapes(leaves), _shapes(expected)):
        raise BadInput(f"these variables are not those of {name}: {problems}")
    state_dict = {}
    for path, leaf in leaves.items():
        state_dict[entry_name(path, name)] = _transposed(path, np.asarray(leaf), _TORCH_AXES)
    return state_dict | _buffers(state_dict)


def classes_of(state_dict: Mapping[str, np.ndarray], name: str) -> int:
    """The number of classes of PyTorch entries: the size of their head.

    Args:
        state_dict: entry name -> array in PyTorch's layout.
        name: the model's name; it says which entries are the head.

    Raises:
        BadInput: the head's entries are missing, or differ in size.
    """
    head = [entry for entry, shape in _marked_shapes(name).items() if _MARK in shape]
    sizes = {np.shape(state_dict.get(entry, 0))[:1] for entry in head}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        given = {entry: np.shape(array) for entry, array in state_dict.items()}
        raise BadInput(f"these PyTorch entries have no head of {name} ({', '.join(head)}). {_what_fits(given)}")
    return int(sizes.pop()[0])


def _with_fresh_head(
    state_dict: Mapping[str, np.ndarray],
    model: Any,
    name: str,
    image_shape: tuple[int, int, int],
    expected: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """The entries, with a fresh head if only the head's first axis, the number of classes, differs."""
    head = [entry for entry, shape in _marked_shapes(name).items() if _MARK in shape]
    given = {entry: np.shape(state_dict.get(entry, ())) for entry in head}
    classes = {shape[:1] for shape in given.values()}
    fits = all(shape[1:] == expected[entry][1:] for entry, shape in given.items())
    if not fits or len(classes) != 1 or classes == {expected[head[0]][:1]}:
        return dict(state_dict)  # the head fits, or is wrong in another way: then the caller reports it
    fresh = to_torch(models.initialise(model, image_shape, seed=0), model, name, image_shape=image_shape)
    return dict(state_dict) | {entry: fresh[entry].astype(state_dict[entry].dtype) for entry in head}


def _leaves(tree: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    keystr = jax.tree_util.keystr
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in paths_and_leaves}, structure


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _torch_shapes(leaves: Mapping[str, Any], name: str) -> dict[str, tuple[int, ...]]:
    return {
        entry_name(path, name): tuple(shape[axis] for axis in _axes(path, len(shape), _TORCH_AXES))
        for path, shape in _shapes(leaves).items()
    }


def _axes(path: str, rank: int, kernel_axes: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    return kernel_axes[rank] if path.endswith("/kernel") else tuple(range(rank))


def _transposed(path: str, array: np.ndarray, kernel_axes: Mapping[int, tuple[int, ...]]) -> np.ndarray:
    # asarray keeps a 0-d array an array; order="C" because readers of raw memory (safetensors) expect it.
    return np.asarray(array.transpose(_axes(path, array.ndim, kernel_axes)), order="C")


def _buffers(entries: Iterable[str]) -> dict[str, np.ndarray]:
    """PyTorch's buffers next to these entries: what a `state_dict` holds in addition to our leaves."""
    buffers = {}
    for entry in entries:
        if entry.endswith(_RUNNING_VAR):
            buffers[entry.removesuffix(_RUNNING_VAR) + _COUNTER] = np.zeros((), np.int64)
        elif entry.endswith(_BIAS_TABLE):
            buffers[entry.removesuffix(_BIAS_TABLE) + _INDEX] = swin.relative_position_index()
    return buffers


def _without_buffers(entries: Mapping[str, Any], expected: Iterable[str]) -> dict[str, Any]:
    # Only buffers that the model has are removed; any other one is a surplus entry.
    buffers = _buffers(expected)
    return {entry: value for entry, value in entries.items() if entry not in buffers}


def _differences(given: Mapping[str, tuple], expected: Mapping[str, tuple]) -> str:
    kinds = {
        "missing": [entry for entry in expected if entry not in given],
        "surplus": [entry for entry in given if entry not in expected],
        "wrong shape": [
            f"{entry} is {given[entry]}, not {shape}"
            for entry, shape in expected.items()
            if given.get(entry, shape) != shape
        ],
    }
    return "; ".join(f"{kind}: {_first_few(found)}" for kind, found in kinds.items() if found)


def _first_few(found: list[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (f", … ({len(found)} in all)" if len(found) > _SHOWN else "")


def _what_fits(given: Mapping[str, tuple]) -> str:
    """Names of our models that the entries would fit, with any number of classes, as text."""
    fits = []
    for name in models.NAMES:
        expected = _marked_shapes(name)
        found = _without_buffers(given, expected)
        head = {entry for entry, shape in expected.items() if _MARK in shape}
        classes = {found[entry][0] for entry in head if found.get(entry)}
        unsized = {entry: (_MARK, *shape[1:]) if entry in head else shape for entry, shape in found.items()}
        if unsized == expected and len(classes) == 1:
            fits.append(f"{name} with {classes.pop()} classes")
    return f"They fit {' or '.join(fits)}." if fits else "They fit no model in dgkd_jax.models.NAMES."


@functools.cache  # tracing all the models takes seconds
def _marked_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's PyTorch entries with `_MARK` classes. Cached: do not change the result."""
    model = models.create(name, num_classes=_MARK)
    leaves, _ = _leaves(models.shapes(model, model.image_shape))
    return _torch_shapes(leaves, name)


def _check_numbers(entry: str, array: np.ndarray) -> None:
    if not jax.dtypes.issubdtype(array.dtype, np.floating):
        raise BadInput(f"PyTorch entry {entry} holds {array.dtype}, not floating-point numbers")
    finite = np.isfinite(array)
    if not finite.all():
        raise BadInput(f"PyTorch entry {entry}: {(~finite).sum()} of {array.size} values are NaN or infinite")
