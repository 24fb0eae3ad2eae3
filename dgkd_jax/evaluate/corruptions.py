"""Corrupted images: noised and scrambled patches, and the common corruptions at five severities.

Each is a pure function of uint8 images `[batch, height, width, channels]`, each image's number in its split, and a
seed; the result does not depend on the batch or the device. All run on the device under `jax.jit`, except
`jpeg_compression`, which needs an encoder and runs on the host.

Corruptions: Hendrycks & Dietterich, ICLR 2019, arXiv:1903.12261, sections 3 and 4. Constants: the authors' repository
(github.com/hendrycks/robustness, ImageNet-C/create_c), which has three sets, for images of 32, 64 and 224 pixels. Ours
round to the nearest grey level, theirs truncate; and their ImageNet images were JPEG-compressed again when saved. The
files that they published are `tfds:cifar10_corrupted/…` and `tfds:imagenet2012_corrupted/…`. Left out: glass, motion
and zoom blur, snow, frost, fog, spatter, elastic, speckle noise and saturation.

Patches: the DGKD repository's test sets (Gaussian noise with a standard deviation of 25 grey levels in a square at
(50, 50) of 224, and a permutation of square patches).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEVERITIES = (1, 2, 3, 4, 5)

# Corruption -> side of the images for which the constants were made -> constant per severity.
_CONSTANTS: dict[str, dict[int, tuple[Any, ...]]] = {
    # Standard deviation, in units of pixel/255.
    "gaussian_noise": {
        32: (0.04, 0.06, 0.08, 0.09, 0.10), 64: (0.04, 0.08, 0.12, 0.15, 0.18), 224: (0.08, 0.12, 0.18, 0.26, 0.38),
    },
    # Photons of a white pixel.
    "shot_noise": {32: (500, 250, 100, 75, 50), 64: (250, 100, 50, 30, 15), 224: (60, 25, 12, 5, 3)},
    # Share of the values that become black or white.
    "impulse_noise": {
        32: (0.01, 0.02, 0.03, 0.05, 0.07), 64: (0.01, 0.02, 0.05, 0.08, 0.14), 224: (0.03, 0.06, 0.09, 0.17, 0.27),
    },
    # Radius of the disk, and standard deviation of the blur that smooths its edge, pixels.
    "defocus_blur": {
        32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        224: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    },
    # Standard deviation, pixels.
    "gaussian_blur": {32: (0.4, 0.6, 0.7, 0.8, 1), 64: (0.5, 0.75, 1, 1.25, 1.5), 224: (1, 2, 3, 4, 6)},
    # Factor on the distance from the image's mean.
    "contrast": {
        32: (0.75, 0.5, 0.4, 0.3, 0.15), 64: (0.4, 0.3, 0.2, 0.1, 0.05), 224: (0.4, 0.3, 0.2, 0.1, 0.05),
    },
    # Added to the HSV value, in units of pixel/255.
    "brightness": {32: (0.05, 0.1, 0.15, 0.2, 0.3), 64: (0.1, 0.2, 0.3, 0.4, 0.5), 224: (0.1, 0.2, 0.3, 0.4, 0.5)},
    # Side of the shrunken image as a share of the image's.
    "pixelate": {32: (0.95, 0.9, 0.85, 0.75, 0.65), 64: (0.9, 0.8, 0.7, 0.6, 0.5), 224: (0.6, 0.5, 0.4, 0.3, 0.25)},
    # JPEG quality.
    "jpeg_compression": {32: (80, 65, 58, 50, 40), 64: (65, 58, 50, 40, 25), 224: (25, 18, 15, 10, 7)},
}  # fmt: skip

CORRUPTIONS: tuple[str, ...] = tuple(_CONSTANTS)
ON_HOST = ("jpeg_compression",)

_NOISE_LEVELS = 25.0  # standard deviation of a noised patch, grey levels
_NOISE_CORNER = 50 / 224  # the patch's top left corner, as a share of the side
_EXACT = jax.lax.Precision.HIGHEST  # accelerators would multiply in bfloat16 or TF32


def constant(name: str, severity: int, image_shape: tuple[int, ...]) -> Any:
    """The published constant for images of this size: the set for 32 pixels below 48, for 64 below 128, else for 224.

    Args:
        name: from `CORRUPTIONS`.
        severity: 1 … 5.
        image_shape: (height, width, …).
    """
    side = min(image_shape[:2])
    made_for = 32 if side < 48 else 64 if side < 128 else 224
    return _CONSTANTS[name][made_for][severity - 1]


def corrupt(images: jax.Array, indices: jax.Array, *, name: str, severity: int, seed: int = 0) -> jax.Array:
    """Apply a common corruption.

    All severities of a corruption use the same random draws, so an image's results can be compared in pairs.

    Args:
        images: uint8 `[batch, height, width, channels]`.
        indices: int32 `[batch]`, each image's number in its split.
        name: from `CORRUPTIONS`, except those in `ON_HOST`.
        severity: 1 … 5.
        seed: of the noise.

    Returns:
        uint8, with the shape of `images`.
    """
    amount = constant(name, severity, images.shape[1:])
    match name:
        case "gaussian_noise":
            return _gaussian_noise(images, indices, 255 * amount, seed)
        case "shot_noise":
            return _shot_noise(images, indices, _poisson_table(amount), amount, seed)
        case "impulse_noise":
            return _impulse_noise(images, indices, amount, seed)
        case "defocus_blur":
            return _convolve(images, disk(*amount))
        case "gaussian_blur":
            rows, columns = (_gaussian_matrix(size, sigma=amount) for size in images.shape[1:3])
            return _along_axes(images, rows, columns)
        case "contrast":
            return _contrast(images, amount)
        case "brightness":
            return _brightness(images, 255 * amount)
        case "pixelate":
            return _pixelate(images, share=amount)
    raise ValueError(f"{name!r} is no corruption that runs on the device")


def jpeg_compression(images: np.ndarray, *, severity: int) -> np.ndarray:
    """Compress to JPEG and decode, on the host; pixels equal PIL's with its default chroma subsampling.

    Args:
        images: uint8 `[batch, height, width, channels]`, 1 or 3 channels.
        severity: 1 … 5.
    """
    import tensorflow as tf

    quality = constant("jpeg_compression", severity, images.shape[1:])

    def there_and_back(image):
        encoded = tf.io.encode_jpeg(image, quality=quality)
        return tf.io.decode_jpeg(encoded, channels=images.shape[-1], dct_method="INTEGER_ACCURATE").numpy()

    return np.stack([there_and_back(image) for image in images])


@functools.partial(jax.jit, static_argnames=("side", "wrapped"))
def noise_patch(images: jax.Array, indices: jax.Array, *, side: int, wrapped: bool = False, seed: int = 0) -> jax.Array:
    """Add Gaussian noise (standard deviation 25 grey levels) in a square whose corner is at 50/224 of the image.

    Args:
        images: uint8 `[batch, height, width, channels]`.
        indices: int32 `[batch]`, each image's number in its split.
        side: of the square, pixels; 1 … `largest_noise_patch`.
        wrapped: add it as the DGKD repository does: truncated to an integer and modulo 256, so that a dark pixel with a
            little negative noise turns white. False: rounded and clipped.
        seed: of the noise.
    """
    top, left = _noise_corner(images.shape[1:])
    square = (slice(None), slice(top, top + side), slice(left, left + side))

    def noised(key, patch):
        noise = _NOISE_LEVELS * _normal(key, patch)
        if wrapped:
            return ((patch.astype(jnp.int32) + noise.astype(jnp.int32)) % 256).astype(jnp.uint8)
        return _to_uint8(patch + noise)

    return images.at[square].set(_each(noised, images[square], indices, seed))


def largest_noise_patch(image_shape: tuple[int, ...]) -> int:
    """Side in pixels of the largest square between the corner of `noise_patch` and the image's edges."""
    return min(size - corner for size, corner in zip(image_shape[:2], _noise_corner(image_shape), strict=True))


