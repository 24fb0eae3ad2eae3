"""Corruptions against PIL, SciPy, colorsys and plain NumPy, and against what each must conserve."""

import colorsys
import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image
from scipy import ndimage, stats

from dgkd_jax.evaluate import corruptions
from dgkd_jax.runs import sharding

SIDES = (28, 32, 64)  # with 224, an image for each set of constants; 28 takes those of 32
ON_DEVICE = [name for name in corruptions.CORRUPTIONS if name not in corruptions.ON_HOST]
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")


def pictures(count=4, side=32, channels=3, seed=0):
    """Smooth shapes with edges, so that blur and compression have something to do; black and white are among them."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-80, 335, (count, 5, 5, channels))
    cells = np.arange(side) * 5 // side
    images = coarse[:, cells[:, None], cells] + rng.normal(0, 6, (count, side, side, channels))
    return images.clip(0, 255).astype(np.uint8)


def corrupted(name, images, severity, seed=0):
    if name in corruptions.ON_HOST:
        return corruptions.jpeg_compression(images, severity=severity)
    indices = np.arange(len(images), dtype=np.int32)
    return np.asarray(corruptions.corrupt(images, indices, name=name, severity=severity, seed=seed))


def numbers(count):
    return np.arange(count, dtype=np.int32)


def within_rounding(ours, exact, *, slack=0.01):
    """Ours is the integer nearest to `exact`; `slack` for float32 where `exact` lies half-way."""
    assert ours.dtype == np.uint8
    np.testing.assert_allclose(ours, np.clip(exact, 0, 255), rtol=0, atol=0.5 + slack)


# -- against other implementations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
def test_gaussian_blur_is_scipys(side, severity):
    images = pictures(side=side)
    sigma = corruptions.constant("gaussian_blur", severity, (side, side))
    exact = ndimage.gaussian_filter(images.astype(float), (0, sigma, sigma, 0), mode="nearest", truncate=4.0)
    within_rounding(corrupted("gaussian_blur", images, severity), exact)


@pytest.mark.parametrize("side", [32, 64, 128])
@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
def test_defocus_blur_is_scipys_correlation_with_the_disk(side, severity):
    images = pictures(count=2, side=side)
    kernel = corruptions.disk(*corruptions.constant("defocus_blur", severity, (side, side)))
    exact = ndimage.correlate(images.astype(float), kernel[None, :, :, None].astype(float), mode="mirror")
    within_rounding(corrupted("defocus_blur", images, severity), exact)


@pytest.mark.parametrize(("radius", "smoothing"), [(0.3, 0.4), (1.5, 0.1), (3, 0.1), (8, 0.5), (10, 0.5)])
def test_a_disk_is_symmetric_and_of_the_right_area(radius, smoothing):
    kernel = corruptions.disk(radius, smoothing)
    assert kernel.sum() == pytest.approx(1, abs=1e-6)  # float32
    for other in (kernel.T, kernel[::-1], kernel[:, ::-1]):
        np.testing.assert_allclose(kernel, other, atol=1e-8)  # float32 of numbers below 1
    inside = sum(i * i + j * j <= radius**2 for i, j in itertools.product(range(-11, 12), repeat=2))
    gaussian = np.exp(-0.5 * (np.arange(-1, 2) / smoothing) ** 2)
    if inside == 1:  # the smoothing alone
        np.testing.assert_allclose(kernel, np.outer(gaussian, gaussian) / gaussian.sum() ** 2, atol=1e-7)
    else:  # the smoothing reaches the edge only
        assert kernel[len(kernel) // 2, len(kernel) // 2] == pytest.approx(1 / inside, rel=1e-6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
def test_pixelate_is_pils_box_filter(side, severity):
    images = pictures(side=side)
    small = int(side * corruptions.constant("pixelate", severity, (side, side)))
    exact = [
        np.asarray(Image.fromarray(image).resize((small, small), Image.BOX).resize((side, side), Image.BOX))
        for image in images
    ]
    # PIL computes in fixed point of 22 bits, so half-way cases may fall to either side.
    difference = np.abs(corrupted("pixelate", images, severity).astype(int) - np.stack(exact))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
def test_jpeg_compression_is_pils(channels, severity):
    images = pictures(channels=channels)
    for image, ours in zip(images, corrupted("jpeg_compression", images, severity), strict=True):
        file = io.BytesIO()
        quality = {1: 80, 2: 65, 3: 58, 4: 50, 5: 40}[severity]
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
        np.testing.assert_array_equal(ours, np.asarray(Image.open(file)).reshape(image.shape))


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_brightness_raises_the_value_of_hsv(severity):
    images = pictures(count=1, side=32)
    images[0, 0, 0] = 0  # black has no hue
    amount = {1: 0.05, 3: 0.15, 5: 0.3}[severity]

    def brighter(pixel):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, min(value + amount, 1)))

    exact = np.apply_along_axis(brighter, -1, images.astype(float))
    within_rounding(corrupted("brightness", images, severity), exact)


def test_brightness_of_grey_images_is_an_addition():
    images = pictures(channels=1)
    within_rounding(corrupted("brightness", images, 2), images + 25.5)


@pytest.mark.parametrize("severity", corruptions.SEVERITIES)
def test_contrast_shrinks_the_distance_from_the_mean(severity):
    images = pictures()
    mean = images.mean((1, 2), keepdims=True)
    factor = [0.75, 0.5, 0.4, 0.3, 0.15][severity - 1]
    within_rounding(corrupted("contrast", images, severity), mean + factor * (images - mean))


# -- noise: moments and shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", [1, 5])
def test_gaussian_noise_has_its_mean_and_deviation(severity):
    images = np.full((16, 64, 64, 3), 128, np.uint8)  # 196,608 values, far from both ends
    noise = corrupted("gaussian_noise", images, severity).astype(float) - 128
    sigma = 255 * corruptions.constant("gaussian_noise", severity, images.shape[1:])
    error = sigma / np.sqrt(noise.size)
    assert abs(noise.mean()) < 5 * error
    # Of the deviation; 1/12 is the variance of rounding.
    assert noise.std() == pytest.approx(np.sqrt(sigma**2 + 1 / 12), abs=5 * error)


@pytest.mark.parametrize("severity", [1, 5])
def test_shot_noise_is_poissons(severity):
    """By SciPy's inverse of the distribution function, from the same uniform numbers."""
    images = np.arange(256, dtype=np.uint8).repeat(12).reshape(3, 32, 32, 1)
    photons = corruptions.constant("shot_noise", severity, images.shape[1:])
    keys = [jax.random.fold_in(jax.random.key(0), index) for index in range(3)]
    uniforms = np.stack([np.asarray(jax.random.uniform(key, (32, 32, 1), jnp.float32)) for key in keys])
    counts = stats.poisson.ppf(uniforms.astype(float), images / 255 * photons).clip(0, photons)
    ours = corrupted("shot_noise", images, severity)
    exact = np.round(np.float32(255) * counts.astype(np.float32) / np.float32(photons))
    # The table is rounded to float32: a uniform number within 6e-8 of a step may fall to its other side.
    assert (ours != exact).mean() < 0.002


