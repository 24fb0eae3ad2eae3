"""PyTorch `state_dict` <-> variables: a strict bijection of entry names and shapes, both ways without loss.

    arrays = torch_port.load("resnet50.pth")                           # or .safetensors, .npz
    variables = torch_port.from_torch(arrays, model, "resnet50")
    state_dict = torch_port.to_torch(variables, model, "resnet50")     # of numpy arrays

A family is a table of substitutions that turn our path of a leaf into PyTorch's entry name. Only reading a
.pth file needs torch.
"""

import functools
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dgkd_jax import models
from dgkd_jax.errors import BadInput
from dgkd_jax.models import swin

Substitutions = tuple[tuple[str, str], ...]

_EVERY_FAMILY: Substitutions = (
    (r"^(params|batch_stats)/", ""),
    (r"/(kernel|scale)$", "/weight"),
    (r"/(mean|var)$", r"/running_\1"),
)
_RESNET: Substitutions = ((r"_(\d+)/", r"/\1/"),)  # layer1_0/ is layer1.0., downsample_0/ is downsample.0.
_RESNET_MDISTILLER: Substitutions = (*_RESNET, ("downsample", "shortcut"), ("^fc/", "linear/"))
_VGG: Substitutions = (*_RESNET, ("^fc/", "classifier/"))
_WRN: Substitutions = ((r"^(block\d)_(\d+)/", r"\1/layer/\2/"), ("shortcut", "convShortcut"))
_SHUFFLENET_V1_CIFAR: Substitutions = (*_RESNET, ("^fc/", "linear/"))
_SHUFFLENET_V2_CIFAR: Substitutions = (
    (r"^stem_(conv|bn)/", r"\g<1>1/"),
    (r"^last_(conv|bn)/", r"\g<1>2/"),
    (r"_0/right_(conv|bn)3/", r"_0/\g<1>5/"),  # a stage's first unit counts on from its left side
    (r"_0/right_(conv|bn)2/", r"_0/\g<1>4/"),
    (r"_0/right_(conv|bn)1/", r"_0/\g<1>3/"),
    (r"/(left|right)_", "/"),
    ("^stage2_", "layer1_"),
    ("^stage3_", "layer2_"),
    ("^stage4_", "layer3_"),
    *_SHUFFLENET_V1_CIFAR,
)
_SHUFFLENET_V2: Substitutions = (
    ("^stem_conv/", "conv1_0/"),
    ("^stem_bn/", "conv1_1/"),
    ("^last_conv/", "conv5_0/"),
    ("^last_bn/", "conv5_1/"),
    ("left_conv1/", "branch1_0/"),
    ("left_bn1/", "branch1_1/"),
    ("left_conv2/", "branch1_2/"),
    ("left_bn2/", "branch1_3/"),
    ("right_conv1/", "branch2_0/"),
    ("right_bn1/", "branch2_1/"),
    ("right_conv2/", "branch2_3/"),
    ("right_bn2/", "branch2_4/"),
    ("right_conv3/", "branch2_5/"),
    ("right_bn3/", "branch2_6/"),
    *_RESNET,
)
_MOBILENET_V2_MDISTILLER: Substitutions = (
    ("^stem_conv/", "conv1/0/"),
    ("^stem_bn/", "conv1/1/"),
    ("^last_conv/", "conv2/0/"),
    ("^last_bn/", "conv2/1/"),
    (r"^stage(\d)_(\d)/", r"blocks/\1/\2/conv/"),
    ("/expand/", "/0/"),
    ("/expand_bn/", "/1/"),
    ("/depthwise/", "/3/"),
    ("/depthwise_bn/", "/4/"),
    ("/project/", "/6/"),
    ("/project_bn/", "/7/"),
    ("^fc/", "classifier/0/"),
)
_MOBILENET_V2: Substitutions = (
    ("^stem_conv/", "features/0/0/"),
    ("^stem_bn/", "features/0/1/"),
    ("^last_conv/", "features/18/0/"),
    ("^last_bn/", "features/18/1/"),
    ("^stage0_0/depthwise/", "stage0_0/0/0/"),  # the block without the expanding convolution
    ("^stage0_0/depthwise_bn/", "stage0_0/0/1/"),
    ("^stage0_0/project/", "stage0_0/1/"),
    ("^stage0_0/project_bn/", "stage0_0/2/"),
    ("/expand/", "/0/0/"),
    ("/expand_bn/", "/0/1/"),
    ("/depthwise/", "/1/0/"),
    ("/depthwise_bn/", "/1/1/"),
    ("/project/", "/2/"),
    ("/project_bn/", "/3/"),
    *(  # one number for all blocks; the seven stages have 1, 2, 3, 4, 3, 3 and 1 of them
        (f"^stage{stage}_{index}/", f"features/{1 + before + index}/conv/")
        for stage, (before, size) in enumerate(((0, 1), (1, 2), (3, 3), (6, 4), (10, 3), (13, 3), (16, 1)))
        for index in range(size)
    ),
    ("^fc/", "classifier/1/"),
)
_EFFICIENTNET_LITE: Substitutions = (
    *_RESNET,
    (r"(^|/)(?=[a-z]\w*/)", r"\1_"),  # blocks/3/bn1/ is _blocks.3._bn1.
)
_VIT: Substitutions = (("^patch_embed_proj/", "patch_embed/proj/"), (r"^blocks_(\d+)/", r"blocks/\1/"))
_NUMBERED: Substitutions = ((r"_(\d+)(?=[_/])", r"/\1"),)  # features_1_0/ is features.1.0.
_CONVNEXT: Substitutions = (
    ("/dwconv/", "/block/0/"),
    ("/norm/", "/block/2/"),
    ("/mlp/fc1/", "/block/3/"),
    ("/mlp/fc2/", "/block/5/"),
    *_NUMBERED,
)
_SWIN: Substitutions = (
    ("/mlp/fc1/", "/mlp/0/"),
    ("/mlp/fc2/", "/mlp/3/"),
    (r"/relative_position_bias_table$", r"/attn\g<0>"),
    *_NUMBERED,
)