@functools.partial(jax.jit, static_argnames=("side",))
def scramble_patches(images: jax.Array, indices: jax.Array, *, side: int, seed: int = 0) -> jax.Array:
    """Put the image's patches in random order, a different order for each image.

    Args:
        images: uint8 `[batch, height, width, channels]`.
        indices: int32 `[batch]`, each image's number in its split.
        side: of a patch, pixels; from `patch_sides`.
        seed: of the order.
    """
    height, width, channels = images.shape[1:]
    rows, columns = height // side, width // side

    def scrambled(key, image):
        patches = image.reshape(rows, side, columns, side, channels).swapaxes(1, 2)
        patches = patches.reshape(rows * columns, side, side, channels)
        patches = patches[jax.random.permutation(key, rows * columns)]
        return patches.reshape(rows, columns, side, side, channels).swapaxes(1, 2).reshape(image.shape)

    return _each(scrambled, images, indices, seed)


def patch_sides(image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of square patches that divide an image into at least two, in pixels."""
    common = math.gcd(*image_shape[:2])
    return tuple(side for side in range(1, common + 1) if common % side == 0 and side < max(image_shape[:2]))


def disk(radius: float, smoothing: float) -> np.ndarray:
    """The kernel of a defocused lens: a disk of pixels, smoothed by a 3x3 (for radii above 8: 5x5) Gaussian.

    The authors' kernels of radius 8 and 10 are mirrored at the edge of their array, which brightens the image by about
    1 %; this one never brightens it.

    Args:
        radius: pixels.
        smoothing: standard deviation of the Gaussian, pixels.

    Returns:
        `[side, side]` float32 with sum 1; the side is odd.
    """
    taps = 1 if radius <= 8 else 2
    reach = int(radius) + taps
    places = np.arange(-reach, reach + 1)
    kernel = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float64)
    gaussian = np.exp(-0.5 * (np.arange(-taps, taps + 1) / smoothing) ** 2)
    for axis in (0, 1):
        kernel = np.apply_along_axis(np.convolve, axis, kernel, gaussian, mode="same")
    return (kernel / kernel.sum()).astype(np.float32)


def _each(function: Callable, images: jax.Array, indices: jax.Array, seed: jax.Array) -> jax.Array:
    """`function` of a key and an image, for each image; the key depends only on the seed and the image's number."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(indices)
    return jax.vmap(function)(keys, images)


def _noise_corner(image_shape: tuple[int, ...]) -> tuple[int, int]:
    return round(_NOISE_CORNER * image_shape[0]), round(_NOISE_CORNER * image_shape[1])


def _normal(key: jax.Array, image: jax.Array) -> jax.Array:
    return jax.random.normal(key, image.shape, jnp.float32)


def _to_uint8(images: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)


# Strengths that change no shape are traced arguments, so one program serves all severities.


@jax.jit
def _gaussian_noise(images, indices, sigma, seed):
    return _each(lambda key, image: _to_uint8(image + sigma * _normal(key, image)), images, indices, seed)


@jax.jit
def _shot_noise(images, indices, table, photons, seed):
    """A Poisson count per value, by inversion: the number of entries in its grey level's row below a uniform number."""

    def noised(key, image):
        uniform = jax.random.uniform(key, image.shape, jnp.float32)
        row = image.astype(jnp.int32) * table.shape[1]

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) // 2
            below = table.reshape(-1)[row + middle] < uniform
            return jnp.where(below, middle + 1, low), jnp.where(below, high, middle)

        none = jnp.zeros_like(row)
        count, _ = jax.lax.fori_loop(0, table.shape[1].bit_length(), halve, (none, none + table.shape[1] - 1))
        return _to_uint8(255 * count / photons)

    return _each(noised, images, indices, seed)


