"""The dtype in which gradients of kernels are summed where networks compute in bfloat16.

A kernel's gradient is a sum over all pixels of all images on all devices. In bfloat16 each device rounds its part to
eight binary digits, and so does each addition between devices: the more devices, the worse. In float32, the dtype of
the parameters, twice the bytes are exchanged.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

_wide: contextvars.ContextVar[bool] = contextvars.ContextVar("wide", default=False)


@contextlib.contextmanager
def summed_in_parameters_dtype() -> Iterator[None]:
    """Networks traced meanwhile have kernel gradients that are summed in the dtype of the parameters."""
    token = _wide.set(True)
    try:
        yield
    finally:
        _wide.reset(token)


def product(multiply: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`multiply(x, kernel)` in the dtype of x; where the kernel's is wider, its gradient is summed as is asked for.

    Args:
        multiply: linear in each argument, for two arrays of one dtype.
        x: in the dtype of the computation.
        kernel: a parameter, in its own dtype.
    """
    if jnp.promote_types(x.dtype, kernel.dtype) == x.dtype or not _wide.get():
        return multiply(x, kernel.astype(x.dtype))
    return _with_wide_gradient(multiply)(x, kernel)


def _with_wide_gradient(multiply: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    @jax.custom_vjp
    def narrow(x, kernel):
        return multiply(x, kernel.astype(x.dtype))

    def backward(operands, gradient):
        x, kernel = operands
        _, of_x = jax.vjp(lambda x: multiply(x, kernel.astype(x.dtype)), x)
        # Both factors are exact in the wider dtype, so the compiler may still multiply them as narrow ones.
        _, of_kernel = jax.vjp(lambda kernel: multiply(x.astype(kernel.dtype), kernel), kernel)
        return *of_x(gradient), *of_kernel(gradient.astype(kernel.dtype))

    narrow.defvjp(lambda x, kernel: (narrow(x, kernel), (x, kernel)), backward)
    return narrow