@pytest.mark.parametrize("severity", [1, 5])
def test_impulse_noise_changes_its_share_to_black_and_white_and_nothing_else(severity):
    images = np.full((16, 64, 64, 3), 128, np.uint8)
    noised = corrupted("impulse_noise", images, severity)
    share = corruptions.constant("impulse_noise", severity, images.shape[1:])
    assert set(np.unique(noised)) == {0, 128, 255}
    for colour in (0, 255):
        tolerance = 5 * np.sqrt(share / 2 / noised.size)  # five standard errors
        assert (noised == colour).mean() == pytest.approx(share / 2, abs=tolerance)


@pytest.mark.parametrize("name", NOISES)
def test_channels_and_images_get_different_noise(name):
    images = np.full((2, 32, 32, 3), 128, np.uint8)
    noised = corrupted(name, images, 5)
    assert not np.array_equal(noised[0], noised[1])
    assert not np.array_equal(noised[0, ..., 0], noised[0, ..., 1])
    assert not np.array_equal(noised, corrupted(name, images, 5, seed=1))


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
def test_severity_takes_an_image_further_away(name):
    images = pictures()
    distances = [
        np.square(corrupted(name, images, severity).astype(float) - images).mean()
        for severity in corruptions.SEVERITIES
    ]
    assert 0 < distances[0] < distances[-1]
    if name != "pixelate":  # in between, its distance depends on how the new pixels fall on the old ones
        assert distances == sorted(distances)


