"""Finds oneDNN, compiles `conv.cc` and `batch_norm.cc` on first use, and loads them; each once in a process."""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib
from jax.sharding import AxisType

SWITCH = "DGKD_ONEDNN"
_SOURCES = [Path(__file__).with_name(name) for name in ("conv.cc", "batch_norm.cc", "pieces.h")]
_CALLS = ("dgkd_convolve", "dgkd_normalise", "dgkd_pull_back")
_CACHE = "~/.cache/dgkd_jax/onednn"
_PACKAGES = ("onednn-cpu-gomp", "onednn-devel-cpu-gomp")


class Library(NamedTuple):
    """The loaded library.

    Attributes:
        key: ends the names of its custom calls. It follows the sources and the versions and is part of a program, so a
            process finds a program in the compilation cache only if it has what the program calls.
        version: of oneDNN's package.
        takes_bfloat16: whether oneDNN computes in it on this processor.
    """

    key: str
    version: str
    takes_bfloat16: bool


class _Missing(Exception):
    """Why there is no library; "" where nobody asked for one."""


def find() -> Library | None:
    """The library, or None where convolutions are XLA's. The first call may compile it, which takes seconds."""
    found = _found()
    return found if isinstance(found, Library) else None


def may_take(*arrays: jax.Array) -> bool:
    """Whether a custom call may have such arguments."""
    if not all(isinstance(size, int) and size > 0 for array in arrays for size in array.shape):
        return False  # in an exported program the batch may be open
    # Otherwise within a shard_map, or explicitly sharded.
    return all(set(jax.typeof(array).sharding.mesh.axis_types) <= {AxisType.Auto} for array in arrays)


def name() -> str:
    """Of what computes dense convolutions, with its version if it is not XLA."""
    return f"oneDNN {found.version}" if (found := find()) else "XLA"


def status() -> str:
    """One line for the log: `name`, and why; "" without the extra and on accelerators."""
    why = _found() if find() is None else f"{SWITCH}=0 for XLA's"
    return why and f"convolutions by {name()}: {why}"


@functools.cache
def _found() -> Library | str:
    try:
        return _load()
    except _Missing as why:
        return str(why)


def _load() -> Library:
    try:
        binary, headers = (metadata.distribution(package) for package in _PACKAGES)
    except metadata.PackageNotFoundError:
        raise _Missing from None
    if jax.default_backend() != "cpu":
        raise _Missing
    if os.environ.get(SWITCH) == "0":
        raise _Missing(f"{SWITCH}=0")
    if jax.process_count() > 1:  # one that lacked the library would have another program than the rest
        raise _Missing("oneDNN's are for runs of one process")
    parts = (*(source.read_text() for source in _SOURCES), jaxlib.__version__, binary.version, headers.version)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    try:
        onednn = _file(binary, "libdnnl.so.3")
        ctypes.CDLL(str(onednn))  # ours asks for it by name and finds it loaded, wherever the environment lies
        library = ctypes.CDLL(str(_compiled(key, onednn, _file(headers, "dnnl.hpp").parent)))
    except OSError as error:
        raise _Missing(f"oneDNN cannot be loaded: {error}") from error
    for call in _CALLS:
        jax.ffi.register_ffi_target(f"{call}_{key}", jax.ffi.pycapsule(getattr(library, call)), platform="cpu")
    return Library(key, binary.version, bool(library.dgkd_takes_bfloat16()))


def _file(package: metadata.Distribution, name: str) -> Path:
    """The first of a package's files that has this name."""
    found = [Path(package.locate_file(file)).resolve() for file in package.files or () if file.name == name]
    if not found:
        raise _Missing(f"the package {package.name} has no {name}")
    return found[0]


def _compiled(key: str, onednn: Path, include: Path) -> Path:
    """The library in the user's cache, compiled now if it is not there; processes may do so at the same time."""
    library = Path(_CACHE).expanduser() / f"{key}.so"
    if library.exists():
        return library
    print("dgkd_jax: compiling what calls oneDNN, once; takes seconds", file=sys.stderr, flush=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    compiler, own = os.environ.get("CXX", "g++"), library.with_suffix(f".{os.getpid()}")
    command = [*shlex.split(compiler), "-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp"]
    sources = [str(source) for source in _SOURCES if source.suffix == ".cc"]
    try:
        subprocess.run(
            [*command, f"-I{jax.ffi.include_dir()}", f"-I{include}", *sources, "-o", str(own), str(onednn)],
            check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        own.replace(library)
    except FileNotFoundError as error:
        raise _Missing(f"oneDNN is installed, but the compiler {compiler} is not") from error
    except subprocess.SubprocessError as error:
        said = [line for line in (getattr(error, "stderr", None) or "").splitlines() if "error" in line]
        raise _Missing(f"{compiler} could not compile {_SOURCES[0].parent}: {(said or [error])[0]}") from error
    finally:
        own.unlink(missing_ok=True)
    return library
