"""The images that a network sees, made with numpy and Pillow: what `augment.py` does in TensorFlow, for arrays.

Randomness is passed in as uniform numbers, as there; so an image is a function of (seed, epoch, position). Pillow
resizes as torchvision does for PIL images.
"""

import math

import numpy as np
from PIL import Image

from dgkd_jax.errors import BadInput

CROP_ATTEMPTS = 10
RANDOM_RESIZED_CROP_UNIFORMS = 2 * CROP_ATTEMPTS + 3
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def pad_crop(image: np.ndarray, window: np.ndarray) -> np.ndarray:
    """`augment.pad_crop` with the window given.

    Args:
        image: uint8 `[height, width, channels]`.
        window: int `[3]`, from `on_device.windows`: top and left in the padded image, and 1 where it is mirrored.
    """
    pad, (height, width, _) = image.shape[0] // 8, image.shape
    top, left, mirrored = map(int, window)
    padded = np.pad(image, [(pad, pad), (pad, pad), (0, 0)])
    found = padded[top : top + height, left : left + width]
    return found[:, ::-1] if mirrored else found


def central_view(image: np.ndarray, *, resize: int, shape: tuple[int, int, int], interpolation: str) -> np.ndarray:
    """The view for evaluation: resize the shorter side, keeping the aspect ratio, then crop the centre.

    Args:
        image: uint8 `[height, width, channels]`.
        resize: pixels of the shorter side; 0 = not resized.
        shape: (height, width, channels) of the result.
        interpolation: bilinear or bicubic, antialiased.

    Raises:
        BadInput: the image is smaller than the result.
    """
    height, width = image.shape[:2]
    if resize:
        short = min(height, width)
        height, width = resize * height // short, resize * width // short
        image = resized(image, height, width, interpolation=interpolation)
    if height < shape[0] or width < shape[1]:
        raise BadInput(
            f"an image of {height}x{width} pixels is smaller than {shape[0]}x{shape[1]}: set data.eval_resize to "
            f"{max(shape[:2])} or more"
        )
    top, left = round((height - shape[0]) / 2), round((width - shape[1]) / 2)
    return image[top : top + shape[0], left : left + shape[1]]


def random_resized_crop(image: np.ndarray, uniforms: np.ndarray, *, size: int) -> np.ndarray:
    """A random window of the image, resized to a square and mirrored with probability 1/2: torchvision's.

    Args:
        image: uint8 `[height, width, channels]`.
        uniforms: `[23]` in [0, 1): `augment.random_window`'s, then mirror.
        size: side of the result, pixels.
    """
    top, left, height, width = random_window(*image.shape[:2], uniforms[:-1])
    found = resized(image[top : top + height, left : left + width], size, size, interpolation="bilinear")
    return found[:, ::-1] if uniforms[-1] < 0.5 else found


def random_window(height: int, width: int, uniforms: np.ndarray) -> tuple[int, int, int, int]:
    """`augment.random_window`: top, left, height and width of a window of random area and shape."""
    low, high = 3 / 4, 4 / 3
    area = height * width * (0.08 + 0.92 * uniforms[:CROP_ATTEMPTS])
    shape = np.exp(math.log(low) + math.log(high / low) * uniforms[CROP_ATTEMPTS : 2 * CROP_ATTEMPTS])
    rows, columns = np.rint(np.sqrt(area / shape)).astype(int), np.rint(np.sqrt(area * shape)).astype(int)
    fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
    if not fits.any():  # the largest central window of an allowed shape
        rows, columns = round(min(height, width / low)), round(min(width, height * high))
        return (height - rows) // 2, (width - columns) // 2, rows, columns
    chosen = int(np.argmax(fits))
    room = height - rows[chosen], width - columns[chosen]
    top, left = (int(u * (free + 1)) for u, free in zip(uniforms[2 * CROP_ATTEMPTS :], room, strict=True))
    return top, left, int(rows[chosen]), int(columns[chosen])


def resized(image: np.ndarray, height: int, width: int, *, interpolation: str) -> np.ndarray:
    """Pillow's `Image.resize` of an uint8 `[height, width, 1 or 3]` image."""
    grey = image.shape[-1] == 1
    found = Image.fromarray(image[..., 0] if grey else image).resize((width, height), _FILTERS[interpolation])
    return np.asarray(found).reshape(height, width, image.shape[-1])
