"""The layers that all families use, as in PyTorch: convolution, norms, linear layers and pooling.

Layout: images and activations are [batch, height, width, channels], convolution kernels [height, width,
in, out], linear kernels [in, out]. Leaves are `kernel`, `scale` and `bias` in the collection "params",
`mean` and `var` in "batch_stats". Modules only declare their leaves; the values come from
`dgkd_jax.models.initialise` or from `dgkd_jax.torch_port`.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import batch_statistics, cpu_convolution, kernel_gradient, platform
from dgkd_jax.models.onednn import batch_norm as quick_batch_norm
from dgkd_jax.models.onednn import convolution as onednn


def at_least_float32(dtype: Any) -> jnp.dtype:
    """float32 for a narrower `dtype`, else `dtype`. Statistics, features and logits use it."""
    return jnp.promote_types(dtype, jnp.float32)


def undefined(_, shape: tuple[int, ...]) -> jax.Array:
    """The initialiser of every leaf: NaN, so that a leaf that was never filled is noticed."""
    return jnp.full(shape, jnp.nan, jnp.float32)


class Conv(nn.Module):
    """2-D convolution with PyTorch's padding: `padding` zeros on both sides of both axes.

    Attributes:
        features: output channels.
        kernel_size: side of the square kernel, in pixels.
        stride: step along both axes, in pixels.
        padding: zeros added on each of the four sides, in pixels; or ((top, bottom), (left, right)). "SAME" is
            not allowed: at stride 2 it pads one side only, which shifts the grid by a pixel against PyTorch.
        groups: the channels are convolved in this many separate groups.
        use_bias: adds one learned number per output channel.
        dtype: of the computation and the output; images and kernel are converted to it.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 0
    groups: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        side = self.kernel_size
        kernel = self.param("kernel", undefined, (side, side, x.shape[-1] // self.groups, self.features))
        padding = ((self.padding,) * 2,) * 2 if isinstance(self.padding, int) else self.padding
        convolve = partial(_convolve, stride=self.stride, padding=padding, groups=self.groups)
        y = kernel_gradient.product(convolve, x.astype(self.dtype), kernel)
        if self.use_bias:
            y = y + self.param("bias", undefined, (self.features,)).astype(self.dtype)
        return y


def _on_this_platform(*arguments: jax.Array, cpu: Callable, default: Callable) -> jax.Array:
    """As `jax.lax.platform_dependent`, but only the form for the platform of the mesh is in the program."""
    return (cpu if platform.current() == "cpu" else default)(*arguments)


_choose_form = contextvars.ContextVar("choose_form", default=_on_this_platform)


@contextlib.contextmanager
def forms_chosen_by(choose: Callable) -> Iterator[None]:
    """Networks traced meanwhile are for other machines: `choose` says which form of a convolution a program has.

    Args:
        choose: called as `choose(x, kernel, cpu=form, default=form)`, where a form is a function of x and kernel.
    """
    token = _choose_form.set(choose)
    try:
        yield
    finally:
        _choose_form.reset(token)


def _convolve(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: cpu_convolution.Padding, groups: int
) -> jax.Array:
    """Choose the convolution that is fast on the platform; only this function does so."""
    by_library = partial(cpu_convolution.by_library, stride=stride, padding=padding, groups=groups)
    if onednn.takes(x, kernel, padding=padding, groups=groups):
        cpu = partial(onednn.convolution, stride=stride, padding=padding)
    elif kernel.shape[:2] == (1, 1) and padding == ((0, 0), (0, 0)):
        cpu = partial(cpu_convolution.pointwise, stride=stride, groups=groups)
    elif groups == x.shape[-1] == kernel.shape[-1]:
        cpu = lambda x, kernel: cpu_convolution.depthwise(x, kernel, stride, padding)  # noqa: E731
    else:
        return by_library(x, kernel)
    return _choose_form.get()(x, kernel, cpu=cpu, default=by_library)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with the running statistics of `torch.nn.BatchNorm2d`.

    In training it normalises with the batch's mean and biased variance; the running statistics move by
    `1 - momentum` towards the mean and the *unbiased* variance. PyTorch defines momentum the other way round: its
    0.1 is 0.9 here. In evaluation it normalises with the running statistics and changes nothing.

    Attributes:
        groups: the batch is cut into this many equal, consecutive groups, each normalised by its own statistics,
            as on that many GPUs without synchronised BatchNorm. The running statistics follow the mean of the
            groups' statistics. 1: the whole (global) batch.
        momentum: share of the running statistics that a step keeps, 0 … 1.
        epsilon: added to the variance.
        dtype: of the output. Statistics and normalisation are computed in at least float32.

    Raises:
        ValueError: (in training) `groups` does not divide the batch, or a group has only one value per channel.

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
        scale = self.param("scale", undefined, (channels,)).astype(wide)
        bias = self.param("bias", undefined, (channels,)).astype(wide)
        running_mean = self.variable("batch_stats", "mean", undefined, None, (channels,))
        running_var = self.variable("batch_stats", "var", undefined, None, (channels,))
        stored, x = x, x.astype(wide)
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
        mean, var, y = self._normalised(stored.reshape(grouped.shape), scale, bias, axes, running_mean.value)
        if not self.is_initializing():
            self._follow(running_mean, mean.reshape(self.groups, channels))
            self._follow(running_var, var.reshape(self.groups, channels) * (count / (count - 1)))
        return y.reshape(x.shape).astype(self.dtype)

    def _normalised(
        self, stored: jax.Array, scale: jax.Array, bias: jax.Array, axes: tuple[int, ...], running_mean: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean, variance and output; on a CPU in two passes, which keeps the numbers that runs there have had."""
        x, on_cpu = stored.astype(scale.dtype), platform.current() == "cpu"
        if on_cpu and self.groups == 1 and stored.dtype == self.dtype and quick_batch_norm.takes(stored, scale):
            y, mean, var = quick_batch_norm.normalise(stored, scale, bias, epsilon=self.epsilon)
            return mean, var, y
        if on_cpu:
            mean, var, centred = batch_statistics.in_two_passes(x, axes)
        else:
            shift = running_mean.astype(x.dtype)
            mean, var = batch_statistics.in_one_pass(x, axes, shift=shift, stored=stored)
            centred = x - mean
        return mean, var, centred * (scale * jax.lax.rsqrt(var + self.epsilon)) + bias

    def _group_size(self, x: jax.Array) -> int:
        if self.groups < 1 or x.shape[0] % self.groups:
            raise ValueError(f"BatchNorm: groups={self.groups} must be at least 1 and divide the batch of {x.shape[0]}")
        return x.shape[0] // self.groups

    def _follow(self, running: nn.Variable, of_groups: jax.Array) -> None:
        old = running.value
        new = self.momentum * old + (1 - self.momentum) * jnp.mean(of_groups, 0)
        running.value = new.astype(old.dtype)


class Linear(nn.Module):
    """`x @ kernel + bias` for x [..., in], in `dtype`; float32 is never computed in TF32.

    Attributes:
        features: size of the output's last axis.
        use_bias: add a learned bias.
        dtype: of the computation and the output.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", undefined, (x.shape[-1], self.features))
        bias = self.param("bias", undefined, (self.features,)) if self.use_bias else None
        return linear(x.astype(self.dtype), kernel, bias)


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x [..., in] @ kernel [in, out] + bias [out], in the dtype of x."""
    multiply = partial(jnp.matmul, precision=full_precision(x.dtype))
    y = kernel_gradient.product(multiply, x, kernel)
    return y if bias is None else y + bias.astype(x.dtype)


def full_precision(dtype: Any) -> jax.lax.Precision:
    """Of products that keep all digits of `dtype`. For narrower factors one pass is enough, in float32 as well."""
    return jax.lax.Precision.HIGHEST if at_least_float32(dtype) == dtype else jax.lax.Precision.DEFAULT


class LayerNorm(nn.Module):
    """Normalises the last axis by its own mean and biased variance, then scales and shifts each channel.

    Attributes:
        epsilon: added to the variance; differs between families.
        dtype: of the output. Statistics and normalisation are computed in at least float32.

    Source: Ba et al., arXiv:1607.06450, equations 3 and 4.
    """

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = at_least_float32(self.dtype)
        scale = self.param("scale", undefined, (x.shape[-1],)).astype(wide)
        bias = self.param("bias", undefined, (x.shape[-1],)).astype(wide)
        x = x.astype(wide)
        centred = x - jnp.mean(x, -1, keepdims=True)
        var = jnp.mean(jnp.square(centred), -1, keepdims=True)
        return (centred * jax.lax.rsqrt(var + self.epsilon) * scale + bias).astype(self.dtype)


class MLP(nn.Module):
    """Two linear layers with the exact (erf) GELU between them; the hidden layer is four times as wide.

    Attributes:
        dtype: of the computation and the output.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = nn.gelu(Linear(4 * channels, dtype=self.dtype, name="fc1")(x), approximate=False)
        return Linear(channels, dtype=self.dtype, name="fc2")(x)


def global_average_pool(x: jax.Array) -> jax.Array:
    """Mean over the pixels: [batch, height, width, channels] -> [batch, channels], in at least float32."""
    return jnp.mean(x.astype(at_least_float32(x.dtype)), (1, 2))


def max_pool(x: jax.Array, *, window: int, stride: int, padding: int) -> jax.Array:
    """Maximum over windows of `window`² pixels; the image is padded with `padding` pixels of −inf, as in PyTorch."""
    return nn.max_pool(x, (window, window), (stride, stride), ((padding, padding),) * 2)
