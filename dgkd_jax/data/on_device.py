"""Batches from a training set in the device's memory: the augmentation of `augment.py`, on the device.

The host sends what each row of a batch is (`Source.epoch_rows`); the device makes the images from that, bit for bit
those of `Source.train_batches`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding


def windows(uniforms: np.ndarray, *, size: int, mirror: bool) -> np.ndarray:
    """The windows that `augment.pad_crop` cuts out for the same random numbers.

    Args:
        uniforms: `[..., 3 or more]` float32 in [0, 1).
        size: side of the images, pixels.
        mirror: as for `augment.pad_crop`.

    Returns:
        `[..., 3]` int32: top and left of the window in the padded image, and 1 where it is mirrored.
    """
    corner = (uniforms[..., :2] * np.float32(2 * (size // 8) + 1)).astype(np.int32)
    mirrored = mirror & (uniforms[..., 2:3] < 0.5)
    return np.concatenate([corner, mirrored.astype(np.int32)], axis=-1)


def as_rows(examples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The examples with each image as one row, uint8 `[examples, size·size·channels]`.

    A TPU would change the layout of a whole array of small images in every step, before it takes a batch out of it.
    """
    images = examples["image"]
    return examples | {"image": images.reshape(len(images), -1)}


def batch(
    examples: dict[str, jax.Array],
    rows: dict[str, jax.Array],
    *,
    image_shape: tuple[int, int, int] | None = None,
    sharding: NamedSharding | None = None,
    by_products: bool = False,
) -> dict[str, jax.Array]:
    """Make the batch that `rows` describes.

    Args:
        examples: {"image": uint8 `[examples, size, size, channels]`, "label": int32 `[examples]`}.
        rows: {"index": int32 `[batch]`, places in `examples`; optionally "window": int32 `[batch, 3]`, from `windows`}.
            Any other array `[batch, ...]` is added to the batch unchanged.
        image_shape: (size, size, channels) where the images lie `as_rows`.
        sharding: of the batch; None: left to JAX.
        by_products: cut windows out by matrix products: the same pixels, quicker on a TPU, slower elsewhere.
    """
    rows = dict(rows)
    index, window = rows.pop("index"), rows.pop("window", None)
    found = {name: array.at[index].get(mode="promise_in_bounds") for name, array in examples.items()}
    if image_shape is not None:
        found["image"] = found["image"].reshape(-1, *image_shape)
    if window is not None:
        found["image"] = jax.vmap(_pad_crop_by_products if by_products else _pad_crop)(found["image"], window)
    found |= rows
    return found if sharding is None else jax.lax.with_sharding_constraint(found, sharding)


def _pad_crop(image: jax.Array, window: jax.Array) -> jax.Array:
    pad = image.shape[0] // 8
    padded = jnp.pad(image, [(pad, pad), (pad, pad), (0, 0)])
    image = jax.lax.dynamic_slice(padded, (window[0], window[1], 0), image.shape)
    return jnp.where(window[2] == 1, image[:, ::-1], image)


def _pad_crop_by_products(image: jax.Array, window: jax.Array) -> jax.Array:
    """A window is rows @ image @ columns with a single 1, or none in the padding, in each row of the two matrices.

    bfloat16 holds every whole number up to 256, so the pixels stay what they are.
    """
    height, width, _ = image.shape
    pad = height // 8
    to_row, to_column = jnp.arange(height), jnp.arange(width)
    to_column = jnp.where(window[2] == 1, width - 1 - to_column, to_column)
    rows = (to_row[:, None] + window[0] - pad == jnp.arange(height)).astype(jnp.bfloat16)
    columns = (to_column[:, None] + window[1] - pad == jnp.arange(width)).astype(jnp.bfloat16)
    moved = jnp.einsum("ik,klc->ilc", rows, image.astype(jnp.bfloat16))
    return jnp.einsum("jl,ilc->ijc", columns, moved).astype(image.dtype)
