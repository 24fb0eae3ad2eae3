"""PyTorch `state_dict` <-> variables: a strict bijection of entry names and shapes, both ways without loss.

    arrays = torch_port.load("resnet50.pth")                           # or .safetensors, .npz
    variables = torch_port.from_torch(arrays, model, "resnet50")
    state_dict = torch_port.to_torch(variables, model, "resnet50")     # of numpy arrays

Which leaf is which entry is in `torch_names`, the files are in `weight_files`; torch is never needed here. A student
leaves a work directory by a command:

    python -m dgkd_jax.torch_port export --workdir=DIR --output=student.safetensors [--step=N|best|last] [--overwrite]
"""

import functools
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dgkd_jax import models
from dgkd_jax.errors import BadInput
from dgkd_jax.models import swin
from dgkd_jax.torch_names import entry_name
from dgkd_jax.weight_files import DOWNLOADS, load

__all__ = ["DOWNLOADS", "classes_of", "from_torch", "load", "to_torch"]

# A kernel's axes, by rank: convolution HWIO <-> OIHW, linear [in, out] <-> [out, in].
_TORCH_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}
_OUR_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}

_RUNNING_VAR = ".running_var"
_COUNTER = ".num_batches_tracked"  # PyTorch's count of training steps; files from before 2018 lack it
_BIAS_TABLE = ".relative_position_bias_table"
_INDEX = ".relative_position_index"  # which row of that table belongs to which two tokens: the network's own
_SHOWN = 4  # entries of each kind that an error lists
_MARK = 1_000_003  # a number of classes that no layer has as its width, so it marks the head's shapes


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    model: Any,
    name: str,
    *,
    image_shape: tuple[int, int, int] | None = None,
    replace_head: bool = False,
) -> dict:
    """The model's variables from PyTorch's entries.

    Args:
        state_dict: entry name -> array in PyTorch's layout: convolutions [out, in, height, width], linear
            layers [out, in]. `num_batches_tracked` and `relative_position_index` may be there or not; they are not
            kept.
        model: from `models.create(name, …)`.
        name: the model's name; it chooses the table.
        image_shape: (height, width, channels) of the images where they are not the family's usual ones.
        replace_head: take entries of another number of classes: the head gets fresh values (`models.initialise`, seed
            0), to be trained before anything is expected of it. No key of the configurations asks for this: a teacher
            with a fresh head has nothing to teach. A head of the right shape is kept.

    Returns:
        {"params": …, "batch_stats": …} of numpy arrays in the entries' own dtypes.

    Raises:
        BadInput: entries missing, surplus or of another shape (with the model that they would fit, if one
            does), not floating-point, or not finite; a `relative_position_index` that is not the network's; or a
            name that no table covers.
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
    """PyTorch's entries from the model's variables: the inverse of `from_torch`.

    Args:
        variables: {"params": …, "batch_stats": …} of arrays.
        model: from `models.create(name, …)`.
        name: the model's name; it chooses the table.
        image_shape: (height, width, channels) of the images where they are not the family's usual ones.

    Returns:
        Entry name -> numpy array in PyTorch's layout and the leaf's dtype; and PyTorch's int64 buffers:
        `num_batches_tracked`, which is 0, and `relative_position_index`.

    Raises:
        BadInput: leaves missing, surplus or of another shape, or a name that no table covers.
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
    """Number of classes of a model's PyTorch entries: the size of their head.

    Args:
        state_dict: entry name -> array in PyTorch's layout.
        name: the model's; it says which entries are the head.

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
    """The entries with those of the head replaced if nothing but the number of classes, their first axis, differs."""
    head = [entry for entry, shape in _marked_shapes(name).items() if _MARK in shape]
    given = {entry: np.shape(state_dict.get(entry, ())) for entry in head}
    classes = {shape[:1] for shape in given.values()}
    fits = all(shape[1:] == expected[entry][1:] for entry, shape in given.items())
    if not fits or len(classes) != 1 or classes == {expected[head[0]][:1]}:
        return dict(state_dict)  # the head of this network, or no such head, which the caller reports
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
    """What PyTorch's `state_dict` holds beside these entries, of which each stands for a leaf of ours."""
    buffers = {}
    for entry in entries:
        if entry.endswith(_RUNNING_VAR):
            buffers[entry.removesuffix(_RUNNING_VAR) + _COUNTER] = np.zeros((), np.int64)
        elif entry.endswith(_BIAS_TABLE):
            buffers[entry.removesuffix(_BIAS_TABLE) + _INDEX] = swin.relative_position_index()
    return buffers


def _without_buffers(entries: Mapping[str, Any], expected: Iterable[str]) -> dict[str, Any]:
    # Only a buffer that the model has may go; any other is a surplus entry like the rest.
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
    """Which of our models the entries would fit, whatever their number of classes."""
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
    """PyTorch's entries of a model with `_MARK` classes; not to be changed."""
    model = models.create(name, num_classes=_MARK)
    leaves, _ = _leaves(models.shapes(model, model.image_shape))
    return _torch_shapes(leaves, name)


def _check_numbers(entry: str, array: np.ndarray) -> None:
    if not jax.dtypes.issubdtype(array.dtype, np.floating):
        raise BadInput(f"PyTorch entry {entry} holds {array.dtype}, not floating-point numbers")
    finite = np.isfinite(array)
    if not finite.all():
        raise BadInput(f"PyTorch entry {entry}: {(~finite).sum()} of {array.size} values are NaN or infinite")


if __name__ == "__main__":
    from dgkd_jax import export  # a room above this one

    sys.exit(export.main(sys.argv[1:]))
