"""Decoding and augmentation: from an encoded image to the uint8 image that the model sees. Pure functions on tensors.

Randomness is passed in as `uniforms`, float32 numbers in [0, 1) that the caller draws per image with a stateless
generator. So an image is a function of (seed, epoch, position), and every function can be checked against numpy.

JPEG is decoded with the accurate inverse DCT and smooth chroma upsampling, and resizing is bilinear (in evaluation
optionally bicubic) with antialiasing, as in PIL: decoding equals PIL's bit for bit and resizing within two grey levels,
so PyTorch's published weights see the images that they were trained on. EXIF rotation is ignored, as in torchvision.

Timings, and what was tried to make it faster: docs/performance.md, section "Data".
"""

import math

import tensorflow as tf

CROP_ATTEMPTS = 10
PAD_CROP_UNIFORMS = 3
RANDOM_RESIZED_CROP_UNIFORMS = 2 * CROP_ATTEMPTS + 3
_ACCURATE = "INTEGER_ACCURATE"
_FAST = "INTEGER_FAST"


def decode(encoded: tf.Tensor, *, channels: int) -> tf.Tensor:
    """Decode JPEG or PNG.

    Args:
        encoded: scalar string, a file's bytes.
        channels: 1 or 3; images are converted between grey and colour, transparency is dropped.

    Returns:
        [height, width, channels] uint8.
    """
    return tf.io.decode_jpeg(encoded, channels=channels, dct_method=_ACCURATE)  # reads PNG too


def to_uint8(image: tf.Tensor) -> tf.Tensor:
    """Round to the nearest integer and clip to [0, 255]."""
    return tf.saturate_cast(tf.round(image), tf.uint8)