def test_constants_go_by_the_side():
    assert [corruptions.constant("shot_noise", 1, (side, side, 3)) for side in (28, 32, 64, 96, 224, 299)] == [
        500, 500, 250, 250, 60, 60,
    ]  # fmt: skip


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_black_and_white_images_are_no_problem(name, channels):
    for value in (0, 255):
        images = np.full((2, 28, 28, channels), value, np.uint8)
        changed = corrupted(name, images, 5)
        assert (changed.dtype, changed.shape) == (np.uint8, images.shape)
        if name not in (*NOISES, "brightness"):  # JPEG's coefficient of the mean is a multiple of a number
            np.testing.assert_allclose(changed, images, atol=name == "jpeg_compression")


# -- patches ---------------------------------------------------------------------------------------------------------


def patches_of(image, side):
    rows, columns = (size // side for size in image.shape[:2])
    return [
        image[r * side : (r + 1) * side, c * side : (c + 1) * side].tobytes()
        for r in range(rows)
        for c in range(columns)
    ]


@pytest.mark.parametrize("side", [1, 4, 8, 16])
def test_a_scramble_is_a_permutation_of_the_patches(side):
    images = pictures(count=6, side=32)
    scrambled = np.asarray(corruptions.scramble_patches(images, numbers(6), side=side))
    for before, after in zip(images, scrambled, strict=True):
        assert sorted(patches_of(before, side)) == sorted(patches_of(after, side))
    assert not np.array_equal(images, scrambled)


def test_each_image_is_scrambled_in_its_own_order_and_can_be_restored():
    places = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(3, 0)  # every pixel says where it was
    scrambled = np.asarray(corruptions.scramble_patches(places, numbers(3), side=1)).reshape(3, 64)
    assert len({order.tobytes() for order in scrambled}) == 3
    images = pictures(count=3, side=8).reshape(3, 64, 3)
    moved = np.asarray(corruptions.scramble_patches(images.reshape(3, 8, 8, 3), numbers(3), side=1)).reshape(3, 64, 3)
    for image, order, result in zip(images, scrambled, moved, strict=True):
        restored = np.empty_like(image)
        restored[order] = result
        np.testing.assert_array_equal(restored, image)


def test_patch_sides_divide_both_sides_of_the_image():
    assert corruptions.patch_sides((28, 28, 1)) == (1, 2, 4, 7, 14)
    assert corruptions.patch_sides((12, 8, 3)) == (1, 2, 4)
    assert corruptions.patch_sides((16, 8, 3)) == (1, 2, 4, 8)


@pytest.mark.parametrize("wrapped", [False, True])
def test_noise_stays_in_its_patch_and_has_its_deviation(wrapped):
    images = np.full((64, 224, 224, 1), 128, np.uint8)
    noised = np.asarray(corruptions.noise_patch(images, numbers(64), side=56, wrapped=wrapped)).astype(float)
    inside = np.zeros((224, 224), bool)
    inside[50:106, 50:106] = True  # the repository's corner
    np.testing.assert_array_equal(noised[:, ~inside], 128)
    noise = noised[:, inside] - 128
    assert abs(noise.mean()) < 5 * 25 / np.sqrt(noise.size)
    # Rounding adds 1/12 to the variance; truncation towards 0 takes about 2·E|x|·½ of it.
    variance = 625 + 1 / 12 if not wrapped else 625 - 25 * np.sqrt(2 / np.pi) + 1 / 3
    assert noise.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / noise.size))


