"""The bricks of the convolutional families: convolution, BatchNorm, linear layer and pooling as in PyTorch.

Layout: images and activations are [batch, height, width, channels], convolution kernels [height, width,
in, out], linear kernels [in, out]. Leaves are `kernel`, `scale` and `bias` in the collection "params",
`mean` and `var` in "batch_stats". The modules only declare their leaves: the values come from
`dgkd_jax.models.initialise` or from `dgkd_jax.torch_port`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def at_least_float32(dtype: Any) -> jnp.dtype:
    """`dtype` widened to float32 if it is narrower; float64 stays. Statistics, features and logits use it."""
    return jnp.promote_types(dtype, jnp.float32)


def _undefined(_, shape: tuple[int, ...]) -> jax.Array:
    # NaN, so that a leaf which nobody filled shows in the first output instead of training as a zero.
    return jnp.full(shape, jnp.nan, jnp.float32)


class Conv(nn.Module):
    """2-D convolution with PyTorch's padding: `padding` zeros on both sides of both axes.

    Attributes:
        features: output channels.
        kernel_size: side of the square kernel, in pixels.
        stride: step along both axes, in pixels.
        padding: zeros added on each of the four sides, in pixels. "SAME" is not offered: at stride 2 it pads
            one side only and shifts the grid by a pixel against PyTorch.
        groups: the channels are convolved in this many separate groups.
        use_bias: adds one learned number per output channel.
        dtype: images and kernel are converted to it, and the output has it.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side = self.kernel_size
        kernel = self.param("kernel", _undefined, (side, side, x.shape[-1] // self.groups, self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if side == 1 and self.groups == 1 and self.padding == 0:
            # On CPUs, XLA's kernel gradient of a 1x1 convolution takes at least twice that of a product.
            y = x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        else:
            y = jax.lax.conv_general_dilated(
                x,
                kernel,
                window_strides=(self.stride, self.stride),
                padding=((self.padding, self.padding),) * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=self.groups,
            )
        if self.use_bias:
            y = y + self.param("bias", _undefined, (self.features,)).astype(self.dtype)
        return y


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with the running statistics of `torch.nn.BatchNorm2d`.

    In training, the batch's mean and biased variance normalise; the running statistics move by
    `1 - momentum` towards the mean and the *unbiased* variance (PyTorch's momentum is ours from the other
    end: its 0.1 is 0.9 here). In evaluation the running statistics normalise and nothing is written.

    Attributes:
        groups: the batch is cut into this many consecutive equal groups, each normalised by its own
            statistics, as if each were the batch of one of `groups` GPUs without synchronised BatchNorm. The
            running statistics follow the mean of the groups' statistics. 1: the whole (global) batch.
        momentum: share of the running statistics that a step keeps, 0 … 1.
        epsilon: added to the variance.
        dtype: of the output. Statistics and normalisation are computed in at least float32.

    Raises:
        ValueError: (in training) `groups` does not divide the batch, or a group has one value per channel.

    Source: Ioffe and Szegedy, arXiv:1502.03167, algorithms 1 and 2; groups: Hoffer et al., arXiv:1705.08741.
    """

    groups: int = 1
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        channels = x.shape[-1]
        wide = at_least_float32(self.dtype)
        scale = self.param("scale", _undefined, (channels,)).astype(wide)
        bias = self.param("bias", _undefined, (channels,)).astype(wide)
        running_mean = self.variable("batch_stats", "mean", _undefined, None, (channels,))
        running_var = self.variable("batch_stats", "var", _undefined, None, (channels,))
        x = x.astype(wide)
        if not train:
            multiplier = scale * jax.lax.rsqrt(running_var.value.astype(wide) + self.epsilon)
            return ((x - running_mean.value.astype(wide)) * multiplier + bias).astype(self.dtype)

        grouped = x.reshape(self.groups, self._group_size(x), *x.shape[1:])
        axes = tuple(range(1, grouped.ndim - 1))
        count = grouped[0].size // channels
        if count < 2:
            raise ValueError(
                f"BatchNorm in training needs at least 2 values per channel and group, got {count} "
                f"(input {x.shape}, groups={self.groups}); use a larger batch or image"
            )
        # Two passes over the data: mean(x²) − mean(x)² loses all digits where the mean is far from 0.
        mean = jnp.mean(grouped, axes, keepdims=True)
        centred = grouped - mean
        var = jnp.mean(jnp.square(centred), axes, keepdims=True)
        if not self.is_initializing():
            self._follow(running_mean, mean.reshape(self.groups, channels))
            self._follow(running_var, var.reshape(self.groups, channels) * (count / (count - 1)))
        y = centred * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias
        return y.reshape(x.shape).astype(self.dtype)

    def _group_size(self, x: jax.Array) -> int:
        if self.groups < 1 or x.shape[0] % self.groups:
            raise ValueError(f"BatchNorm: groups={self.groups} must be at least 1 and divide the batch of {x.shape[0]}")
        return x.shape[0] // self.groups

    def _follow(self, running: nn.Variable, of_groups: jax.Array) -> None:
        old = running.value
        new = self.momentum * old + (1 - self.momentum) * jnp.mean(of_groups, 0)
        running.value = new.astype(old.dtype)


class Linear(nn.Module):
    """`x @ kernel + bias` for x [..., in], in `dtype`; float32 stays float32 where TF32 is quicker.

    Attributes:
        features: size of the output's last axis.
        dtype: of the computation and the output.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", _undefined, (x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", _undefined, (self.features,)).astype(self.dtype)
        return jnp.matmul(x.astype(self.dtype), kernel, precision=jax.lax.Precision.HIGHEST) + bias


def global_average_pool(x: jax.Array) -> jax.Array:
    """Mean over the pixels: [batch, height, width, channels] -> [batch, channels], in at least float32."""
    return jnp.mean(x.astype(at_least_float32(x.dtype)), (1, 2))


def max_pool(x: jax.Array, *, window: int, stride: int, padding: int) -> jax.Array:
    """Largest value in each `window`² pixels, the image framed by `padding` pixels of −inf, as in PyTorch."""
    return nn.max_pool(x, (window, window), (stride, stride), ((padding, padding),) * 2)