# (regular expression that fits the model's whole name, substitutions after those of every family)
_FAMILIES: tuple[tuple[str, Substitutions], ...] = (
    (r"resnet(18|34|50|101)_cifar", _RESNET_MDISTILLER),
    (r"resnet\d+(x4)?", _RESNET),
    (r"vgg\d+(_bn)?", _VGG),
    (r"wrn_\d+_\d+", _WRN),
    (r"shufflenet_v1_cifar", _SHUFFLENET_V1_CIFAR),
    (r"shufflenet_v2_cifar", _SHUFFLENET_V2_CIFAR),
    (r"shufflenet_v2_x\d_\d", _SHUFFLENET_V2),
    (r"mobilenet_v2", _MOBILENET_V2),
    (r"mobilenet_v2_half_cifar", _MOBILENET_V2_MDISTILLER),
    (r"small_cnn_w\d+", ()),
    (r"efficientnet_lite\d", _EFFICIENTNET_LITE),
    (r"(vit|deit)_\w+", _VIT),
    (r"convnext_\w+", _CONVNEXT),
    (r"swin_\w+", _SWIN),
)

# A kernel's axes, by rank: convolution HWIO <-> OIHW, linear [in, out] <-> [out, in].
_TORCH_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}
_OUR_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}

_RUNNING_VAR = ".running_var"
_COUNTER = ".num_batches_tracked"  # PyTorch's count of training steps; files from before 2018 lack it
_BIAS_TABLE = ".relative_position_bias_table"
_INDEX = ".relative_position_index"  # which row of that table belongs to which two tokens: the network's own
_SHOWN = 4  # entries of each kind that an error lists
_MARK = 1_000_003  # a number of classes that no layer has as its width, so it marks the head's shapes

# Where torchvision publishes the weights that the configurations name (IMAGENET1K_V1 of each network).
DOWNLOADS = {
    file: f"https://download.pytorch.org/models/{file}"
    for file in (
        "resnet18-f37072fd.pth",
        "resnet34-b627a593.pth",
        "resnet50-0676ba61.pth",
        "resnet101-63fe2227.pth",
    )
}

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    model: Any,
    name: str,
    *,
    image_shape: tuple[int, int, int] | None = None,
) -> dict:
    """The model's variables from PyTorch's entries.

    Args:
        state_dict: entry name -> array in PyTorch's layout: convolutions [out, in, height, width], linear
            layers [out, in]. `num_batches_tracked` and `relative_position_index` may be there or not; they are not
            kept.
        model: from `models.create(name, …)`.
        name: the model's name; it chooses the table.
        image_shape: (height, width, channels) of the images where they are not the family's usual ones.

    Returns:
        {"params": …, "batch_stats": …} of numpy arrays in the entries' own dtypes.

    Raises:
        BadInput: entries missing, surplus or of another shape (with the model that they would fit, if one
            does), not floating-point, or not finite; a `relative_position_index` that is not the network's; or a
            name that no table covers.
    """
    leaves, structure = _leaves(models.shapes(model, image_shape or model.image_shape))
    expected = _torch_shapes(leaves, name)
    given = _without_buffers({entry: np.shape(array) for entry, array in state_dict.items()}, expected)
    if problems := _differences(given, expected):
        raise BadInput(f"these PyTorch entries are not those of {name}:\n{problems}\n{_what_fits(given)}")
    for entry in expected:
        _check_numbers(entry, state_dict[entry])
    for entry, buffer in _buffers(expected).items():
        if entry.endswith(_INDEX) and not np.array_equal(state_dict.get(entry, buffer), buffer):
            raise BadInput(f"PyTorch entry {entry} is not that of {name}: its windows or their tokens lie otherwise")
    return structure.unflatten([_transposed(path, state_dict[_entry_name(path, name)], _OUR_AXES) for path in leaves])


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
        raise BadInput(f"these variables are not those of {name}:\n{problems}")
    state_dict = {}
    for path, leaf in leaves.items():
        state_dict[_entry_name(path, name)] = _transposed(path, np.asarray(leaf), _TORCH_AXES)
    return state_dict | _buffers(state_dict)


