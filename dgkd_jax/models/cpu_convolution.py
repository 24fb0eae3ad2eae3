"""Convolutions in forms that are fast on a CPU: matrix products, and shifted multiply-adds.

XLA's CPU backend computes forward convolutions with Eigen, but kernel gradients and grouped convolutions with plain
loops. The forms here compute the same; `layers.Conv` chooses one. `benchmarks/convolution.py` measures both.

Shapes: x [batch, height, width, channels], kernels [height, width, in / groups, out].
"""

from functools import partial

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]


def by_library(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding, groups: int) -> jax.Array:
    """XLA's own convolution; handles every case.

    Args:
        x: [batch, height, width, in].
        kernel: [height, width, in / groups, out], of the dtype of `x`.
        stride: step along both axes, in pixels.
        padding: zeros, in pixels: ((top, bottom), (left, right)).
        groups: divides `in` and `out`.

    Returns:
        [batch, out height, out width, out] in the dtype of `x`.
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def pointwise(x: jax.Array, kernel: jax.Array, *, stride: int, groups: int) -> jax.Array:
    """A 1x1 convolution without padding, as one matrix product per group; otherwise as `by_library`."""
    x = x[:, ::stride, ::stride]
    *pixels, channels = x.shape
    # Pixels are merged to one axis: summing the kernel's gradient over three axes would take 1.6 times as long.
    if groups == 1:
        return (x.reshape(-1, channels) @ kernel[0, 0]).reshape(*pixels, -1)
    grouped = x.reshape(-1, groups, channels // groups)
    kernels = kernel.reshape(channels // groups, groups, -1)
    return jnp.einsum("pgi,igo->pgo", grouped, kernels).reshape(*pixels, -1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """A depthwise convolution, as a sum over the kernel's positions of the shifted image times one number per channel.

    Sums are at least float32. The kernel's gradient is summed row by row, because XLA's reduction of whole images to
    one number per channel is ten times slower. Reverse-mode derivatives only.

    Args:
        x: [batch, height, width, channels].
        kernel: [height, width, 1, channels], of the dtype of `x`.
        stride: step along both axes, in pixels.
        padding: zeros, in pixels: ((top, bottom), (left, right)).

    Returns:
        [batch, out height, out width, channels] in the dtype of `x`.
    """
    return _shifted(x, kernel, stride, padding)


def _shifted(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    framed = _framed(x, padding)
    height, width = _out_size(framed, kernel, stride)
    y = 0
    for row, column in _positions(kernel):
        shifted = _every(_every(framed, row, height, stride, axis=1), column, width, stride, axis=2)
        y = y + shifted.astype(wide) * kernel[row, column, 0].astype(wide)
    return y.astype(x.dtype)


def _depthwise_forward(x, kernel, stride, padding):
    return _shifted(x, kernel, stride, padding), (x, kernel)


def _depthwise_backward(stride, padding, residuals, gradient):
    x, kernel = residuals
    if stride == 1:
        sides = zip(kernel.shape[:2], padding, strict=True)
        mirrored = tuple((side - 1 - before, side - 1 - after) for side, (before, after) in sides)
        of_x = _shifted(gradient, kernel[::-1, ::-1], 1, mirrored)
    else:
        of_x = jax.vjp(lambda x: _shifted(x, kernel, stride, padding), x)[1](gradient)[0]
    return of_x, _depthwise_kernel_gradient(x, kernel, gradient, stride=stride, padding=padding)


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _depthwise_kernel_gradient(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, *, stride: int, padding: Padding
) -> jax.Array:
    """The kernel's gradient, for a gradient [batch, out height, out width, channels] of the output.

    The loop runs over rows and not over images, because the batch may be sharded.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    framed = _framed(x, padding)
    height, width = _out_size(framed, kernel, stride)

    def add_row(sums, row):
        seen = jax.lax.dynamic_slice_in_dim(framed, row * stride, kernel.shape[0], axis=1).astype(wide)
        pulled = jax.lax.dynamic_index_in_dim(gradient, row, axis=1, keepdims=False).astype(wide)
        products = (_every(seen[:, i], j, width, stride, axis=1) * pulled for i, j in _positions(kernel))
        return [total + product for total, product in zip(sums, products, strict=True)], None

    empty = jnp.zeros((x.shape[0], width, x.shape[-1]), wide)
    sums, _ = jax.lax.scan(add_row, [empty for _ in _positions(kernel)], jnp.arange(height))
    of_images = jnp.stack([jnp.sum(total, 1) for total in sums])
    return jnp.sum(of_images, 1).reshape(kernel.shape).astype(kernel.dtype)


def _framed(x: jax.Array, padding: Padding) -> jax.Array:
    """The images padded with zeros; a negative padding crops."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*pair, 0) for pair in padding), (0, 0, 0)))


def _positions(kernel: jax.Array) -> list[tuple[int, int]]:
    return [(row, column) for row in range(kernel.shape[0]) for column in range(kernel.shape[1])]


def _out_size(framed: jax.Array, kernel: jax.Array, stride: int) -> tuple[int, int]:
    return tuple((framed.shape[axis] - kernel.shape[axis - 1]) // stride + 1 for axis in (1, 2))


def _every(x: jax.Array, start: int, count: int, stride: int, *, axis: int) -> jax.Array:
    """`count` slices along an axis, beginning at `start`, `stride` apart."""
    return jax.lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis)
