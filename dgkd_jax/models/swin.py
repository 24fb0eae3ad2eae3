"""Swin-S, torchvision's.

Source: Liu et al., arXiv:2103.14030. LayerNorm's epsilon is 1e-5, GELU is exact. Torchvision's stochastic depth (0.3)
is left out, so `train=True` and `train=False` compute the same.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dgkd_jax.models import initial_values, layers
from dgkd_jax.models.attention import SelfAttention

_EPSILON = 1e-5
_WINDOW = 7  # side of a window, in tokens
_MASKED = -100.0  # torchvision's score between tokens that only the shift's wrap-around made neighbours


def relative_position_index() -> np.ndarray:
    """Row of the bias table for each pair of tokens in a window.

    Returns:
        int64 [window² * window²]: for tokens (r, c) and (r', c'), counted row by row, it is
        (r − r' + 6)·13 + (c − c' + 6) for windows of 7x7, as torchvision stores it in its checkpoints.

    Source: section 3.2, "Relative position bias".
    """
    rows, columns = np.divmod(np.arange(_WINDOW**2), _WINDOW)
    down = rows[:, None] - rows + _WINDOW - 1
    right = columns[:, None] - columns + _WINDOW - 1
    return (down * (2 * _WINDOW - 1) + right).reshape(-1)


class Block(nn.Module):
    """Attention within windows of 7x7 tokens, then MLP; each has a norm in front and is added to its input.

    Tokens are [batch, height, width, channels]. If windows do not fill the map, zeros are added at the bottom and right
    after the norm; as in torchvision, these take part in the attention.

    Attributes:
        heads: of the attention; must divide the channels.
        shifted: the windows are moved by 3 tokens down and right and wrap around; tokens that are not neighbours in
            the image are masked. An axis that fits in one window is not shifted.
        dtype: as that of `Swin`.
    """

    heads: int
    shifted: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(layers.LayerNorm, _EPSILON, dtype=self.dtype)
        x = x + self._window_attention(norm(name="norm1")(x))
        return x + layers.MLP(dtype=self.dtype, name="mlp")(norm(name="norm2")(x))

    def _window_attention(self, x: jax.Array) -> jax.Array:
        height, width = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), (0, -height % _WINDOW), (0, -width % _WINDOW), (0, 0)))
        padded = x.shape[1:3]
        shift = tuple(_WINDOW // 2 if self.shifted and side > _WINDOW else 0 for side in padded)
        bias = self._relative_position_bias()
        if any(shift):
            x = jnp.roll(x, (-shift[0], -shift[1]), (1, 2))
            bias = bias + _shift_mask(padded, shift)[:, None]
        y = SelfAttention(self.heads, dtype=self.dtype, name="attn")(_windows(x), bias)
        y = jnp.roll(_map(y, *padded), shift, (1, 2))
        return y[:, :height, :width]

    def _relative_position_bias(self) -> jax.Array:
        """Scores to add, [heads, tokens, tokens]."""
        shape = ((2 * _WINDOW - 1) ** 2, self.heads)
        table = self.param("relative_position_bias_table", layers.undefined, shape)
        bias = table[relative_position_index()]
        return bias.reshape(_WINDOW**2, _WINDOW**2, self.heads).transpose(2, 0, 1)


def _windows(x: jax.Array) -> jax.Array:
    """[batch, height, width, channels] -> [batch, windows, tokens of a window, channels]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // _WINDOW, _WINDOW, width // _WINDOW, _WINDOW, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, _WINDOW**2, channels)


def _map(x: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of `_windows`."""
    batch, channels = x.shape[0], x.shape[-1]
    x = x.reshape(batch, height // _WINDOW, width // _WINDOW, _WINDOW, _WINDOW, channels)
    return x.swapaxes(2, 3).reshape(batch, height, width, channels)


def _shift_mask(size: tuple[int, int], shift: tuple[int, int]) -> np.ndarray:
    """Scores [windows, tokens, tokens] of a shifted map: 0 between neighbours in the image, else `_MASKED`."""
    # The shift makes three regions along an axis: whole windows, the last window's own tokens, the wrapped ones.
    row, column = (
        np.digitize(np.arange(side), (side - _WINDOW, side - by)) if by else np.zeros(side, int)
        for side, by in zip(size, shift, strict=True)
    )
    region = _windows((3 * row[:, None] + column)[None, :, :, None])[0, :, :, 0]
    return np.where(region[:, :, None] == region[:, None, :], 0.0, _MASKED).astype(np.float32)


class PatchMerging(nn.Module):
    """Joins each 2x2 tokens into one with twice the channels; an odd map is padded with a row or column of zeros.

    Attributes: as those of `Swin`.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = layers.LayerNorm(_EPSILON, dtype=self.dtype, name="norm")(jnp.concatenate(corners, -1))
        return layers.Linear(2 * channels, use_bias=False, dtype=self.dtype, name="reduction")(x)


class Swin(nn.Module):
    """Transformer with shifted windows over images [batch, height, width, channels].

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits, features) with
    the activations pooled after the last norm. Both are in at least float32. Images need at least 4x4 pixels: maps are
    padded to whole windows, and, as in torchvision, rows and columns that do not fill a patch of 4 are dropped.

    Attributes:
        num_classes: size of the head.
        stage_sizes: blocks per stage, every second one shifted. The stem divides height and width by 4, each stage
            but the first by 2.
        heads: of each stage's attention.
        width: channels of the first stage; each further stage has twice as many as the one before.
        image_shape: the (height, width, channels) that the network is meant for.
        dtype: of the computation up to the last norm; parameters have their own dtype.
        batch_norm_groups: for the same interface as other families; no effect without BatchNorm.
    """

    num_classes: int
    stage_sizes: tuple[int, ...]
    heads: tuple[int, ...]
    width: int = 96
    image_shape: tuple[int, int, int] = (224, 224, 3)
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.TORCHVISION_SWIN

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        x = layers.Conv(self.width, 4, 4, use_bias=True, dtype=self.dtype, name="features_0_0")(images)
        x = layers.LayerNorm(_EPSILON, dtype=self.dtype, name="features_0_2")(x)
        for stage, (size, heads) in enumerate(zip(self.stage_sizes, self.heads, strict=True)):
            # torchvision counts the mergings and the stages in one list, `features`.
            if stage > 0:
                x = PatchMerging(dtype=self.dtype, name=f"features_{2 * stage}")(x)
            for index in range(size):
                name = f"features_{2 * stage + 1}_{index}"
                x = Block(heads, shifted=index % 2 == 1, dtype=self.dtype, name=name)(x)
        x = layers.LayerNorm(_EPSILON, dtype=layers.at_least_float32(self.dtype), name="norm")(x)
        pooled = layers.global_average_pool(x)
        logits = layers.Linear(self.num_classes, dtype=pooled.dtype, name="head")(pooled)
        return (logits, pooled) if features else logits


MODELS = {"swin_s": partial(Swin, stage_sizes=(2, 2, 18, 2), heads=(3, 6, 12, 24))}
