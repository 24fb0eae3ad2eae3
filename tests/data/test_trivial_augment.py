"""TrivialAugment: torchvision's pixels for given operations, and a uniform choice."""

import jax
import numpy as np
import pytest
from recorded_augment import assert_as_torchvision, recorded, trivially_augmented
from scipy import stats

from dgkd_jax.data import trivial_augment
from dgkd_jax.data.trivial_augment import LEVELS, OPERATIONS


@pytest.fixture(scope="module")
def compared():
    """Operation, level, ours and torchvision's, for each recorded choice."""
    given = recorded()
    found = trivially_augmented(given["images"][0], *given["choices"].T)
    return [
        (OPERATIONS[number], level, ours, theirs)
        for (number, level, _), ours, theirs in zip(given["choices"], found, given["augmented"], strict=True)
    ]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_gives_torchvisions_pixels(compared, operation):
    of_it = [rest for name, *rest in compared if name == operation]
    assert len(of_it) >= 1
    for level, ours, theirs in of_it:
        assert_as_torchvision(ours, theirs, operation, level)


def test_all_but_the_identity_change_the_image(compared):
    changed = {name for name, _, ours, _ in compared if (ours != recorded()["images"][0]).any()}
    assert changed == set(OPERATIONS) - {"identity"}


def test_a_grey_image_stays_grey_and_has_no_colour_to_change():
    image = recorded()["images"][0]
    one = image[..., :1]
    number = np.arange(len(OPERATIONS))
    grey = trivially_augmented(one, number, np.full(len(number), 20), number % 2 == 0)
    assert grey.shape == (len(OPERATIONS), *one.shape)
    np.testing.assert_array_equal(grey[OPERATIONS.index("color")], one)
    # Each channel by itself, where the operation is not of all channels together.
    three = trivially_augmented(image, number, np.full(len(number), 20), number % 2 == 0)[..., :1]
    for name in set(OPERATIONS) - {"color", "contrast"}:
        np.testing.assert_array_equal(grey[OPERATIONS.index(name)], three[OPERATIONS.index(name)])


@pytest.mark.parametrize("level", [0, 30])
def test_flat_images_are_not_damaged(level):
    """An image of one value has no range to spread and nothing to equalise."""
    number = [OPERATIONS.index(name) for name in ("autocontrast", "equalize", "sharpness")]
    flat = np.full((5, 7, 3), 93, np.uint8)
    for found in trivially_augmented(flat, number, [level] * 3, [False] * 3):
        np.testing.assert_array_equal(found, flat)


def test_operations_levels_and_directions_are_uniform():
    choice = jax.jit(lambda key: trivial_augment.draw(key, batch=20_000))(jax.random.key(5))
    for values, count in ((choice.operation, len(OPERATIONS)), (choice.level, LEVELS), (choice.negative, 2)):
        assert stats.chisquare(np.bincount(np.asarray(values).astype(int), minlength=count)).pvalue > 0.01
    pairs = np.asarray(choice.operation) * LEVELS + np.asarray(choice.level)  # and independent of each other
    assert stats.chisquare(np.bincount(pairs, minlength=len(OPERATIONS) * LEVELS)).pvalue > 0.01
