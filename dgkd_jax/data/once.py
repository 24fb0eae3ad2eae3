"""Keeps XLA's CPU backend from computing an intermediate result again for each of its readers."""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def computed_once(value: Tree, *, always: jax.Array) -> Tree:
    """The value, computed before anything reads it.

    XLA fuses what is cheap into each reader, pixel by pixel, on CPUs through `optimization_barrier` too. It does not
    fuse through a conditional; on other devices that would wait for the host, and is left out.

    Args:
        value: arrays.
        always: bool scalar, true, which XLA must not be able to tell.
    """

    def conditional(value: Tree) -> Tree:
        return jax.lax.cond(always, lambda: value, lambda: jax.tree.map(jnp.zeros_like, value))

    return jax.lax.platform_dependent(value, cpu=conditional, default=lambda value: value)
