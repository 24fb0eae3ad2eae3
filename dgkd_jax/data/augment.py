"""From an encoded image to the uint8 image that the model sees. Pure functions on tensors.

Randomness comes in as `uniforms`, float32 numbers in [0, 1) that the caller draws for each image with a
stateless generator: an image is then a function of (seed, epoch, position), and numpy can check every function.

JPEG is decoded with the accurate inverse DCT and smooth chroma upsampling, and resizing is bilinear (at evaluation
perhaps bicubic) with antialiasing (the filter widens where it shrinks), because PIL does both: decoding equals PIL's
bit for bit and resizing within two grey levels, so PyTorch's published weights see the images that they know. A resize
without antialiasing would save a third of the time per ImageNet image. EXIF rotation is ignored, as torchvision does.
"""

import math

import tensorflow as tf

CROP_ATTEMPTS = 10
PAD_CROP_UNIFORMS = 3
RANDOM_RESIZED_CROP_UNIFORMS = 2 * CROP_ATTEMPTS + 3
_ACCURATE = "INTEGER_ACCURATE"


def decode(encoded: tf.Tensor, *, channels: int) -> tf.Tensor:
    """Decode JPEG or PNG.

    Args:
        encoded: scalar string, a file's bytes.
        channels: 1 or 3; colour becomes grey and grey becomes colour as needed, transparency is dropped.

    Returns:
        [height, width, channels] uint8.
    """
    return tf.io.decode_jpeg(encoded, channels=channels, dct_method=_ACCURATE)  # this operation reads PNG too


def to_uint8(image: tf.Tensor) -> tf.Tensor:
    """Round to the nearest integer and clip to [0, 255]; never wraps around."""
    return tf.saturate_cast(tf.round(image), tf.uint8)


