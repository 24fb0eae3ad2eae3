"""mixup and CutMix: torchvision's pixels for given parameters, the parameters' distributions, and the labels."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded_augment import recorded
from scipy import stats

from dgkd_jax.data import mixing


def drawn(count=4000, *, height=16, width=18, **alphas):
    """Mixes of this many steps."""
    one = jax.vmap(
        lambda key: mixing.draw(key, **{"mixup_alpha": 0.0, "cutmix_alpha": 0.0} | alphas, height=height, width=width)
    )
    return jax.tree.map(np.asarray, jax.jit(one)(jax.random.split(jax.random.key(3), count)))


def test_mixup_has_torchvisions_pixels_rounded_and_its_labels():
    given = recorded()
    weight = jnp.asarray(given["mixup_lambda"])
    mix = mixing.Mix(jnp.full((16, 18), weight), weight)
    np.testing.assert_array_equal(mixing.images(given["images"], mix), np.round(given["mixup_images"]))
    found = mixing.labels(given["labels"], mix, num_classes=4)
    np.testing.assert_array_equal(found, given["mixup_labels"])


def test_cutmix_has_torchvisions_pixels_and_labels():
    given = recorded()
    mix = mixing.box(given["cutmix_box"], height=16, width=18)
    np.testing.assert_array_equal(mixing.images(given["images"], mix), given["cutmix_images"])
    found = mixing.labels(given["labels"], mix, num_classes=4)
    np.testing.assert_allclose(found, given["cutmix_labels"], rtol=0, atol=1e-7)  # float32 rounds 1 - share


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lambda_has_the_beta_distribution(alpha):
    values = mixing.lambdas(alpha).astype(np.float64)
    law = stats.beta(alpha, alpha)
    # 4096 midpoints in probability: mean and variance up to what lies beyond the outermost ones.
    np.testing.assert_allclose([values.mean(), values.var()], [0.5, 1 / (4 * (2 * alpha + 1))], atol=1e-5)
    np.testing.assert_allclose(law.cdf(values), (np.arange(4096) + 0.5) / 4096, atol=2**-12 if alpha >= 1 else 0.06)
    assert (values * 2**16 == np.round(values * 2**16)).all()


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1e6, 1e300])
def test_lambda_is_a_share_for_extreme_alphas(alpha):
    values = mixing.lambdas(alpha)
    assert ((values >= 0) & (values <= 1)).all()
    np.testing.assert_allclose(values.mean(), 0.5, atol=1e-4)


def test_each_lambda_is_drawn_equally_often():
    """Quartiles and sixteenths of Beta(0.2, 0.2) among 4,000 steps."""
    ranks = np.searchsorted(np.unique(mixing.lambdas(1.0)), drawn(mixup_alpha=1.0).weight)
    assert stats.chisquare(np.bincount(ranks * 16 // 4096, minlength=16)).pvalue > 0.01


def test_cutmix_takes_boxes_as_large_and_where_their_definition_says():
    """Against every λ and every centre, by their definition in Python."""
    height, width = 8, 6
    kept, shares = [], np.zeros((height, width))
    for weight in mixing.lambdas(1.0)[::16].astype(float):
        half = 0.5 * np.sqrt(1 - weight)
        tall, wide = int(half * height), int(half * width)
        for row, column in itertools.product(range(height), range(width)):
            own = np.ones((height, width))
            own[max(row - tall, 0) : row + tall, max(column - wide, 0) : column + wide] = 0
            kept.append(own.sum())
            shares += own
    found = drawn(cutmix_alpha=1.0, height=height, width=width)
    pixels = np.round(found.weight * height * width)  # whole numbers
    assert abs(pixels.mean() - np.mean(kept)) < 3 * np.std(kept) / np.sqrt(len(pixels))
    assert stats.ks_2samp(pixels, kept).pvalue > 0.01
    np.testing.assert_allclose(found.shares.mean(axis=0), shares / len(kept), atol=4 * 0.5 / np.sqrt(len(pixels)))


def test_the_labels_weight_is_the_share_of_the_pixels():
    for alphas in ({"mixup_alpha": 0.2}, {"cutmix_alpha": 1.0}):
        mix = drawn(500, **alphas)
        np.testing.assert_allclose(mix.weight, mix.shares.mean(axis=(1, 2), dtype=np.float64), rtol=1e-6, atol=1e-7)


def test_mixed_labels_sum_to_one_and_are_the_own_and_the_partners():
    labels = np.array([3, 1, 1, 0], np.int32)
    for weight in drawn(200, mixup_alpha=0.2, cutmix_alpha=1.0).weight:
        found = np.asarray(mixing.labels(labels, mixing.Mix(None, weight), num_classes=5))
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-7)
        np.testing.assert_array_equal(found[1], [0, weight, 0, np.float32(1) - weight, 0])
        np.testing.assert_allclose(found[2], [0, 1, 0, 0, 0], rtol=1e-7)  # two images of one class


def test_with_both_a_fair_coin_decides_for_each_batch():
    is_mixup = (drawn(mixup_alpha=4.0, cutmix_alpha=1.0).shares % 1 > 0).any(axis=(1, 2))
    assert stats.binomtest(int(is_mixup.sum()), len(is_mixup)).pvalue > 0.01
