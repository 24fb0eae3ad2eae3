"""Reads and writes weight files as arrays by entry name: .safetensors, .npz, and .pth (only this one needs torch)."""

import io
import json
import math
import os
import pickle
import pickletools
import re
import urllib.request
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

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
_SAFETENSORS_FIELDS = {"dtype", "shape", "data_offsets"}
_MOST_HEADER = 100_000_000  # bytes of JSON; the safetensors library has the same limit
_MOST_AXES = 64  # numpy's limit
_MOST_BYTES = 16 << 30  # of all arrays of a file together
# Weights hardly compress, so arrays far larger than their file are a mistake or an attack. Small files may hold zeros.
_MOST_UNFOLDED, _ALWAYS_ALLOWED = 100, 64 << 20


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
        BadInput: no such file, unknown kind, damaged, arrays far larger than the file, holds objects other than
            tensors, torch or huggingface_hub is missing, or the download failed.
    """
    path = _from_hub(str(path)) if str(path).startswith(HUB) else Path(path)
    readers = {
        ".npz": _read_npz, ".safetensors": _read_safetensors, ".pth": _read_pth, ".pt": _read_pth, "": _read_pth,
    }  # fmt: skip
    if path.suffix not in readers:
        raise BadInput(f"weights {path}: unknown kind of file; known are {', '.join(filter(None, readers))}")
    if not path.is_file():
        raise BadInput(f"weights {path}: no such file (looked for {path.absolute()})")
    try:
        path.open("rb").close()
    except OSError as error:
        raise BadInput(f"weights {path}: cannot be read: {error.strerror or error}") from error
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
    reason = " ".join(str(error).split()) if isinstance(error, _Damaged) else _reason(error, limit=100)
    return BadInput(f"weights {path}: not a whole {path.suffix or '.pth'} file ({reason}); fetch or write it again")


def _needs_unpickling(path: Path) -> BadInput:
    return BadInput(
        f"weights {path}: holds Python objects besides tensors; loading them could run any code, so it is "
        "refused. Where the file comes from, save the tensors alone: torch.save(model.state_dict(), …) or "
        "safetensors.torch.save_file(model.state_dict(), …)"
    )


class _Damaged(ValueError):
    """What is wrong with a file, for `_damaged`: a reason that needs no type beside it."""


def _check_size(path: Path, total: int) -> None:
    """Refuse arrays of `total` bytes together, before memory is taken for them, where the file cannot mean that."""
    size = path.stat().st_size
    if total > _MOST_BYTES:
        raise BadInput(f"weights {path}: its arrays have {total:,} bytes together; at most {_MOST_BYTES:,} are read")
    if total > max(_ALWAYS_ALLOWED, _MOST_UNFOLDED * size):
        raise BadInput(
            f"weights {path}: a file of {size:,} bytes whose arrays have {total:,} bytes; no weights compress like "
            "that, so it is refused. Fetch or write it again"
        )


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Not by numpy.load: it does not look at a checksum where an array ends before its entry of the archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) != (count := _count_at_the_end(path, archive)) or not count:
                raise _Damaged(f"its archive lists {len(entries)} entries, and says it has {count}")
            _check_size(path, sum(entry.file_size for entry in entries))
            _check_unique(entry.filename for entry in entries)
            arrays = {entry.filename.removesuffix(".npy"): _npz_array(archive, entry) for entry in entries}
    except BadInput:
        raise
    except pickle.UnpicklingError as error:
        raise _needs_unpickling(path) from error
    except Exception as error:  # a damaged archive makes zipfile and numpy raise anything
        raise _damaged(path, error) from error
    return arrays


def _count_at_the_end(path: Path, archive: zipfile.ZipFile) -> int:
    """The number of entries in the archive's last record, which zipfile does not compare with what it finds."""
    with path.open("rb") as file:
        file.seek(10 - 22 - len(archive.comment), os.SEEK_END)
        count = int.from_bytes(file.read(2), "little")
    return count if count < 0xFFFF else len(archive.infolist())  # then it is in a record of 64-bit numbers