def flip(image: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    """Mirror left to right where `uniform` < 1/2.

    Args:
        image: [height, width, channels].
        uniform: scalar in [0, 1).
    """
    return tf.cond(uniform < 0.5, lambda: tf.reverse(image, [1]), lambda: image)


def pad_crop(image: tf.Tensor, uniforms: tf.Tensor, *, size: int, mirror: bool) -> tf.Tensor:
    """Pad with black, cut out a window of the old size at a random place, and perhaps mirror it.

    The padding is an eighth of the side: the usual 4 pixels at 32, and in proportion 3 at 28 and 8 at 64.
    Source: He et al., CVPR 2016, arXiv:1512.03385, section 4.2.

    Args:
        image: [size, size, channels] uint8.
        uniforms: [3] float32 in [0, 1): vertical place, horizontal place, mirror.
        mirror: False for images whose mirror image means something else, such as digits.

    Returns:
        [size, size, channels] uint8.
    """
    pad = size // 8
    padded = tf.pad(image, [[pad, pad], [pad, pad], [0, 0]])
    offset = tf.cast(uniforms[:2] * (2 * pad + 1), tf.int32)
    image = tf.slice(padded, [offset[0], offset[1], 0], [size, size, -1])
    return flip(image, uniforms[2]) if mirror else image


def random_window(height: tf.Tensor, width: tf.Tensor, uniforms: tf.Tensor) -> tf.Tensor:
    """A window of random area and shape within an image, with torchvision's distribution.

    The area is uniform in [0.08, 1] of the image and log(width/height) uniform in [log 3/4, log 4/3]; of ten
    draws the first that fits is placed uniformly. If none fits: the largest central window of an allowed shape.
    Source: Szegedy et al., CVPR 2015, arXiv:1409.4842, section 6; torchvision, `RandomResizedCrop.get_params`.

    Args:
        height: scalar int32, pixels.
        width: scalar int32, pixels.
        uniforms: [22] float32 in [0, 1): ten areas, ten shapes, vertical place, horizontal place.

    Returns:
        [4] int32: top, left, height, width.
    """
    low, high = 3 / 4, 4 / 3
    rows, columns = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    area = rows * columns * (0.08 + 0.92 * uniforms[:CROP_ATTEMPTS])
    log_low, log_high = math.log(low), math.log(high)
    shape = tf.exp(log_low + (log_high - log_low) * uniforms[CROP_ATTEMPTS : 2 * CROP_ATTEMPTS])
    # The central window stands last and always fits, so that one look-up serves both cases.
    heights = tf.concat([tf.sqrt(area / shape), [tf.minimum(rows, columns / low)]], 0)
    widths = tf.concat([tf.sqrt(area * shape), [tf.minimum(columns, rows * high)]], 0)
    heights, widths = tf.cast(tf.round(heights), tf.int32), tf.cast(tf.round(widths), tf.int32)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    chosen = tf.argmax(tf.cast(fits, tf.int32), output_type=tf.int32)  # the first that fits
    size = tf.stack([heights[chosen], widths[chosen]])
    room = tf.stack([height, width]) - size
    placed = tf.cast(uniforms[2 * CROP_ATTEMPTS :] * tf.cast(room + 1, tf.float32), tf.int32)
    corner = tf.where(chosen < CROP_ATTEMPTS, placed, room // 2)
    return tf.concat([corner, size], 0)


def decode_random_window(encoded: tf.Tensor, uniforms: tf.Tensor, *, channels: int) -> tf.Tensor:
    """Decode the part of an image that lies in `random_window`; of a JPEG only the blocks that it touches.

    Args:
        encoded: scalar string, JPEG or PNG.
        uniforms: [22], see `random_window`.

    Returns:
        [window height, window width, channels] uint8.
    """

    def jpeg():
        shape = tf.image.extract_jpeg_shape(encoded)
        window = random_window(shape[0], shape[1], uniforms)
        # Chroma at the edge of a window is interpolated without what lies outside: decode a column more on each side.
        before, after = tf.minimum(window[1], 1), tf.minimum(shape[1] - window[1] - window[3], 1)
        wider = window + tf.stack([0, -before, 0, before + after])
        image = tf.image.decode_and_crop_jpeg(encoded, wider, channels=channels, dct_method=_ACCURATE)
        return tf.slice(image, [0, before, 0], [-1, window[3], -1])

    def other():
        image = decode(encoded, channels=channels)
        shape = tf.shape(image)
        window = random_window(shape[0], shape[1], uniforms)
        return tf.slice(image, [window[0], window[1], 0], [window[2], window[3], -1])

    return tf.cond(tf.io.is_jpeg(encoded), jpeg, other)


def random_resized_crop(encoded: tf.Tensor, uniforms: tf.Tensor, *, size: int, channels: int) -> tf.Tensor:
    """A random window of the image, resized to a square and mirrored with probability 1/2.

    Args:
        encoded: scalar string, JPEG or PNG.
        uniforms: [23] float32 in [0, 1): 22 of `random_window`, then mirror.
        size: side of the result in pixels.

    Returns:
        [size, size, channels] uint8.
    """
    window = decode_random_window(encoded, uniforms[:-1], channels=channels)
    return flip(to_uint8(tf.image.resize(window, [size, size], antialias=True)), uniforms[-1])


def resized(image: tf.Tensor, shape: tf.Tensor, *, interpolation: str) -> tf.Tensor:
    """The image at another size, within two grey levels of PIL's `Image.resize`.

    Args:
        image: [height, width, channels] uint8.
        shape: [2] int32, the new height and width.
        interpolation: "bilinear" or "bicubic" (Keys' kernel with a = -1/2), with antialiasing.

    Returns:
        [new height, new width, channels] uint8.
    """
    if interpolation == "bicubic":
        # PIL rounds and clips after each axis, the width first. This kernel overshoots at edges, so the clipping shows:
        # up to 7 grey levels without this pass.
        across = tf.stack([tf.shape(image)[0], shape[1]])
        image = to_uint8(tf.image.resize(image, across, interpolation, antialias=True))
    return to_uint8(tf.image.resize(image, shape, interpolation, antialias=True))


def central_view(
    encoded: tf.Tensor, *, resize: int, size: int, channels: int, interpolation: str = "bilinear"
) -> tf.Tensor:
    """The image as it is evaluated: its shorter side resized, keeping the aspect, then the central square.

    Rounding follows torchvision's `Resize` and `CenterCrop`.

    Args:
        encoded: scalar string, JPEG or PNG.
        resize: pixels of the shorter side; 0 = not resized.
        size: side of the result in pixels.
        interpolation: of the resize, see `resized`.

    Returns:
        [size, size, channels] uint8. An image smaller than the square is an error when the graph runs.
    """
    image = decode(encoded, channels=channels)
    if resize:
        shape = tf.shape(image)[:2]
        image = resized(image, resize * shape // tf.reduce_min(shape), interpolation=interpolation)
    shape = tf.shape(image)[:2]
    message = f"an image is smaller than {size} pixels: set config.data.eval_resize to {size} or more"
    with tf.control_dependencies([tf.debugging.assert_greater_equal(shape, size, message=message)]):
        corner = tf.cast(tf.round(tf.cast(shape - size, tf.float32) / 2), tf.int32)  # half to even, as Python
    return tf.slice(image, [corner[0], corner[1], 0], [size, size, -1])