def load(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a weight file, by entry name; no code in the file is ever run.

    Args:
        path: .npz, .safetensors, or .pth/.pt (these need torch installed). A checkpoint that wraps its
            entries as {"model": …} or {"state_dict": …}, and the prefix "module." of DataParallel, are
            unwrapped.

    Returns:
        Entry name -> numpy array, in the file's dtypes (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        BadInput: no such file, unknown kind, damaged, holding other objects than tensors, or torch missing.
    """
    path = Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".pth": _read_pth, ".pt": _read_pth}
    if path.suffix not in readers:
        raise BadInput(f"weights {path}: unknown kind of file; known are {', '.join(readers)}")
    if not path.is_file():
        raise BadInput(f"weights {path}: no such file (looked for {path.absolute()})")
    arrays = readers[path.suffix](path)
    if all(entry.startswith("module.") for entry in arrays):
        arrays = {entry.removeprefix("module."): array for entry, array in arrays.items()}
    return arrays


def _leaves(tree: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    keystr = jax.tree_util.keystr
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in paths_and_leaves}, structure


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def _entry_name(path: str, name: str) -> str:
    table = next((table for pattern, table in _FAMILIES if re.fullmatch(pattern, name)), None)
    if table is None:
        raise BadInput(f"model {name!r} has no table of PyTorch names; names are in dgkd_jax.models.NAMES")
    for pattern, replacement in (*_EVERY_FAMILY, *table):
        path = re.sub(pattern, replacement, path)
    return path.replace("/", ".")


def _torch_shapes(leaves: Mapping[str, Any], name: str) -> dict[str, tuple[int, ...]]:
    return {
        _entry_name(path, name): tuple(shape[axis] for axis in _axes(path, len(shape), _TORCH_AXES))
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
    return "\n".join(f"  {kind}: {_first_few(found)}" for kind, found in kinds.items() if found)


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


def _damaged(path: Path, error: Exception) -> BadInput:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:100]
    return BadInput(f"weights {path}: not a whole {path.suffix} file ({reason}); fetch or write it again")


def _needs_unpickling(path: Path) -> BadInput:
    return BadInput(
        f"weights {path}: holds Python objects besides tensors; loading them could run any code, so it is "
        "refused. Where the file comes from, save the tensors alone: torch.save(model.state_dict(), …) or "
        "safetensors.torch.save_file(model.state_dict(), …)"
    )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        zipfile.ZipFile(path).close()  # np.load would take a file of any other kind for a pickle
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise (_needs_unpickling(path) if "allow_pickle" in str(error) else _damaged(path, error)) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """A length (8 bytes, little-endian), that much JSON {entry: dtype, shape, data_offsets}, then the data.

    Source: https://github.com/huggingface/safetensors, section Format.
    """
    try:
        content = memoryview(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8:start]))
        header.pop("__metadata__", None)
        return {entry: _safetensors_array(content[start:], **fields) for entry, fields in header.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _safetensors_array(data: memoryview, *, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    if dtype not in _SAFETENSORS_DTYPES:
        raise ValueError(f"dtype {dtype}; readable are {', '.join(_SAFETENSORS_DTYPES)}")
    begin, end = data_offsets
    return np.frombuffer(data[begin:end], _SAFETENSORS_DTYPES[dtype]).reshape(shape).copy()


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise BadInput(
            f"weights {path}: reading {path.suffix} needs torch: python -m pip install 'torch'. "
            "Or save them as .safetensors, which needs nothing: safetensors.torch.save_file(state_dict, …)"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise (_needs_unpickling(path) if "Unsupported" in str(error) else _damaged(path, error)) from error
    except Exception as error:  # a damaged file makes torch raise whatever its reader runs into
        raise _damaged(path, error) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(leaf, torch.Tensor) for leaf in content.values()):
        held = _first_few([str(key) for key in content]) if isinstance(content, dict) else type(content).__name__
        raise BadInput(f"weights {path}: no state_dict found at the top, under model or state_dict; it holds {held}")
    try:
        return {entry: _numpy(tensor.detach(), torch) for entry, tensor in content.items()}
    except (TypeError, RuntimeError) as error:  # sparse, quantised or 8-bit floating-point tensors
        raise BadInput(f"weights {path}: {error}") from error


def _numpy(tensor: Any, torch: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # unknown to tensor.numpy()
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