def _poisson_table(photons: int) -> np.ndarray:
    """`[256, 512]` float32: for each grey level the distribution function of its count at 0, 1, …; 2 from white on."""
    rates = np.arange(256)[:, None] / 255 * photons
    counts = np.arange(photons)  # higher counts are clipped to white
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, photons)))])
    with np.errstate(divide="ignore", invalid="ignore"):
        log_chances = np.where(counts == 0, 0.0, counts * np.log(rates)) - rates - log_factorials
    table = np.full((256, 512), 2.0, np.float32)  # larger than every uniform number
    table[:, :photons] = np.minimum(np.cumsum(np.exp(log_chances), axis=1), 1.0)
    return table


@jax.jit
def _impulse_noise(images, indices, share, seed):
    def noised(key, image):
        which, colour = jax.random.uniform(key, (2, *image.shape), jnp.float32)
        return jnp.where(which < share, jnp.where(colour < 0.5, np.uint8(255), np.uint8(0)), image)

    return _each(noised, images, indices, seed)


@jax.jit
def _contrast(images, factor):
    mean = jnp.mean(images.astype(jnp.float32), axis=(1, 2), keepdims=True)
    return _to_uint8((images - mean) * factor + mean)


@jax.jit
def _brightness(images, amount):
    """Raise HSV's value (the largest channel) at constant hue and saturation: one factor for all channels."""
    value = jnp.max(images, axis=-1, keepdims=True).astype(jnp.float32)
    raised = jnp.minimum(value + amount, 255.0)
    return _to_uint8(jnp.where(value > 0, images * raised / jnp.maximum(value, 1.0), raised))


