"""Reads and writes weight files as arrays by entry name: .safetensors, .npz, and .pth (only this one needs torch)."""

import io
import json
import math
import pickle
import re
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dgkd_jax.data.hosts import resolves
from dgkd_jax.errors import BadInput

# URLs of the torchvision weights that the configs name (IMAGENET1K_V1 of each network).
DOWNLOADS = {
    file: f"https://download.pytorch.org/models/{file}"
    for file in (
        "resnet18-f37072fd.pth",
        "resnet34-b627a593.pth",
        "resnet50-0676ba61.pth",
        "resnet101-63fe2227.pth",
    )
}
HUB, HUB_HOST = "hf:", "huggingface.co"  # hf:ORG/NAME is a model on huggingface.co
WRITABLE = (".safetensors", ".npz")
_HUB_FILE = "model.safetensors"

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


def load(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a weight file by entry name. No code in the file is run.

    Args:
        path: .npz, .safetensors, or .pth/.pt or no suffix (mdistiller's files); the last three need torch. Or
            hf:ORG/NAME[/FILE], a file of huggingface.co (default: model.safetensors), downloaded once into
            huggingface_hub's cache.

    Returns:
        Entry name -> numpy array, in the file's dtypes (bfloat16 as `ml_dtypes.bfloat16`). Wrappers of checkpoints are
        removed: {"model": …}, {"state_dict": …}, and DataParallel's prefix "module.". Of mdistiller's checkpoints of a
        whole distiller, "student.…" and "teacher.…", the student's entries are returned.

    Raises:
        BadInput: no such file, unknown kind, damaged, holds objects other than tensors, torch or huggingface_hub is
            missing, or the download failed.
    """
    path = _from_hub(str(path)) if str(path).startswith(HUB) else Path(path)
    readers = {
        ".npz": _read_npz, ".safetensors": _read_safetensors, ".pth": _read_pth, ".pt": _read_pth, "": _read_pth,
    }  # fmt: skip
    if path.suffix not in readers:
        raise BadInput(f"weights {path}: unknown kind of file; known are {', '.join(filter(None, readers))}")
    if not path.is_file():
        raise BadInput(f"weights {path}: no such file (looked for {path.absolute()})")
    return _unprefixed(readers[path.suffix](path))


def _unprefixed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if all(entry.startswith("module.") for entry in arrays):
        arrays = {entry.removeprefix("module."): array for entry, array in arrays.items()}
    student = {entry.removeprefix("student."): array for entry, array in arrays.items() if entry.startswith("student.")}
    return student or arrays


def _from_hub(name: str) -> Path:
    """The local copy of hf:ORG/NAME[/FILE]."""
    parts = name.removeprefix(HUB).split("/", 2)
    if len(parts) < 2 or not all(re.fullmatch(r"\w[\w.-]*", word) for part in parts for word in part.split("/")):
        raise BadInput(f"weights {name}: a model of huggingface.co is written hf:ORG/NAME or hf:ORG/NAME/FILE")
    organisation, model, file = parts if len(parts) == 3 else (*parts, _HUB_FILE)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise BadInput(
            f"weights {name}: fetching them needs huggingface_hub: python -m pip install 'huggingface_hub'. "
            f"Or download {file} yourself and name the file"
        ) from error
    try:
        # Without a network the library would retry for minutes and print 22 lines.
        offline = not (urllib.request.getproxies() or resolves(HUB_HOST))
        return Path(hf_hub_download(repo_id=f"{organisation}/{model}", filename=file, local_files_only=offline))
    except Exception as error:  # of the hub's, the HTTP library's or the system's own types
        raise BadInput(
            f"weights {name}: {file} is neither in huggingface_hub's cache nor to be had from huggingface.co "
            f"({_reason(error, limit=300)})"
        ) from error


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, suffix: str) -> bytes:
    """The content of a weight file.

    Args:
        arrays: entry name -> array.
        metadata: name -> text; stored as `__metadata__` of .safetensors, or as JSON in the comment of the .npz archive.
        suffix: from `WRITABLE`.
    """
    return {".safetensors": _encode_safetensors, ".npz": _encode_npz}[suffix](arrays, metadata)


def _encode_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    data, begin = [], 0
    # Wide dtypes first and a header of a multiple of 8 bytes: so every array is aligned, for readers of memory maps.
    for entry, array in sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize):
        end = begin + array.nbytes
        header[entry] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        data.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
        begin = end
    text = json.dumps(header).encode()
    text = text.ljust(8 * math.ceil(len(text) / 8))
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def _encode_npz(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    with zipfile.ZipFile(content, "a") as archive:
        archive.comment = json.dumps(dict(metadata)).encode()
    return content.getvalue()


def _reason(error: Exception, *, limit: int) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:limit]


def _damaged(path: Path, error: Exception) -> BadInput:
    reason = _reason(error, limit=100)
    return BadInput(f"weights {path}: not a whole {path.suffix or '.pth'} file ({reason}); fetch or write it again")


def _needs_unpickling(path: Path) -> BadInput:
    return BadInput(
        f"weights {path}: holds Python objects besides tensors; loading them could run any code, so it is "
        "refused. Where the file comes from, save the tensors alone: torch.save(model.state_dict(), …) or "
        "safetensors.torch.save_file(model.state_dict(), …)"
    )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        zipfile.ZipFile(path).close()  # np.load would treat any other kind of file as a pickle
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise (_needs_unpickling(path) if "allow_pickle" in str(error) else _damaged(path, error)) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Format: a length (8 bytes, little-endian), that much JSON {entry: dtype, shape, data_offsets}, then the data.

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
            f"weights {path}: reading {path.suffix or '.pth'} needs torch: python -m pip install 'torch'. "
            "Or save them as .safetensors, which needs nothing: safetensors.torch.save_file(state_dict, …)"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise (_needs_unpickling(path) if "Unsupported" in str(error) else _damaged(path, error)) from error
    except Exception as error:  # a damaged file makes torch raise anything
        raise _damaged(path, error) from error
    while isinstance(content, dict) and (
        wrapped := [content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)]
    ):
        content = wrapped[0]
    if not isinstance(content, dict) or not all(isinstance(leaf, torch.Tensor) for leaf in content.values()):
        held = ", ".join(str(key) for key in list(content)[:4]) if isinstance(content, dict) else type(content).__name__
        raise BadInput(f"weights {path}: no state_dict found at the top, under model or state_dict; it holds {held}")
    try:
        return {entry: _numpy(tensor.detach(), torch) for entry, tensor in content.items()}
    except (TypeError, RuntimeError) as error:  # sparse, quantised or 8-bit floating-point tensors
        raise BadInput(f"weights {path}: {error}") from error


def _numpy(tensor: Any, torch: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # unknown to tensor.numpy()
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