def test_clipped_noise_does_not_wrap_and_wrapped_noise_is_the_repositorys():
    """Of black and white pixels: half the noise is cut off, or turns around."""
    images = np.zeros((32, 32, 32, 1), np.uint8)
    images[16:] = 255
    patch = (slice(None), slice(7, 15), slice(7, 15))  # 50/224 of 32
    clipped = np.asarray(corruptions.noise_patch(images, numbers(32), side=8))[patch].astype(int)
    assert clipped[:16].max() < 150  # six deviations
    assert clipped[16:].min() > 105
    # Of a Gaussian of deviation 25 cut off at 0 the mean is 25/√(2π).
    assert clipped[:16].mean() == pytest.approx(25 / np.sqrt(2 * np.pi), abs=5 * 15 / np.sqrt(16 * 64))

    wrapped = np.asarray(corruptions.noise_patch(images, numbers(32), side=8, wrapped=True))[patch]
    keys = [jax.random.fold_in(jax.random.key(0), index) for index in range(32)]
    noise = np.stack([25 * np.asarray(jax.random.normal(key, (8, 8, 1))) for key in keys])
    as_there = noise.astype(np.int64).astype(np.uint8)  # the cast of the repository, without its undefined case
    np.testing.assert_array_equal(wrapped, np.clip(images[patch] + as_there, 0, 255))
    assert (wrapped[:16] > 128).mean() == pytest.approx(0.5, abs=0.1)


def test_the_largest_noise_patch_fits():
    assert corruptions.largest_noise_patch((224, 224, 3)) == 174
    images = pictures(count=1, side=28)
    side = corruptions.largest_noise_patch((28, 28, 3))
    assert side == 22
    noised = np.asarray(corruptions.noise_patch(images, numbers(1), side=side))
    assert (noised[0, -1, 6:] != images[0, -1, 6:]).any()


# -- the same for any batch and any devices ---------------------------------------------------------------------------

PLACED = [
    *((name, lambda images, numbers, name=name: corruptions.corrupt(images, numbers, name=name, severity=4))
      for name in ON_DEVICE),
    ("noise_patch", lambda images, numbers: corruptions.noise_patch(images, numbers, side=9)),
    ("wrapped", lambda images, numbers: corruptions.noise_patch(images, numbers, side=9, wrapped=True)),
    ("scramble", lambda images, numbers: corruptions.scramble_patches(images, numbers, side=4)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function"), PLACED, ids=[name for name, _ in PLACED])
def test_an_image_does_not_depend_on_its_batch_or_device(name, function):
    images = pictures(count=16, side=28)
    whole = np.asarray(function(images, numbers(16)))
    in_pieces = [function(images[i : i + 4], numbers(16)[i : i + 4]) for i in range(0, 16, 4)]
    np.testing.assert_array_equal(np.concatenate(in_pieces), whole)
    shuffled = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(function(images[shuffled], numbers(16)[shuffled]), whole[shuffled])

    mesh = Mesh(np.array(jax.devices()).reshape(8, 1), ("data", "fsdp"))
    batch = sharding.to_global({"image": images, "index": numbers(16)}, mesh)
    on_eight = function(batch["image"], batch["index"])
    assert len(on_eight.sharding.device_set) == 8
    np.testing.assert_array_equal(np.asarray(on_eight), whole)
    assert isinstance(on_eight, jnp.ndarray)
