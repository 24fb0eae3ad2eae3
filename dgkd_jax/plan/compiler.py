"""The TPU's own compiler, on a machine without a TPU: devices to compile for, and what it refuses."""

import importlib.util
import os
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from dgkd_jax.data import quiet
from dgkd_jax.errors import BadInput
from dgkd_jax.plan.slices import Slice


def begin() -> None:
    """Make this process one that compiles for TPUs and has none; before JAX's first device is asked for.

    Raises:
        BadInput: the compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput("the TPU's compiler, libtpu, is not installed: pip install -e '.[plan]' (Linux on x86-64)")
    jax.config.update("jax_platforms", "cpu")
    # The compilation cache cannot read programs for devices that are not here, and warns.
    jax.config.update("jax_enable_compilation_cache", False)
    # Otherwise it asks a metadata server, and a second process that compiles at the same time is refused.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    quiet.absent_tpu()


def devices_of(wanted: Slice) -> Sequence[jax.Device]:
    """The slice's devices, to compile for. They are not here, so nothing can be put on them.

    Raises:
        BadInput: the compiler knows no such slice.
    """
    options = {"chip_config_name": "megacore"} if wanted.chip.name == "v4" else {}  # one device is a whole chip
    if wanted.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=wanted.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"--topology={wanted.name}: the compiler refuses it: {str(error).splitlines()[0]}") from error


class TooLarge(NamedTuple):
    """A program that does not fit.

    Attributes:
        needed_gib: what it needs on each chip; None where the compiler does not say.
        available_gib: what there is.
        seconds: that the compiler took.
    """

    needed_gib: float | None
    available_gib: float | None
    seconds: float


class Compiled(NamedTuple):
    """A program, and the seconds that the compiler took."""

    program: jax.stages.Compiled
    seconds: float


_NEEDED = (
    re.compile(r"\((?P<needed>[\d.]+)(?P<unit>[KMGT])\) exceeds available HBM \((?P<there>[\d.]+)G\)"),
    re.compile(r"Used (?P<needed>[\d.]+)(?P<unit>[KMGT]) of (?P<there>[\d.]+)G hbm"),
)
_IN_GIB = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}


def compile_it(lowered: jax.stages.Lowered) -> Compiled | TooLarge:
    """The program, compiled for the devices of its arguments."""
    began = time.monotonic()
    try:
        return Compiled(lowered.compile(), time.monotonic() - began)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return TooLarge(*needed(str(error)), time.monotonic() - began)


def needed(message: str) -> tuple[float | None, float | None]:
    """GiB that a program needs and that there are, from the compiler's refusal."""
    for pattern in _NEEDED:
        if match := pattern.search(message):
            return float(match["needed"]) * _IN_GIB[match["unit"]], float(match["there"])
    return None, None
