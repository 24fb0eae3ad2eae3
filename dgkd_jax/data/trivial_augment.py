"""TrivialAugment, wide: one random operation of random strength on each image (Müller & Hutter, ICCV 2021,
arXiv:2103.10158), as torchvision's `TrivialAugmentWide` does it with its defaults.

All images go through the same few passes: one move of pixels, then a choice of the operations on values. A branch per
image would not run in parallel on an accelerator. Values and places are computed in integers, or by single float32
operations, for the reason that `mixing` gives. So pixels are torchvision's except:

- colour, contrast and sharpness are the exact blend, rounded down; torchvision's float32 may fall just below a whole
  number, which is one grey level;
- where a moved pixel's source lies halfway between two pixels (on the diagonals at 45° and 135°, in two shears),
  torchvision takes the one that its float32 happens to be nearer to.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = ("color", "contrast", "sharpness")
OPERATIONS = (
    "identity",
    *MOVES,
    "brightness",
    *BLENDS,
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
LEVELS = 31  # strengths of each operation, from none to the largest
_PERMIL = 33  # a blend of level k has weight ±0.033·k


class Choice(NamedTuple):
    """What is done to each image: `[batch]` each.

    Attributes:
        operation: int32, a place in `OPERATIONS`.
        level: int32, 0 … `LEVELS` − 1.
        negative: bool, of the operations that have two directions.
    """

    operation: jax.Array
    level: jax.Array
    negative: jax.Array


def draw(key: jax.Array, *, batch: int) -> Choice:
    """Operation, level and direction of each image, all uniform."""
    operation, level, negative = jax.random.bits(key, (3, batch), jnp.uint32)
    return Choice(
        operation=(operation % len(OPERATIONS)).astype(jnp.int32),
        level=(level % LEVELS).astype(jnp.int32),
        negative=negative % 2 == 1,
    )


def apply(images: jax.Array, choice: Choice) -> jax.Array:
    """The images after their operations.

    Args:
        images: uint8 `[batch, height, width, channels]`, channels 1 or 3.
        choice: from `draw`.

    Returns:
        As `images`.
    """
    values = images.astype(jnp.int32)
    results = {
        "brightness": _brightness(images, choice),
        **dict.fromkeys(BLENDS, _blend(values, choice)),
        "posterize": _posterize(images, choice),
        "solarize": _solarize(images, choice),
        "autocontrast": _autocontrast(images),
        "equalize": _equalize(images),
    }
    for name, result in results.items():
        images = jnp.where(_is(name, choice), result, images)
    # Last, because XLA would compute a move again wherever its result is read, nine times in a blur.
    return _moved(images, choice)


def _is(name: str, choice: Choice) -> jax.Array:
    return (choice.operation == OPERATIONS.index(name))[:, None, None, None]


def _strengths(first: float, last: float) -> np.ndarray:
    """`torch.linspace(first, last, LEVELS)` up to its last bit: in float32, and counted from the nearer end.

    Its half of 32 pixels is 15.999999, which torchvision rounds down to a move of 15.
    """
    steps, step = np.arange(LEVELS), np.float64(np.float32((last - first) / (LEVELS - 1)))
    values = np.where(steps < LEVELS // 2, first + step * steps, last - step * steps[::-1])
    return values.astype(np.float32).astype(np.float64)


def _of_level(table: np.ndarray, choice: Choice) -> jax.Array:
    """A table's value at each image's level, `[batch, 1, 1, 1]`."""
    return jnp.asarray(table)[choice.level][:, None, None, None]


def _matrix(name: str, level: int, sign: int, *, height: int, width: int) -> list[list[float]]:
    """From a pixel's place to that of its source: rows x and y, `[[a, b, c], [d, e, f]]`, from the image's centre."""
    shear = sign * 0.033 * level
    shift = sign * int(_strengths(0, 32)[level])
    turn = math.radians(sign * 4.5 * level)
    cos, sin = math.cos(turn), math.sin(turn)
    return {
        "shear_x": [[1, shear, shear * height / 2], [0, 1, 0]],
        "shear_y": [[1, 0, 0], [shear, 1, shear * width / 2]],
        "translate_x": [[1, 0, -shift], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, -shift]],
        "rotate": [[cos, -sin, 0], [sin, cos, 0]],
    }.get(name, [[1, 0, 0], [0, 1, 0]])


def _moved(images: jax.Array, choice: Choice) -> jax.Array:
    """Sheared, shifted or turned; the nearest pixel, and black where there is none."""
    batch, height, width, channels = images.shape
    # Places are counted from the centre in half pixels, and as fixed-point numbers of 31 bits.
    bits = 30 - math.ceil(math.log2(4 * max(height, width) + 128))
    matrices = np.array(
        [
            [[_matrix(name, level, sign, height=height, width=width) for sign in (1, -1)] for level in range(LEVELS)]
            for name in OPERATIONS
        ]
    )
    matrices[..., 2] *= 2
    table = jnp.asarray(np.round(matrices * 2**bits).astype(np.int32))
    chosen = table[choice.operation, choice.level, choice.negative.astype(jnp.int32)]
    x, y = 2 * jnp.arange(width) - (width - 1), 2 * jnp.arange(height)[:, None] - (height - 1)

    def source(row: int, side: int) -> jax.Array:
        a, b, c = (chosen[:, row, column][:, None, None] for column in range(3))
        return (a * x + b * y + c + (side << bits)) >> (bits + 1)

    column, row = source(0, width), source(1, height)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = jnp.where(inside, row * width + column, 0).reshape(batch, height * width, 1)
    pixels = jnp.take_along_axis(images.reshape(batch, height * width, channels), place, axis=1)
    return jnp.where(inside[..., None], pixels.reshape(images.shape), 0)


def _brightness(images: jax.Array, choice: Choice) -> jax.Array:
    strength = _strengths(0, 0.99)
    factors = np.stack([1 + strength, 1 - strength]).astype(np.float32)
    factor = jnp.asarray(factors)[choice.negative.astype(jnp.int32), choice.level][:, None, None, None]
    return jnp.minimum(images.astype(jnp.float32) * factor, 255.0).astype(jnp.uint8)


def _blend(values: jax.Array, choice: Choice) -> jax.Array:
    """(1 + m)·image − m·other, rounded down; other is its grey image, the mean of that, or the blurred image."""
    sign = jnp.where(choice.negative, -1, 1)
    weight = (_PERMIL * choice.level * sign)[:, None, None, None]
    grey = _grey(values)
    pixels = values.shape[1] * values.shape[2]
    whole, rest = jnp.divmod(jnp.sum(grey, axis=(1, 2, 3), keepdims=True), pixels)
    mean = weight * whole - (-weight * rest) // pixels  # m·mean, rounded up, which does not change the result below
    other = jnp.where(_is("color", choice), grey, _blurred(values)) * weight
    other = jnp.where(_is("contrast", choice), mean, other)
    return jnp.clip((values * (1000 + weight) - other) // 1000, 0, 255).astype(jnp.uint8)


def _grey(values: jax.Array) -> jax.Array:
    """`[batch, height, width, 1]`, rounded down."""
    if values.shape[-1] == 1:
        return values
    return jnp.sum(values * jnp.array([2989, 5870, 1140]), axis=-1, keepdims=True) // 10000


def _blurred(values: jax.Array) -> jax.Array:
    """Mean of 3x3 pixels, in which the middle one counts five times; rounded. The border stays as it is."""
    if min(values.shape[1:3]) < 3:
        return values
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * values[:, 1:-1, 1:-1]
    return values.at[:, 1:-1, 1:-1].set((2 * total + 13) // 26)


def _posterize(images: jax.Array, choice: Choice) -> jax.Array:
    bits = np.round(8 - np.arange(LEVELS) / ((LEVELS - 1) / 6)).astype(int)
    return images & _of_level((255 << (8 - bits) & 255).astype(np.uint8), choice)


def _solarize(images: jax.Array, choice: Choice) -> jax.Array:
    thresholds = (255.0 * _strengths(1, 0)).astype(np.float32)
    return jnp.where(images >= _of_level(np.ceil(thresholds).astype(np.uint8), choice), 255 - images, images)


def _autocontrast(images: jax.Array) -> jax.Array:
    """Each channel spread from its smallest and largest value over 0 to 255."""
    values = images.astype(jnp.float32)
    least, most = jnp.min(values, axis=(1, 2), keepdims=True), jnp.max(values, axis=(1, 2), keepdims=True)
    scale = (most - least) * jnp.float32(1 / 255)
    spread = (values - least) / jnp.where(most == least, 1.0, scale)
    return jnp.where(most == least, images, jnp.minimum(spread, 255.0).astype(jnp.uint8))


def _equalize(images: jax.Array) -> jax.Array:
    """Each channel with all its values about equally frequent, by PIL's rule."""
    batch, height, width, channels = images.shape
    values = images.reshape(batch, height * width, channels).astype(jnp.int32)
    count = jax.vmap(jax.vmap(lambda values: jnp.zeros(256, jnp.int32).at[values].add(1), in_axes=1))
    counts = count(values)
    brightest = jnp.take_along_axis(counts, jnp.max(values, axis=1)[..., None], axis=2)
    step = (height * width - brightest) // 255
    before = jnp.cumsum(counts, axis=2) - counts
    table = jnp.minimum((before + step // 2) // jnp.maximum(step, 1), 255)
    table = jnp.where(step == 0, jnp.arange(256), table).astype(jnp.uint8)
    return jnp.take_along_axis(jax.lax.optimization_barrier(table.swapaxes(1, 2)), values, axis=1).reshape(images.shape)
