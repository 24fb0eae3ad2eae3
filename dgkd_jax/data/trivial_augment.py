"""TrivialAugment, wide: one random operation of random strength on each image (Müller & Hutter, ICCV 2021,
arXiv:2103.10158), as torchvision's `TrivialAugmentWide` does it with its defaults.

All images go through the same passes: a table of 256 grey levels for each channel, a blend, and a move of pixels. A
branch per image would not run in parallel on an accelerator. Everything is computed in integers, or by the host, for
the reason that `mixing` gives. So pixels are torchvision's except:

- colour, contrast and sharpness are the exact blend, rounded down; torchvision's float32 may fall just below a whole
  number, which is one grey level;
- where a moved pixel's source lies halfway between two pixels (on the diagonals at 45° and 135°, in two shears),
  torchvision takes the one that its float32 happens to be nearer to.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dgkd_jax.data import once

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
    blends = _is("color", choice) | _is("sharpness", choice)
    changed = jnp.where(blends[:, None, None, None], _blended(images, choice), _looked_up(images, choice))
    # The move is last, because a blur would read it nine times.
    return once.computed_once(_moved(changed, choice), always=_always(choice))


def _always(choice: Choice) -> jax.Array:
    """True."""
    return jnp.all(choice.level < LEVELS)


def _is(name: str, choice: Choice) -> jax.Array:
    return choice.operation == OPERATIONS.index(name)


def _strengths(first: float, last: float) -> np.ndarray:
    """`torch.linspace(first, last, LEVELS)` up to its last bit: in float32, and counted from the nearer end.

    Its half of 32 pixels is 15.999999, which torchvision rounds down to a move of 15.
    """
    steps, step = np.arange(LEVELS), np.float64(np.float32((last - first) / (LEVELS - 1)))
    values = np.where(steps < LEVELS // 2, first + step * steps, last - step * steps[::-1])
    return values.astype(np.float32).astype(np.float64)


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


def _weight(choice: Choice) -> jax.Array:
    """Of what is taken from a blend, in thousandths: int32 `[batch]`."""
    return jnp.where(choice.negative, -_PERMIL, _PERMIL) * choice.level


def _blended(images: jax.Array, choice: Choice) -> jax.Array:
    """(1 + m)·image − m·other, rounded down; other is the grey image for colour, else the blurred one."""
    values, weight = images.astype(jnp.int32), _weight(choice)[:, None, None, None]
    other = jnp.where(_is("color", choice)[:, None, None, None], _grey(values), _blurred(values))
    return jnp.clip((values * (1000 + weight) - weight * other) // 1000, 0, 255).astype(jnp.uint8)


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


def _looked_up(images: jax.Array, choice: Choice) -> jax.Array:
    """The operations whose result depends on a value, and on statistics of its image, but not on its place."""
    batch, height, width, channels = images.shape
    values = images.astype(jnp.int32).reshape(batch, height * width, channels)
    tables = {
        "contrast": _contrast(images.astype(jnp.int32), choice)[:, None],
        "autocontrast": _autocontrast(values),
        "equalize": _equalize(values),
    }
    table = jnp.asarray(_fixed_tables())[choice.operation, choice.level, choice.negative.astype(jnp.int32)][:, None]
    for name, result in tables.items():
        table = jnp.where(_is(name, choice)[:, None, None], result, table)
    table = jnp.broadcast_to(table.astype(jnp.uint8), (batch, channels, 256)).swapaxes(1, 2)
    table = once.computed_once(table, always=_always(choice))
    return jnp.take_along_axis(table, values, axis=1).reshape(images.shape)


@functools.cache
def _fixed_tables() -> np.ndarray:
    """The tables that do not depend on the image: uint8 `[operations, LEVELS, 2, 256]`; third: whether negative."""
    values, strength = np.arange(256, dtype=np.uint8), _strengths(0, 0.99)
    factors = np.stack([1 + strength, 1 - strength], axis=1).astype(np.float32)
    bits = np.round(8 - np.arange(LEVELS) / ((LEVELS - 1) / 6)).astype(int)
    thresholds = (255.0 * _strengths(1, 0)).astype(np.float32)
    tables = np.broadcast_to(values, (len(OPERATIONS), LEVELS, 2, 256)).copy()
    tables[OPERATIONS.index("brightness")] = np.minimum(values * factors[..., None], np.float32(255)).astype(np.uint8)
    tables[OPERATIONS.index("posterize")] = (values & (255 << (8 - bits) & 255)[:, None])[:, None]
    tables[OPERATIONS.index("solarize")] = np.where(values >= thresholds[:, None], 255 - values, values)[:, None]
    return tables


def _contrast(values: jax.Array, choice: Choice) -> jax.Array:
    """(1 + m)·value − m·mean of the grey image, rounded down: `[batch, 256]`."""
    weight, pixels = _weight(choice)[:, None], values.shape[1] * values.shape[2]
    whole, rest = jnp.divmod(jnp.sum(_grey(values), axis=(1, 2)), pixels)
    mean = weight * whole - (-weight * rest) // pixels  # m·mean, rounded up, which does not change the result
    return jnp.clip((jnp.arange(256) * (1000 + weight) - mean) // 1000, 0, 255).astype(jnp.uint8)


def _autocontrast(values: jax.Array) -> jax.Array:
    """Each channel spread from its smallest and largest value over 0 to 255: `[batch, channels, 256]`."""
    least, most = jnp.min(values, axis=1), jnp.max(values, axis=1)
    above = jnp.clip(jnp.arange(256) - least[..., None], 0, 255)
    return jnp.where(
        (most == least)[..., None], jnp.arange(256), jnp.asarray(_spread())[(most - least)[..., None], above]
    )


@functools.cache
def _spread() -> np.ndarray:
    """255·value/range, rounded down, as torchvision's float32 has it: uint8 `[range, value]`."""
    values = np.arange(256, dtype=np.float32)
    scale = np.maximum(values, 1)[:, None] * np.float32(1 / 255)
    return np.minimum(values / scale, np.float32(255)).astype(np.uint8)


def _equalize(values: jax.Array) -> jax.Array:
    """Each channel with all its values about equally frequent, by PIL's rule: `[batch, channels, 256]`."""
    count = jax.vmap(jax.vmap(lambda values: jnp.zeros(256, jnp.int32).at[values].add(1), in_axes=1))
    counts = count(values)
    brightest = jnp.take_along_axis(counts, jnp.max(values, axis=1)[..., None], axis=2)
    step = (values.shape[1] - brightest) // 255
    before = jnp.cumsum(counts, axis=2) - counts
    table = jnp.minimum((before + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step == 0, jnp.arange(256), table)
