"""Augmentations against numpy written separately."""

import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from PIL.Image import Resampling

from dgkd_jax.data import augment


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def noise(rng, *shape):
    return rng.integers(0, 256, shape, np.uint8)


def smooth(height, width):
    """A photo-like image: JPEG keeps it, and a resize of it does not depend on single pixels."""
    y, x = np.mgrid[:height, :width]
    channels = [128 + 90 * np.sin(y / 9 + k) * np.cos(x / (11 + k)) for k in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def as_jpeg(image, **kwargs):
    return tf.io.encode_jpeg(image, quality=95, **kwargs).numpy()


def as_png(image):
    return tf.io.encode_png(image).numpy()


def triangle_resize(image, size):
    """Bilinear resize with antialiasing, one axis after the other, as a matrix of weights per axis."""

    def weights(old, new):
        scale = max(old / new, 1.0)
        centres = (np.arange(new) + 0.5) * old / new
        distance = np.abs(np.arange(old)[None, :] + 0.5 - centres[:, None]) / scale
        w = np.maximum(0, 1 - distance)
        return w / w.sum(1, keepdims=True)

    rows, columns = weights(image.shape[0], size[0]), weights(image.shape[1], size[1])
    return np.einsum("ab,bcd,ec->aed", rows, image.astype(np.float64), columns)


def plain_resize(image, size):
    """Bilinear resize without antialiasing: the two nearest pixels of each axis, those at the edge repeated."""

    def between(values, new):
        old = len(values)
        centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(centres).astype(int)
        part = (centres - low)[:, None, None]
        return values[low] * (1 - part) + values[np.minimum(low + 1, old - 1)] * part

    return between(between(image.astype(np.float64), size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)


# A value that lies within float32's error of a half may round to either side.
def assert_rounded(result, exact):
    assert result.dtype == np.uint8
    assert np.abs(result - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(("size", "pad"), [(28, 3), (32, 4), (64, 8)])
@pytest.mark.parametrize("mirror", [False, True])
def test_pad_crop_cuts_the_window_that_numpy_cuts(rng, size, pad, mirror):
    image = noise(rng, size, size, 3)
    padded = np.zeros((size + 2 * pad, size + 2 * pad, 3), np.uint8)
    padded[pad : pad + size, pad : pad + size] = image
    for _ in range(20):
        uniforms = rng.random(3).astype(np.float32)
        top, left = (int(u * (2 * pad + 1)) for u in uniforms[:2])
        expected = padded[top : top + size, left : left + size]
        if mirror and uniforms[2] < 0.5:
            expected = expected[:, ::-1]
        np.testing.assert_array_equal(augment.pad_crop(image, uniforms, size=size, mirror=mirror), expected)


def test_pad_crop_reaches_every_place_and_no_other(rng):
    image = noise(rng, 16, 16, 1)
    places = np.linspace(0, 1, 41, endpoint=False, dtype=np.float32)
    places = np.append(places, np.float32(1 - 2**-24))  # the largest float32 below 1
    crops = {augment.pad_crop(image, np.array([u, 0, 0]), size=16, mirror=False).numpy().tobytes() for u in places}
    assert len(crops) == 5  # 2 pixels of padding on each side


def numpy_window(height, width, uniforms):
    """torchvision's loop, in float32 as the graph."""
    areas, shapes = uniforms[:10], uniforms[10:20]
    for area, shape in zip(areas, shapes, strict=True):
        area = np.float32(height * width) * (np.float32(0.08) + np.float32(0.92) * area)
        ratio = np.exp(np.float32(math.log(3 / 4)) + np.float32(math.log(4 / 3) - math.log(3 / 4)) * shape)
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(uniforms[20] * (height - h + 1)), int(uniforms[21] * (width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * 4 / 3), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (64, 64), (1, 1), (31, 200)])
def test_random_window_is_torchvisions(rng, height, width):
    draw = tf.function(augment.random_window)
    for _ in range(200):
        uniforms = rng.random(22).astype(np.float32)
        assert tuple(draw(height, width, uniforms).numpy()) == numpy_window(height, width, uniforms)


@pytest.mark.parametrize(("height", "width", "expected"), [(1000, 9, (494, 0, 12, 9)), (9, 1000, (0, 494, 9, 12))])
def test_random_window_of_a_strip_is_central(height, width, expected):
    uniforms = np.full(22, 0.999, np.float32)  # large areas, none of which fits
    assert tuple(augment.random_window(height, width, uniforms).numpy()) == expected


def decode_fast(encoded):
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_FAST", fancy_upscaling=False).numpy()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("subsampled", [False, True])
def test_fused_decode_and_crop_equals_decode_then_crop(rng, subsampled, fast):
    encoded = as_jpeg(noise(rng, 75, 100, 3), chroma_downsampling=subsampled)
    exact = augment.decode(encoded, channels=3).numpy()
    whole = decode_fast(encoded) if fast else exact
    assert (whole != exact).any() == fast
    fused = tf.function(lambda uniforms: augment.decode_random_window(encoded, uniforms, channels=3, fast=fast))
    for _ in range(100):
        uniforms = rng.random(22).astype(np.float32)
        top, left, height, width = numpy_window(75, 100, uniforms)
        np.testing.assert_array_equal(fused(uniforms), whole[top : top + height, left : left + width])


def test_png_is_cropped_after_decoding(rng):
    image = noise(rng, 40, 30, 3)
    uniforms = rng.random(22).astype(np.float32)
    top, left, height, width = numpy_window(40, 30, uniforms)
    result = augment.decode_random_window(as_png(image), uniforms, channels=3)
    np.testing.assert_array_equal(result, image[top : top + height, left : left + width])


@pytest.mark.parametrize("mirror", [0.1, 0.9])
@pytest.mark.parametrize("encode", [as_jpeg, as_png])
def test_random_resized_crop_is_numpys(rng, encode, mirror):
    encoded = encode(smooth(90, 70))
    whole = augment.decode(encoded, channels=3).numpy()
    for _ in range(5):
        uniforms = np.append(rng.random(22), mirror).astype(np.float32)
        top, left, height, width = numpy_window(90, 70, uniforms)
        exact = triangle_resize(whole[top : top + height, left : left + width], (32, 32))
        result = augment.random_resized_crop(encoded, uniforms, size=32, channels=3).numpy()
        assert_rounded(result, exact[:, ::-1] if mirror < 0.5 else exact)


@pytest.mark.parametrize("mirror", [0.1, 0.9])
@pytest.mark.parametrize(("encode", "decode"), [(as_jpeg, decode_fast), (as_png, lambda file: tf.io.decode_png(file))])
def test_fast_random_resized_crop_is_the_same_window_without_antialiasing(rng, encode, decode, mirror):
    encoded = encode(noise(rng, 90, 70, 3))  # in which antialiasing shows
    whole = np.asarray(decode(encoded))
    for size in (16, 80):  # smaller and larger
        uniforms = np.append(rng.random(22), mirror).astype(np.float32)
        top, left, height, width = numpy_window(90, 70, uniforms)
        window = whole[top : top + height, left : left + width]
        exact = plain_resize(window, (size, size))
        result = augment.random_resized_crop(encoded, uniforms, size=size, channels=3, fast=True).numpy()
        assert_rounded(result, exact[:, ::-1] if mirror < 0.5 else exact)


@pytest.mark.parametrize(
    # Corners as torchvision's CenterCrop rounds them: 58.5 -> 58 and 59.5 -> 60.
    ("height", "width", "resize", "resized", "corner"),
    [
        (90, 120, 64, (64, 85), (16, 26)),
        (120, 90, 64, (85, 64), (26, 16)),
        (32, 149, 0, (32, 149), (0, 58)),
        (32, 151, 0, (32, 151), (0, 60)),
        (32, 32, 0, (32, 32), (0, 0)),
        (20, 30, 40, (40, 60), (4, 14)),
    ],
)
def test_central_view_is_numpys(height, width, resize, resized, corner):
    image = smooth(height, width)
    exact = triangle_resize(image, resized) if resize else image.astype(float)
    expected = exact[corner[0] : corner[0] + 32, corner[1] : corner[1] + 32]
    result = augment.central_view(as_png(image), resize=resize, size=32, channels=3).numpy()
    assert result.shape == (32, 32, 3)
    assert_rounded(result, expected)


@pytest.mark.parametrize("shape", [(41, 57), (90, 64), (200, 170)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_is_pils(rng, interpolation, shape):
    """On edges from black to white, where the bicubic filter overshoots, and on noise; smaller and larger."""
    edges = np.repeat(np.repeat(noise(rng, 10, 8, 3) // 128 * 255, 9, 0), 13, 1)
    for image in (edges, noise(rng, 90, 104, 3), smooth(90, 104)):
        expected = np.asarray(Image.fromarray(image).resize(shape[::-1], Resampling[interpolation.upper()])).astype(int)
        result = augment.resized(image, np.array(shape), interpolation=interpolation).numpy()
        # PIL rounds after each axis. Its weights are integers of 22 bits, so a value near a half may go the other way
        # (bicubic), or is not rounded in between (bilinear); the second axis can make 2 of that 1.
        assert np.abs(result - expected).max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(41, 57), (90, 64), (300, 35), (90, 104), (1, 1)])
def test_resizing_row_by_row_gives_the_whole_operations_pixels(rng, shape, channels):
    """Bit for bit: the same products are summed in the same order, the rows first."""
    image = noise(rng, 90, 104, channels)
    expected = augment.to_uint8(tf.image.resize(image, shape, antialias=True))
    np.testing.assert_array_equal(augment.resized(image, np.array(shape), interpolation="bilinear"), expected)


def test_an_image_smaller_than_the_view_is_an_error(rng):
    with pytest.raises(tf.errors.InvalidArgumentError, match="smaller than 32 pixels: set config.data.eval_resize"):
        augment.central_view(as_png(noise(rng, 40, 31, 3)), resize=0, size=32, channels=3)


def test_values_are_rounded_and_clipped_and_never_wrap():
    values = np.array([-3.0, -0.4, 0.6, 127.2, 254.6, 255.4, 256.0, 300.0], np.float32)
    np.testing.assert_array_equal(augment.to_uint8(values), [0, 0, 1, 127, 255, 255, 255, 255])


def test_grey_becomes_colour_and_colour_becomes_grey(rng):
    grey, colour = noise(rng, 9, 8, 1), noise(rng, 9, 8, 3)
    np.testing.assert_array_equal(augment.decode(as_png(grey), channels=3), np.repeat(grey, 3, -1))
    assert augment.decode(as_png(colour), channels=1).shape == (9, 8, 1)
    assert augment.decode(as_jpeg(grey), channels=3).shape == (9, 8, 3)
    with_alpha = np.concatenate([colour, noise(rng, 9, 8, 1)], -1)
    np.testing.assert_array_equal(augment.decode(as_png(with_alpha), channels=3), colour)
