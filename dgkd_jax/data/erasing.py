"""Random erasing: a rectangle of a training image is painted over (Zhong et al., AAAI 2020, arXiv:1708.04896).

Drawing uses integers, and tables that the host computes, for the reason that `mixing` gives.
"""

import jax
import jax.numpy as jnp
import numpy as np

AREA = 0.02, 0.33  # of the image; torchvision's defaults, as the next two
RATIO = 0.3, 3.3  # height / width, uniform in the logarithm
ATTEMPTS = 10
LEVELS = 1024  # equally likely values of the area, and of the ratio


def draw(key: jax.Array, *, batch: int, probability: float, height: int, width: int) -> jax.Array:
    """A box for each image, placed uniformly; of ten draws of its size, the first one that fits.

    Args:
        key: of the batch.
        batch: images in it.
        probability: of erasing, for each image by itself.
        height, width: of the images, pixels.

    Returns:
        int32 `[batch, 4]`: top, left, bottom, right, the last two past the end; all 0 where nothing is erased.
    """
    bits = jax.random.bits(key, (3 + 2 * ATTEMPTS, batch), jnp.uint32)
    chance, row, column = bits[:3]
    area_level, ratio_level = (bits[3:].reshape(2, ATTEMPTS, batch) % LEVELS).astype(jnp.int32)
    middles = (np.arange(LEVELS) + 0.5) / LEVELS
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * middles)
    ratio = np.exp(np.log(RATIO[0]) + (np.log(RATIO[1]) - np.log(RATIO[0])) * middles)
    side, stretch, squeeze = (jnp.asarray(np.sqrt(x), jnp.float32) for x in (area, ratio, 1 / ratio))
    # A single product is the same in every program; a fused multiply-add need not be.
    heights = jnp.round(side[area_level] * stretch[ratio_level]).astype(jnp.int32)
    widths = jnp.round(side[area_level] * squeeze[ratio_level]).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits, axis=0)[None]
    tall, wide = (jnp.take_along_axis(sizes, first, axis=0)[0] for sizes in (heights, widths))
    erased = (chance >> 8 < np.uint32(round(probability * 2**24))) & fits.any(axis=0)
    top, left = (
        (place % jnp.maximum(room + 1, 1).astype(jnp.uint32)).astype(jnp.int32)
        for place, room in ((row, height - tall), (column, width - wide))
    )
    return jnp.where(erased[:, None], jnp.stack([top, left, top + tall, left + wide], axis=1), 0)


def apply(images: jax.Array, boxes: jax.Array, *, fill: tuple[int, ...]) -> jax.Array:
    """The images with their boxes painted over.

    Args:
        images: uint8 `[batch, height, width, channels]`.
        boxes: from `draw`.
        fill: grey level of each channel.

    Returns:
        As `images`.
    """
    top, left, bottom, right = (corner[:, None, None] for corner in boxes.T)
    row, column = jnp.arange(images.shape[1])[:, None], jnp.arange(images.shape[2])
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return jnp.where(inside[..., None], jnp.asarray(fill, jnp.uint8), images)
