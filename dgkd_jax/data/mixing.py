"""mixup and CutMix: a training image is made of two, and its label tells in which shares.

The partner of row i is row i − 1 of the global batch (of row 0 the last), and there is one draw per batch, as in
torchvision's v2 transforms. Batches are shuffled, so the partner is a random image; and a roll of the global batch is
the same on any number of devices.

Drawing uses integers and tables that the host computes, and applying is exact in float32. So an image does not depend
on how a program is compiled: what a teacher saw when its logits were stored is, bit for bit, what its student sees.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from dgkd_jax.data import once

LEVELS = 4096  # equally likely values of λ: the quantiles of its distribution at (k + 1/2)/4096
_UNIT = 2**16  # λ is a multiple of 1/65536, so that λ·pixel has 24 bits and float32 holds it exactly


class Mix(NamedTuple):
    """How the two images of each pair are mixed.

    Attributes:
        shares: float32 `[height, width]`, of the own image at each pixel; the partner has the rest.
        weight: float32 scalar, of the own label: the mean of `shares`.
    """

    shares: jax.Array
    weight: jax.Array


def lambdas(alpha: float) -> np.ndarray:
    """The values of λ ~ Beta(α, α), each equally likely: float32 `[LEVELS]`, multiples of 1/65536.

    Args:
        alpha: α > 0; the smaller, the nearer λ is to 0 or 1.
    """
    quantiles = special.betaincinv(alpha, alpha, (np.arange(LEVELS) + 0.5) / LEVELS)
    return (np.round(quantiles * _UNIT) / _UNIT).astype(np.float32)


def mixup(bits: jax.Array, *, alpha: float, height: int, width: int) -> Mix:
    """λ ~ Beta(α, α) is the share of the own image at every pixel (Zhang et al., ICLR 2018, arXiv:1710.09412).

    Args:
        bits: uint32 `[3]`, random.
        alpha: α > 0.
        height, width: of the images, pixels.
    """
    weight = jnp.asarray(lambdas(alpha))[bits[0] % LEVELS]
    return Mix(jnp.broadcast_to(weight, (height, width)), weight)


def cutmix(bits: jax.Array, *, alpha: float, height: int, width: int) -> Mix:
    """A box is the partner's (Yun et al., ICCV 2019, arXiv:1905.04899).

    λ ~ Beta(α, α); the box has √(1−λ) of the height and of the width, its centre is uniform over the pixels, and what
    sticks out is cut off. The label's weight is the share of the pixels that stay, not λ. Rounding as in torchvision.

    Args:
        (all): as `mixup`.
    """
    half = 0.5 * np.sqrt(1.0 - lambdas(alpha).astype(np.float64))
    half_height, half_width = (
        jnp.asarray((half * side).astype(np.int32))[bits[0] % LEVELS] for side in (height, width)
    )
    row, column = (bits[1] % height).astype(jnp.int32), (bits[2] % width).astype(jnp.int32)
    top, left = jnp.maximum(row - half_height, 0), jnp.maximum(column - half_width, 0)
    bottom, right = jnp.minimum(row + half_height, height), jnp.minimum(column + half_width, width)
    return box(jnp.stack([top, left, bottom, right]), height=height, width=width)


def box(corners: jax.Array, *, height: int, width: int) -> Mix:
    """The mix in which the partner has a box.

    Args:
        corners: int32 `[4]`: top, left, bottom and right; the last two are past the end.
    """
    top, left, bottom, right = corners
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    area = (bottom - top) * (right - left)
    return Mix(1.0 - inside.astype(jnp.float32), (height * width - area) / jnp.float32(height * width))


def draw(key: jax.Array, *, mixup_alpha: float, cutmix_alpha: float, height: int, width: int) -> Mix:
    """One of the two, by a fair coin if both are on, as torchvision's recipe has it.

    Args:
        key: of the batch.
        mixup_alpha, cutmix_alpha: α of each; 0: off. Not both 0.
        height, width: of the images, pixels.
    """
    bits = jax.random.bits(key, (4,), jnp.uint32)
    drawn = [
        one(bits[1:], alpha=alpha, height=height, width=width)
        for one, alpha in ((mixup, mixup_alpha), (cutmix, cutmix_alpha))
        if alpha
    ]
    coin = bits[0] % 2 == 0
    mix = drawn[0] if len(drawn) == 1 else jax.tree.map(lambda a, b: jnp.where(coin, a, b), *drawn)
    return once.computed_once(mix, always=mix.weight <= 1)  # else drawn anew for each pixel


def images(images: jax.Array, mix: Mix) -> jax.Array:
    """The mixed images, rounded to whole grey levels, halves to the even one.

    Networks take uint8 and normalise it themselves, teacher and student perhaps by other statistics; rounding moves a
    pixel by at most half a level.

    Args:
        images: uint8 `[batch, height, width, channels]`.
        mix: from `draw`.

    Returns:
        As `images`.
    """
    shares = mix.shares[:, :, None]
    own, partner = (each.astype(jnp.float32) for each in (images, jnp.roll(images, 1, axis=0)))
    return jnp.round(shares * own + (1.0 - shares) * partner).astype(jnp.uint8)


def labels(labels: jax.Array, mix: Mix, *, num_classes: int) -> jax.Array:
    """The mixed labels.

    Args:
        labels: int `[batch]`.
        mix: from `draw`.
        num_classes: C.

    Returns:
        Float32 `[batch, C]`: the own label's weight and its partner's, which sum to 1.
    """
    own = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return mix.weight * own + (1.0 - mix.weight) * jnp.roll(own, 1, axis=0)