def _npz_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    name = entry.filename
    if not name.endswith(".npy"):
        raise _Damaged(f"{_short(name)} in it is no .npy")
    if entry.flag_bits & 1:
        raise _Damaged(f"entry {_short(name)} is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # only of these the size is bounded
        raise _Damaged(f"entry {_short(name)} is compressed in another way than numpy's")
    with archive.open(entry) as file:
        content = io.BytesIO(file.read(entry.file_size))  # to the end: then its checksum has been compared
    shape, fortran_order, dtype = _npy_header(content)
    if dtype.hasobject:
        raise pickle.UnpicklingError(name)
    begin, given = content.tell(), len(content.getbuffer()) - content.tell()
    if math.prod(shape) * dtype.itemsize != given:
        raise _Damaged(f"entry {_short(name)}: {given} bytes for shape {shape} of {dtype}")
    flat = np.frombuffer(bytearray(content.getbuffer()[begin:]), dtype) if given else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _npy_header(content: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(content)
    if version not in readers:
        raise _Damaged(f".npy of version {version}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Python 2 wrote it
        shape, fortran_order, dtype = readers[version](content)
    if len(shape) > _MOST_AXES or not all(_is_size(length) for length in shape):
        raise _Damaged(f"shape {_short(shape)}")
    return shape, fortran_order, dtype


def _check_unique(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _Damaged(f"two entries have the name {_short(name)}")
        seen.add(name)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Format: a length (8 bytes, little-endian), that much JSON {entry: dtype, shape, data_offsets}, then the data.

    Source: https://github.com/huggingface/safetensors, section Format. The entries' data cover the rest of the file,
    without holes or overlaps.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            if size < 8 or start > size:
                raise _Damaged(f"it has {size} bytes, its header would end at byte {max(start, 8)}")
            if start - 8 > _MOST_HEADER:
                raise _Damaged(f"its header would have {start - 8} bytes, at most {_MOST_HEADER} are allowed")
            header = _safetensors_header(file.read(start - 8))
            _check_layout(header, size=size - start)
            return {entry: _safetensors_array(file, start, **fields) for entry, fields in header.items()}
    except Exception as error:  # JSON's own, and what numpy says of shapes
        raise _damaged(path, error) from error


def _safetensors_header(text: bytes) -> dict[str, dict[str, Any]]:
    """The entries' fields by entry, each checked by itself."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_unique(name for name, _ in pairs)
        return dict(pairs)

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except RecursionError as error:
        raise _Damaged("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise _Damaged("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Damaged("its __metadata__ is not names with texts")
    for entry, fields in header.items():
        name = _short(entry)
        if not isinstance(fields, dict) or fields.keys() != _SAFETENSORS_FIELDS:
            raise _Damaged(f"entry {name} does not have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _SAFETENSORS_DTYPES:
            raise _Damaged(f"dtype {_short(dtype)}; readable are {', '.join(_SAFETENSORS_DTYPES)}")
        if not (isinstance(shape, list) and len(shape) <= _MOST_AXES and all(map(_is_size, shape))):
            raise _Damaged(f"entry {name} has the shape {_short(shape)}")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets))):
            raise _Damaged(f"entry {name} has the data_offsets {_short(offsets)}")
        needed = math.prod(shape) * np.dtype(_SAFETENSORS_DTYPES[dtype]).itemsize
        if offsets[1] - offsets[0] != needed:
            raise _Damaged(f"entry {name}: {offsets[1] - offsets[0]} bytes by its data_offsets, {needed} by its shape")
    return header


def _check_layout(header: Mapping[str, Mapping[str, Any]], *, size: int) -> None:
    """The entries' data must follow each other and end where the file ends, `size` bytes after the header."""
    end = 0
    for (begin, this_end), entry in sorted((tuple(fields["data_offsets"]), entry) for entry, fields in header.items()):
        if begin != end:
            how = "a hole before" if begin > end else "an overlap with"
            raise _Damaged(f"its data have {how} entry {_short(entry)}")
        end = this_end
    if end != size:
        raise _Damaged(f"its header describes {end} bytes of data, the file has {size}")


def _safetensors_array(
    file: BinaryIO, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]
) -> np.ndarray:
    begin, end = data_offsets
    content = bytearray(end - begin)
    file.seek(start + begin)
    file.readinto(content)
    return np.frombuffer(content, _SAFETENSORS_DTYPES[dtype]).reshape(shape)


def _read_pth(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise BadInput(
            f"weights {path}: reading {path.suffix or '.pth'} needs torch: python -m pip install 'torch'. "
            "Or save them as .safetensors, which needs nothing: safetensors.torch.save_file(state_dict, …)"
        ) from error
    content = _unpickled(path, torch)
    seen = set()
    while isinstance(content, dict) and (
        wrapped := [content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)]
    ):
        if id(content) in seen:
            raise _damaged(path, _Damaged("its dictionary holds itself"))
        seen.add(id(content))
        content = wrapped[0]
    if not isinstance(content, dict) or not all(isinstance(leaf, torch.Tensor) for leaf in content.values()):
        keys = [_short(key) if isinstance(key, str | int) else type(key).__name__ for key in list(content)[:4]]
        held = ", ".join(keys) if isinstance(content, dict) else type(content).__name__
        raise BadInput(f"weights {path}: no state_dict found at the top, under model or state_dict; it holds {held}")
    if unnamed := [entry for entry in content if not isinstance(entry, str)]:
        shown = f"the {type(unnamed[0]).__name__} {_short(unnamed[0])}"
        raise BadInput(
            f"weights {path}: the tensors of a state_dict have texts for names, not {shown}. Save model.state_dict()"
        )
    try:
        arrays = {entry: _numpy(tensor.detach(), torch) for entry, tensor in content.items()}
    except (TypeError, RuntimeError) as error:  # sparse, quantised or 8-bit floating-point tensors
        raise BadInput(f"weights {path}: {error}") from error
    # A tensor with the stride 0 takes no memory here, but would with the first calculation.
    _check_size(path, sum(math.prod(array.shape) * array.itemsize for array in arrays.values()))
    return arrays


def _unpickled(path: Path, torch: Any) -> Any:
    """What a file of torch.save holds, without running code in it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_size(path, sum(entry.file_size for entry in archive.infolist()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another version of pickle wrote it
            return torch.load(path, map_location="cpu", weights_only=True)
    except BadInput:
        raise
    except Exception as error:  # a damaged file makes torch raise anything
        if isinstance(error, pickle.UnpicklingError):
            if re.search(r"unsupported (global|class)|allowlist", str(error), re.IGNORECASE) or _names_code(path):
                raise _needs_unpickling(path) from error
            if own := re.search(r"WeightsUnpickler error:\s*(.+)", str(error)):  # after advice that does not help here
                error = _Damaged(own[1])
        raise _damaged(path, error) from error


def _names_code(path: Path) -> bool:
    """Whether the file is a whole pickle, of any version, that names functions or classes. Nothing of it is run."""
    found = False
    try:
        with path.open("rb") as file:
            for operation, _, _ in pickletools.genops(file):
                found = found or operation.name in ("GLOBAL", "STACK_GLOBAL", "INST")
    except Exception:  # no pickle
        return False
    return found


def _numpy(tensor: Any, torch: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # unknown to tensor.numpy()
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
