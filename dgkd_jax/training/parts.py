"""Computes a batch in equal parts, one after the other, so that the memory of one part is enough.

Part j of k holds the rows j, j + k, j + 2k, … Where the batch is split over devices in consecutive rows, each device
has its share of every part already, and the parts are the same on any number of devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dgkd_jax.models import platform

Batch = dict[str, jax.Array]
# (what goes from part to part, a batch) -> that, means over the batch's rows, arrays with one entry for each row
Function = Callable[[Any, Batch], tuple[Any, Any, Any]]


def computed(function: Function, carried: Any, batch: Batch, *, count: int) -> tuple[Any, Any, Any]:
    """What `function` gives for a batch, from what it gives for each of `count` parts.

    With one part this is `function(carried, batch)`. A mean is that of the parts' means, so it is right for what is a
    mean over rows. On CPUs the parts are written out one by one, because XLA's CPU backend computes convolutions
    within a loop 3 to 20 times slower; elsewhere they are a loop, which is compiled once (docs/performance.md).

    Args:
        function: see `Function`.
        carried: for the first part; each part gets what the one before gives.
        batch: arrays `[batch, …]`.
        count: number of parts; divides the batch.

    Returns:
        As `function`: what the last part gives, the means, and the rows in the batch's order.
    """
    if count == 1:
        return function(carried, batch)
    parts = jax.tree.map(lambda rows: rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1), batch)
    carried, sums, rows = (_looped if is_loop(count, platform.current()) else _unrolled)(function, carried, parts)
    rows = jax.tree.map(lambda each: each.swapaxes(0, 1).reshape(-1, *each.shape[2:]), rows)
    return carried, jax.tree.map(lambda total: total / count, sums), rows


def is_loop(count: int, on: str) -> bool:
    """Whether `computed` makes a loop of its parts, in a program for the platform `on`."""
    return count > 1 and on != "cpu"


def _looped(function: Function, carried: Any, parts: Batch) -> tuple[Any, Any, Any]:
    def add(state: tuple[Any, Any], part: Batch) -> tuple[tuple[Any, Any], Any]:
        carried, means, rows = function(state[0], part)
        return (carried, jax.tree.map(jnp.add, state[1], means)), rows

    first = jax.tree.map(lambda leaf: leaf[0], parts)
    _, means, _ = jax.eval_shape(function, carried, first)
    empty = jax.tree.map(lambda mean: jnp.zeros(mean.shape, mean.dtype), means)
    (carried, sums), rows = jax.lax.scan(add, (carried, empty), parts)
    return carried, sums, rows


def _unrolled(function: Function, carried: Any, parts: Batch) -> tuple[Any, Any, Any]:
    sums, rows, done = None, [], None
    for index in range(len(jax.tree.leaves(parts)[0])):
        part = jax.tree.map(lambda leaf: leaf[index], parts)  # noqa: B023
        carried, means, of_part = function(carried, _after(done, part) if index else part)
        sums = jax.tree.map(jnp.add, sums, means) if index else means
        done = carried, sums, of_part
        rows.append(of_part)
    return carried, sums, jax.tree.map(lambda *each: jnp.stack(each), *rows)


def _after(done: Any, part: Batch) -> Batch:
    """The part, of which nothing can be computed before all of `done` is.

    Without it XLA holds the intermediate results of all parts at the same time. An `optimization_barrier` does not
    help: the CPU backend drops it before it puts the operations in order. So the part depends on a condition that is
    never true, which XLA does not know.
    """
    number = sum(jnp.sum(leaf, dtype=float) for leaf in jax.tree.leaves(done))
    never = jnp.isnan(number) & (number == 0)
    return jax.tree.map(lambda rows: jnp.where(never, jnp.zeros_like(rows), rows), part)
