"""The device mesh, and how arrays are sharded over it.

The mesh has two axes. Batches are split over both, large parameters over `fsdp`, and all else is on every device.
Programs are written for global arrays, so their numbers do not depend on the number of devices.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dgkd_jax.models import platform

# Smaller parameters are replicated: an all-gather in every step would cost more than a copy on every device.
LARGE_BYTES = 4 * 2**20


def make_mesh(*, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices as a `("data", "fsdp")` mesh.

    Args:
        fsdp: devices over which large parameters are sharded; must divide the number of devices.
        devices: None: all of all processes. Others need not be here: programs can be compiled for them.

    Raises:
        ValueError: `fsdp` does not divide the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or count % fsdp:
        raise ValueError(f"mesh.fsdp={fsdp} must divide the number of devices, {count}")
    axis_types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((count // fsdp, fsdp), ("data", "fsdp"), axis_types=axis_types, devices=devices)


def platform_of(mesh: Mesh) -> str:
    """`cpu`, `gpu` or `tpu`."""
    return mesh.devices.flat[0].platform


def made_for(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, within which networks are made and traced for the platform of the mesh."""

    @functools.wraps(function)
    def for_platform(*arguments: Any, **options: Any) -> Any:
        with platform.on(platform_of(mesh)):
            return function(*arguments, **options)

    return for_platform


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def steps_sharding(mesh: Mesh) -> NamedSharding:
    """Of many batches, `[steps, batch, ...]`: each split over all devices."""
    return NamedSharding(mesh, P(None, ("data", "fsdp")))


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of `tree`: large arrays are split over `fsdp` along the largest divisible dimension, others replicated.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        A tree of `NamedSharding`s with the same structure.
    """
    fsdp = mesh.shape["fsdp"]

    def sharding(leaf) -> NamedSharding:
        bytes_ = np.prod(leaf.shape, dtype=np.int64) * leaf.dtype.itemsize
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % fsdp == 0]
        if fsdp == 1 or bytes_ < LARGE_BYTES or not divisible:
            return replicated(mesh)
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*(None,) * largest, "fsdp"))

    return jax.tree.map(sharding, tree)


def place(tree: Any, mesh: Mesh) -> Any:
    """Put host arrays (the same on every process) on the mesh, sharded by `parameter_shardings`."""
    return jax.device_put(tree, parameter_shardings(tree, mesh))


def shapes(tree: Any, mesh: Mesh) -> Any:
    """What `place` would give, as `jax.ShapeDtypeStruct`s: enough to compile a program for it."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        parameter_shardings(tree, mesh),
    )


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch, `[batch / processes, ...]` each -> global arrays `[batch, ...]` on the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def steps_to_global(rows: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of many batches, `[steps, batch / processes, ...]` -> global arrays `[steps, batch, ...]`."""
    sharding = steps_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in rows.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put host arrays on every device; they must be the same on every process, which is not checked."""
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(replicated(mesh), array), tree)


def calls_must_be_waited_for(mesh: Mesh) -> bool:
    """Whether each call of a program compiled for the mesh must be finished before the next one.

    On CPUs, programs on several devices that run at the same time can deadlock.
    """
    return platform_of(mesh) == "cpu" and mesh.size > 1


def wait_if_needed(results: Any, mesh: Mesh) -> None:
    """Wait for the results of a call if `calls_must_be_waited_for`; use it after each call of a compiled program."""
    if calls_must_be_waited_for(mesh):
        jax.block_until_ready(results)
