"""The format of a cache of logits on disk: writing and reading it block by block.

A cache is a folder with `manifest.json` and one zarr array [epoch, step, row, …] per part, written and read by
TensorStore (which Orbax uses too). A block is some whole steps, one file per array. It counts only once the manifest
holds its digest, so a block that is half-written, lost or changed is never used.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from dgkd_jax import __version__
from dgkd_jax.errors import BadInput, StorageFailure
from dgkd_jax.runs.files import write_whole
from dgkd_jax.training.cached_logits import top_classes

MANIFEST = "manifest.json"
_KIND = "dgkd_jax teacher logits, version 1"
# An interruption loses at most one block, and a block is one file: so its size before compression is limited.
_BLOCK_BYTES, _BLOCK_STEPS = 16 * 2**20, 256


Requested = dict[str, ts.Future]  # the parts of a block that is being read


class About(NamedTuple):
    """Description of a cache.

    Attributes:
        teacher: fingerprint of its weights.
        batches: from `config.identity_of_batches`: the keys that decide the batches and the teacher's input.
        batch_size: B, rows of a global batch.
        steps_per_epoch: batches in an epoch.
        num_classes: C.
        top_k: classes stored of each row; 0: all C.
        temperature: T of the log-sum over the classes that are not stored; None where all are stored.
        dtype: float16 or float32: of the logits where all are stored.
    """

    teacher: str
    batches: dict[str, Any]
    batch_size: int
    steps_per_epoch: int
    num_classes: int
    top_k: int = 0
    temperature: float | None = None
    dtype: str = "float16"

    @property
    def parts(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Array name -> dtype and shape of one row. `check` is the row's checksum (`source.row_checks`)."""
        if not self.top_k:
            logits = {"logits": (np.dtype(self.dtype), (self.num_classes,))}
        else:
            classes = np.uint16 if self.num_classes <= 2**16 else np.uint32
            stored = (self.top_k,)
            logits = {"values": (np.float16, stored), "classes": (classes, stored), "rest": (np.float32, ())}
        parts = logits | {"check": (np.uint32, ())}
        return {name: (np.dtype(kind), shape) for name, (kind, shape) in parts.items()}

    @property
    def block_steps(self) -> int:
        """Steps in a block; the last block of an epoch may be shorter."""
        row = sum(kind.itemsize * int(np.prod(shape)) for kind, shape in self.parts.values())
        return max(1, min(_BLOCK_BYTES // (row * self.batch_size), _BLOCK_STEPS, self.steps_per_epoch))

    @property
    def description(self) -> str:
        if not self.top_k:
            return f"cached in {self.dtype}"
        return f"cached as the top {self.top_k} of {self.num_classes} classes at T = {self.temperature:g}"

    def blocks(self, epochs: int) -> list["Block"]:
        """All blocks of this many epochs, in order."""
        return [
            Block(epoch, first, min(first + self.block_steps, self.steps_per_epoch))
            for epoch in range(epochs)
            for first in range(0, self.steps_per_epoch, self.block_steps)
        ]


class Block(NamedTuple):
    """Steps [first, last) of one epoch; steps and epochs count from 0."""

    epoch: int
    first: int
    last: int

    @property
    def key(self) -> str:
        return f"{self.epoch}/{self.first}"


def encode(logits: np.ndarray, labels: np.ndarray, checks: np.ndarray, about: About) -> dict[str, np.ndarray]:
    """Float32 logits `[steps, B, C]`, labels and checks `[steps, B]` -> the parts to store."""
    if not about.top_k:
        return {"logits": logits.astype(about.dtype), "check": checks}
    stored = top_classes.shorten(logits, labels, count=about.top_k, temperature=about.temperature)
    return stored._asdict() | {"check": checks}


def decode(parts: dict[str, np.ndarray], about: About) -> np.ndarray:
    """The parts of a block -> logits `[steps, B, C]`, float16 or as stored."""
    if not about.top_k:
        return parts["logits"]
    stored = top_classes.TopClasses(parts["values"], parts["classes"], parts["rest"])
    return top_classes.restore(stored, num_classes=about.num_classes, temperature=about.temperature)


class Writer:
    """Writes a cache, continuing one that is there. Changes nothing on disk before `open`.

    Args:
        folder: of the cache.
        about: its description.
        epochs: to hold; the cache grows to this many, and never shrinks.

    Raises:
        BadInput: the folder holds something else.
    """

    def __init__(self, folder: epath.Path, about: About, *, epochs: int):
        self._folder, self.about = folder, about
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"--output={folder} is a file; give a folder")
        manifest = read_manifest(folder)
        if manifest is None and folder.exists() and any(path.name != "lock" for path in folder.iterdir()):
            raise BadInput(
                f"--output={folder} holds files that are no cache of a teacher's logits; give another folder"
            )
        if manifest is not None and (other := differences(manifest, about)):
            raise BadInput(
                f"{folder} holds other logits of a teacher ({other}). Give another --output, or remove this one."
            )
        self._digests: dict[str, str] = manifest["blocks"] if manifest else {}
        self._epochs, self._wanted = max(epochs, manifest["epochs"] if manifest else 0), epochs
        self._stores: dict[str, ts.TensorStore] = {}

    def open(self) -> list[Block]:
        """Create the folder and its arrays where they are missing, and verify the blocks that are there.

        Returns:
            The blocks to write: missing or damaged.

        Raises:
            StorageFailure: the folder cannot be written.
        """
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._save()
            for name in self.about.parts:
                self._stores[name] = _create(self._folder, name, self.about, self._epochs)
        return [block for block in self.about.blocks(self._wanted) if not self._is_whole(block)]

    def write(self, block: Block, parts: dict[str, np.ndarray]) -> None:
        """Store a block: each of `about.parts` as `[steps, B, …]`.

        Raises:
            StorageFailure: a write failed; the block does not count then.
        """
        with self._writing():
            futures = [_at(self._stores[name], block).write(values) for name, values in parts.items()]
            for future in futures:
                future.result()
            self._digests[block.key] = digest(parts)
            self._save()

    def _is_whole(self, block: Block) -> bool:
        if block.key not in self._digests:
            return False
        try:
            return digest(received(requested(self._stores, block))) == self._digests[block.key]
        except (OSError, ValueError):
            return False

    def _save(self) -> None:
        manifest = {
            "kind": _KIND,
            **self.about._asdict(),
            "epochs": self._epochs,
            "block_steps": self.about.block_steps,
            "blocks": self._digests,
            "made_with": {
                "dgkd_jax": __version__,
                **{package: version(package) for package in ("jax", "tensorstore")},
                "device": jax.devices()[0].device_kind,
            },
        }
        write_whole(self._folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises ValueError for storage errors
            why = " ".join(str(error).split())[:300]
            raise StorageFailure(
                f"the teacher's logits could not be written in {self._folder}: {why}. {len(self._digests)} blocks are "
                "whole. Make room or mend the storage, then give the same command again."
            ) from error


def digest(parts: dict[str, np.ndarray]) -> str:
    """A SHA-256 of all parts of a block, cut to 16 hexadecimal digits."""
    content = hashlib.sha256()
    for name in sorted(parts):
        content.update(np.ascontiguousarray(parts[name]))
    return content.hexdigest()[:16]


def read_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """The manifest of a cache; None where there is no such file.

    Raises:
        BadInput: the file is not a manifest.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}): remove {folder} and make the cache again") from error
    needed = {*About._fields, "epochs", "blocks"} - About._field_defaults.keys()
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND or not needed <= manifest.keys():
        raise BadInput(f"{path} is not that of a cache of teacher logits which this version reads")
    return About._field_defaults | manifest


def differences(manifest: dict[str, Any], wanted: About) -> str:
    """How a cache differs from the wanted one, as text; "" where it does not."""
    there, here = manifest["batches"], json.loads(json.dumps(wanted.batches))
    found = [
        f"config.{key}={there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there | here)
        if there.get(key) != here.get(key)
    ]
    for name in ("teacher", "steps_per_epoch", "num_classes", "top_k", "temperature", "dtype"):
        if manifest[name] != getattr(wanted, name):
            word = "weights of the teacher" if name == "teacher" else name
            found.append(f"{word} {manifest[name]} there, {getattr(wanted, name)} here")
    return ", ".join(found)


def _at(store: ts.TensorStore, block: Block) -> ts.TensorStore:
    return store[block.epoch, block.first : block.last]


def requested(stores: dict[str, ts.TensorStore], block: Block) -> Requested:
    """Start reading a block."""
    return {name: _at(store, block).read() for name, store in stores.items()}


def received(parts: Requested) -> dict[str, np.ndarray]:
    """The parts of a block, each `[steps, B, …]`; their digest is not verified here.

    Raises:
        OSError, ValueError: a read failed.
    """
    return {name: future.result() for name, future in parts.items()}


def _spec(folder: epath.Path, name: str) -> dict[str, Any]:
    path = os.fspath(folder)
    local = {"driver": "file", "path": os.path.join(os.path.abspath(path), name)}
    return {
        "driver": "zarr3",
        "kvstore": f"{path}/{name}/" if "://" in path else local,
        "fill_missing_data_reads": False,
    }


def _create(folder: epath.Path, name: str, about: About, epochs: int) -> ts.TensorStore:
    """The array `name`: created, or extended to this many epochs."""
    kind, row = about.parts[name]
    shape = [epochs, about.steps_per_epoch, about.batch_size, *row]
    try:
        store = ts.open(_spec(folder, name), open=True).result()
    except ValueError as error:
        if "NOT_FOUND" not in str(error):
            raise
    else:
        return store.resize(exclusive_max=shape, expand_only=True).result()
    metadata = {
        "shape": shape,
        "data_type": kind.name,
        "fill_value": 0,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [1, about.block_steps, about.batch_size, *row]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},  # all chunks in one folder
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 3}},
        ],
    }
    return ts.open(_spec(folder, name) | {"metadata": metadata}, create=True).result()


def open_arrays(folder: epath.Path, about: About) -> dict[str, ts.TensorStore]:
    """The arrays of a cache, opened for reading.

    Raises:
        OSError, ValueError: one cannot be opened.
    """
    return {name: ts.open(_spec(folder, name), open=True, read=True).result() for name in about.parts}


def size_on_disk(folder: epath.Path) -> int:
    """Total size in bytes of a cache's files."""
    return sum(
        size_on_disk(path) if path.is_dir() else path.stat().length for path in folder.iterdir() if path.name != "lock"
    )