def flip(image: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    """Mirror left to right where `uniform` < 1/2.

    Args:
        image: [height, width, channels].
        uniform: scalar in [0, 1).
    """
    # Reverses no axis or axis 1: a tf.cond would make the whole graph slower.
    return tf.reverse(image, tf.fill([tf.cast(uniform < 0.5, tf.int32)], 1))


def pad_crop(image: tf.Tensor, uniforms: tf.Tensor, *, size: int, mirror: bool) -> tf.Tensor:
    """Pad with black, cut out a window of the original size at a random place, and perhaps mirror it.

    The padding is an eighth of the side: the usual 4 pixels at 32, in proportion 3 at 28 and 8 at 64.
    Source: He et al., CVPR 2016, arXiv:1512.03385, section 4.2.

    Args:
        image: [size, size, channels] uint8.
        uniforms: [3] float32 in [0, 1): vertical place, horizontal place, mirror.
        mirror: False for images that change their meaning when mirrored, such as digits.

    Returns:
        [size, size, channels] uint8.
    """
    pad = size // 8
    padded = tf.pad(image, [[pad, pad], [pad, pad], [0, 0]])
    offset = tf.cast(uniforms[:2] * (2 * pad + 1), tf.int32)
    image = tf.slice(padded, [offset[0], offset[1], 0], [size, size, -1])
    return flip(image, uniforms[2]) if mirror else image


def random_window(height: tf.Tensor, width: tf.Tensor, uniforms: tf.Tensor) -> tf.Tensor:
    """A window of random area and shape within an image, distributed as torchvision's.

    The area is uniform in [0.08, 1] of the image and log(width/height) uniform in [log 3/4, log 4/3]. Of ten draws, the
    first one that fits is placed uniformly. If none fits: the largest central window of an allowed shape.
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
    # The central window is last in the list and always fits, so no second case is needed.
    central = [[tf.minimum(rows, columns / low)], [tf.minimum(columns, rows * high)]]
    sizes = tf.concat([tf.sqrt(tf.stack([area / shape, area * shape])), central], 1)
    sizes = tf.cast(tf.round(sizes), tf.int32)
    whole = tf.stack([height, width])
    fits = tf.reduce_all((sizes > 0) & (sizes <= whole[:, None]), 0)
    chosen = tf.argmax(tf.cast(fits, tf.int32), output_type=tf.int32)  # the first that fits
    size = sizes[:, chosen]
    room = whole - size
    placed = tf.cast(uniforms[2 * CROP_ATTEMPTS :] * tf.cast(room + 1, tf.float32), tf.int32)
    corner = tf.where(chosen < CROP_ATTEMPTS, placed, room // 2)
    return tf.concat([corner, size], 0)


def decode_random_window(encoded: tf.Tensor, uniforms: tf.Tensor, *, channels: int, fast: bool = False) -> tf.Tensor:
    """Decode the part of an image inside `random_window`; of a JPEG, only the blocks that it touches.

    Args:
        encoded: scalar string, JPEG or PNG.
        uniforms: [22], see `random_window`.
        fast: for a JPEG use the faster, less accurate inverse DCT, and repeat chroma values instead of interpolating.

    Returns:
        [window height, window width, channels] uint8.
    """

    # Only small branches, with the shared operations outside: putting all operations in both branches takes measurably
    # longer, because a graph's cost grows with its operations, whether they run or not.
    jpeg = tf.io.is_jpeg(encoded)

    def header():
        return tf.image.extract_jpeg_shape(encoded), tf.zeros([0, 0, channels], tf.uint8)

    def pixels():
        image = decode(encoded, channels=channels)
        return tf.shape(image), image

    shape, image = tf.cond(jpeg, header, pixels)
    window = random_window(shape[0], shape[1], uniforms)

    def part(window: tf.Tensor) -> tf.Tensor:
        how = {"dct_method": _FAST if fast else _ACCURATE, "fancy_upscaling": not fast}
        return tf.cond(
            jpeg,
            lambda: tf.image.decode_and_crop_jpeg(encoded, window, channels=channels, **how),
            lambda: tf.slice(image, [window[0], window[1], 0], [window[2], window[3], -1]),
        )

    if fast:
        return part(window)
    # Interpolating chroma at a window's edge needs its neighbours: decode one more column on each side.
    before, after = tf.minimum(window[1], 1), tf.minimum(shape[1] - window[1] - window[3], 1)
    return tf.slice(part(window + tf.stack([0, -before, 0, before + after])), [0, before, 0], [-1, window[3], -1])


def random_resized_crop(
    encoded: tf.Tensor, uniforms: tf.Tensor, *, size: int, channels: int, fast: bool = False
) -> tf.Tensor:
    """A random window of the image, resized to a square and mirrored with probability 1/2.

    Args:
        encoded: scalar string, JPEG or PNG.
        uniforms: [23] float32 in [0, 1): 22 of `random_window`, then mirror.
        size: side of the result in pixels.
        fast: decode as in `decode_random_window`, and resize without antialiasing, as OpenCV's `INTER_LINEAR` does.
            When an image shrinks, fine patterns then turn into coarse ones, unlike in PIL's images.

    Returns:
        [size, size, channels] uint8.
    """
    window = decode_random_window(encoded, uniforms[:-1], channels=channels, fast=fast)
    if fast:
        # Resized as floats: the operation loads floats in whole pixels, but bytes one by one.
        image = _rounded_mean(tf.image.resize(tf.cast(window, tf.float32), [size, size]))
    else:
        image = resized(window, [size, size], interpolation="bilinear")
    return flip(image, uniforms[-1])


def resized(image: tf.Tensor, shape: tf.Tensor, *, interpolation: str) -> tf.Tensor:
    """The image at another size, within two grey levels of PIL's `Image.resize`.

    Args:
        image: [height, width, channels] uint8.
        shape: [2] int32 or two numbers, the new height and width.
        interpolation: "bilinear" or "bicubic" (Keys' kernel with a = -1/2), with antialiasing.

    Returns:
        [new height, new width, channels] uint8.
    """
    height, width = shape[0], shape[1]
    if interpolation == "bicubic":
        # PIL rounds and clips after each axis, width first. The bicubic kernel overshoots at edges, so that matters:
        # rounding only at the end differs by up to 7 grey levels.
        across = to_uint8(_with_rows(_transposed(image), width, kernel="keyscubic"))
        return to_uint8(_with_rows(_transposed(across), height, kernel="keyscubic"))
    down = _with_rows(image, height, kernel="triangle")
    return _rounded_mean(_transposed(_with_rows(_transposed(down), width, kernel="triangle")))


def _rounded_mean(image: tf.Tensor) -> tf.Tensor:
    """`to_uint8` for weighted means of uint8 values, which need no clipping."""
    return tf.cast(tf.round(image), tf.uint8)


def _transposed(image: tf.Tensor) -> tf.Tensor:
    return tf.transpose(image, [1, 0, 2])


def _with_rows(image: tf.Tensor, rows: int | tf.Tensor, *, kernel: str) -> tf.Tensor:
    """The image with another number of rows, antialiased; float32, not rounded.

    The operation can do both axes at once, but it does the second pixel by pixel with three channels at a time: several
    times slower than whole rows. So `resized` transposes the image in between; the numbers are the same.
    """
    before, columns, channels = tf.unstack(tf.shape(image))
    scale = tf.stack([tf.cast(rows, tf.float32) / tf.cast(before, tf.float32), 1.0])
    as_channels = tf.reshape(image, [1, before, 1, -1])  # makes each row one pixel with many channels
    result = tf.raw_ops.ScaleAndTranslate(
        images=as_channels, size=[rows, 1], scale=scale, translation=[0.0, 0.0], kernel_type=kernel, antialias=True
    )
    return tf.reshape(result, [rows, columns, channels])


def central_view(
    encoded: tf.Tensor, *, resize: int, size: int, channels: int, interpolation: str = "bilinear"
) -> tf.Tensor:
    """The view for evaluation: resize the shorter side, keeping the aspect ratio, then crop the central square.

    Rounding follows torchvision's `Resize` and `CenterCrop`.

    Args:
        encoded: scalar string, JPEG or PNG.
        resize: pixels of the shorter side; 0 = not resized.
        size: side of the result in pixels.
        interpolation: for the resizing, see `resized`.

    Returns:
        [size, size, channels] uint8. If the image is smaller than the square, running the graph raises an error.
    """
    image = decode(encoded, channels=channels)
    if resize:
        shape = tf.shape(image)[:2]
        image = resized(image, resize * shape // tf.reduce_min(shape), interpolation=interpolation)
    shape = tf.shape(image)[:2]
    message = f"an image is smaller than {size} pixels: set config.data.eval_resize to {size} or more"
    with tf.control_dependencies([tf.debugging.assert_greater_equal(shape, size, message=message)]):
        corner = tf.cast(tf.round(tf.cast(shape - size, tf.float32) / 2), tf.int32)  # rounds half to even, as Python
    return tf.slice(image, [corner[0], corner[1], 0], [size, size, -1])
