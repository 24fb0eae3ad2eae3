"""Random erasing: torchvision's pixels for given boxes, and boxes distributed as its."""

import math

import jax
import numpy as np
import pytest
from recorded_augment import recorded
from scipy import stats

from dgkd_jax.data import erasing


def test_boxes_are_painted_as_torchvision_does_it():
    given = recorded()
    fill = tuple(int(level) for level in given["erasing_fill"])
    np.testing.assert_array_equal(erasing.apply(given["images"], given["erasing_boxes"], fill=fill), given["erased"])


def by_definition(count, *, height, width):
    """Height, width, top and left, as torchvision draws them, with real numbers."""
    random, boxes = np.random.default_rng(1), []
    while len(boxes) < count:
        area = height * width * random.uniform(0.02, 0.33)
        ratio = math.exp(random.uniform(math.log(0.3), math.log(3.3)))
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if tall < height and wide < width:
            boxes.append((tall, wide, random.integers(height - tall + 1), random.integers(width - wide + 1)))
    return np.array(boxes).T


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 96)])
def test_boxes_have_torchvisions_distribution(height, width):
    draw = jax.jit(lambda key: erasing.draw(key, batch=8000, probability=1.0, height=height, width=width))
    top, left, bottom, right = np.asarray(draw(jax.random.key(7))).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (bottom <= height).all()
    assert (right <= width).all()
    tall, wide, first_row, first_column = by_definition(8000, height=height, width=width)
    for found, expected in (
        ((bottom - top) * (right - left), tall * wide),
        (bottom - top, tall),
        (right - left, wide),
        (top, first_row),
        (left, first_column),
    ):
        assert stats.ks_2samp(found, expected).pvalue > 0.01


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_as_many_images_are_erased_as_the_probability_says(probability):
    draw = jax.jit(lambda key: erasing.draw(key, batch=5000, probability=probability, height=32, width=32))
    erased = int(np.asarray(draw(jax.random.key(9))).any(axis=1).sum())
    assert (
        stats.binomtest(erased, 5000, probability).pvalue > 0.01
        if 0 < probability < 1
        else erased == 5000 * probability
    )