@jax.jit
def _convolve(images, kernel):
    """Convolve every channel with the same kernel; the image is mirrored at its edges, without repeating them."""
    batch, height, width, channels = images.shape
    reach = len(kernel) // 2
    planes = jnp.moveaxis(images.astype(jnp.float32), -1, 1).reshape(batch * channels, 1, height, width)
    planes = jnp.pad(planes, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="reflect")
    blurred = jax.lax.conv_general_dilated(planes, kernel[None, None], (1, 1), "VALID", precision=_EXACT)
    return _to_uint8(jnp.moveaxis(blurred.reshape(batch, channels, height, width), 1, -1))


@jax.jit
def _along_axes(images, rows, columns):
    return _to_uint8(jnp.einsum("ih,jw,bhwc->bijc", rows, columns, images.astype(jnp.float32), precision=_EXACT))


def _gaussian_matrix(size: int, *, sigma: float) -> np.ndarray:
    """Matrix of a Gaussian filter for `size` numbers, cut off at four standard deviations; end values are repeated."""
    reach = int(4 * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = np.zeros((size, size))
    for row in range(size):
        np.add.at(matrix[row], np.clip(row + offsets, 0, size - 1), weights / weights.sum())
    return matrix.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("share",))
def _pixelate(images, *, share):
    """Shrink and enlarge by PIL's box filter, which takes whole pixels and rounds to uint8 after each axis."""
    sizes = {axis: images.shape[axis] for axis in (2, 1)}
    for axis, size in sizes.items():
        images = _resize(images, axis, _box_matrix(size, int(size * share)))
    for axis, size in sizes.items():
        images = _resize(images, axis, _box_matrix(images.shape[axis], size))
    return images


def _resize(images: jax.Array, axis: int, matrix: np.ndarray) -> jax.Array:
    resized = jnp.tensordot(images.astype(jnp.float32), jnp.asarray(matrix), ((axis,), (1,)), precision=_EXACT)
    return jnp.moveaxis(jnp.floor(resized + 0.5), -1, axis).astype(jnp.uint8)


def _box_matrix(size: int, new_size: int) -> np.ndarray:
    """`[new_size, size]`: means of the old pixels whose centres lie in a new pixel's window, at least one each."""
    scale = size / new_size
    reach = 0.5 * max(scale, 1.0)
    centres = (np.arange(new_size)[:, None] + 0.5) * scale
    distance = np.arange(size) + 0.5 - centres
    inside = (distance > -reach) & (distance <= reach)
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
