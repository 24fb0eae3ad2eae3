"""Mean and variance of a batch, for BatchNorm: in two passes over the values, or in one."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

# A shifted variance loses log2(1 + m²/var) of float32's 24 bits, m being the distance of mean and shift: six at this.
_MOST_SHIFTED = 64.0  # m²/var


def in_two_passes(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, biased variance and deviations: the mean first, then the squares of the deviations from it.

    Returns:
        Mean and variance over `axes`, kept with size 1, and x − mean. Whoever needs the deviations should take these:
        computed again, their gradients are summed in another order, and over the devices twice.
    """
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    return mean, jnp.mean(jnp.square(centred), axes, keepdims=True), centred


def in_one_pass(
    x: jax.Array, axes: Sequence[int], *, shift: jax.Array, stored: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance from the sums of x − shift and of its square: one pass over x, one sum over devices.

    The variance is E[(x − shift)²] − E[x − shift]². A channel whose mean is more than eight deviations away from the
    shift would lose digits; if there is one, all are computed in two passes. So every shift is right, and the running
    mean is a quick one from the second step on.

    Args:
        x: float32 or float64.
        axes: of x, as a sequence of numbers from 0 on.
        shift: of the results' shape, or one that broadcasts to it; no gradient flows into it.
        stored: x in the narrower dtype in which it lies in memory, so that it need not be written in x's as well.

    Returns:
        Mean and variance over `axes`, kept with size 1; differentiable in x in either mode, with one pass over x too.
    """
    shift, stored = map(jax.lax.stop_gradient, (shift, x if stored is None else stored))
    return _in_one_pass(tuple(axes), x, shift, stored)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _in_one_pass(
    axes: tuple[int, ...], x: jax.Array, shift: jax.Array, stored: jax.Array
) -> tuple[jax.Array, jax.Array]:
    shifted = x - shift
    first = jnp.mean(shifted, axes, keepdims=True)
    var = jnp.mean(jnp.square(shifted), axes, keepdims=True) - jnp.square(first)
    is_far = jnp.any(jnp.square(first) > _MOST_SHIFTED * var)
    exact = lambda: in_two_passes(stored.astype(x.dtype), axes)[:2]  # noqa: E731
    return jax.lax.cond(is_far, exact, lambda: (shift + first, var))


@_in_one_pass.defjvp
def _derivative(axes, primals, tangents):
    """Not through the two forms: their derivative is the same, and needs their results only."""
    x, of_x = primals[0], tangents[0]
    mean, var = _in_one_pass(axes, *primals)
    of_mean = jnp.mean(of_x, axes, keepdims=True)
    # Σ(x − mean) = 0, so the mean's own change has no part in it.
    return (mean, var), (of_mean, 2 * jnp.mean((x - mean) * of_x, axes, keepdims=True))
