"""The numpy views are TensorFlow's: the same windows for the same numbers, and pixels as PIL makes them."""

import numpy as np
import pytest
import tensorflow as tf

from dgkd_jax.data import augment, on_device, views

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("mirror", [False, True])
def test_pad_crop_cuts_what_the_pipeline_cuts(mirror):
    image = RANDOM.integers(0, 256, (16, 16, 3), np.uint8)
    for uniforms in RANDOM.random((20, 3)).astype(np.float32):
        expected = augment.pad_crop(tf.constant(image), tf.constant(uniforms), size=16, mirror=mirror)
        window = on_device.windows(uniforms, size=16, mirror=mirror)
        np.testing.assert_array_equal(views.pad_crop(image, window), expected)


@pytest.mark.parametrize("shape", [(40, 50), (50, 40), (300, 20), (20, 300), (64, 64)])
def test_random_windows_are_those_of_the_pipeline(shape):
    for uniforms in RANDOM.random((30, views.RANDOM_RESIZED_CROP_UNIFORMS)).astype(np.float32):
        found = views.random_window(*shape, uniforms[:-1])
        expected = augment.random_window(tf.constant(shape[0]), tf.constant(shape[1]), tf.constant(uniforms[:-1]))
        # float32 there: a side may round the other way.
        assert np.abs(np.array(found) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_central_view_is_the_pipelines_to_two_grey_levels(interpolation):
    image = RANDOM.integers(0, 256, (37, 52, 3), np.uint8)
    encoded = tf.io.encode_png(image)
    expected = augment.central_view(encoded, resize=24, size=20, channels=3, interpolation=interpolation)
    found = views.central_view(image, resize=24, shape=(20, 20, 3), interpolation=interpolation)
    assert np.abs(found.astype(int) - expected.numpy()).max() <= 2
