"""Power, equivalence and intervals, each against a simulation or a formula that does not come from statsmodels."""

import numpy as np
import pytest
from scipy import integrate, stats

from dgkd_jax.study import inference


def test_the_smallest_detectable_difference_is_found_in_four_of_five_trials():
    pairs, tests = 12, 6
    difference = inference.smallest_detectable(0.5, pairs, tests=tests)
    trials = np.random.default_rng(0).normal(difference, 0.5, (20_000, pairs))
    found = stats.ttest_1samp(trials, 0, axis=1).pvalue < inference.LEVEL / tests
    assert found.mean() == pytest.approx(inference.POWER, abs=0.01)  # 20,000 trials: ± 0.003
    assert inference.pairs_needed(0.5, 1.001 * difference, tests=tests) == pairs
    assert inference.pairs_needed(0.5, 0.99 * difference, tests=tests) == pairs + 1


@pytest.mark.parametrize("tests", [1, 6, 100])
def test_the_smallest_detectable_difference_has_80_percent_power_with_any_number_of_pairs(tests):
    """Power by integrating over the standard deviation that a sample may have, instead of by the noncentral t."""
    for pairs in (2, 3, 4, 11, 24, 48, 73, 102):
        freedom = pairs - 1
        effect = inference.smallest_detectable(1.0, pairs, tests=tests)
        deviation = np.linspace(0, stats.chi.isf(1e-14, freedom), 200_001)
        critical = stats.t.isf(inference.LEVEL / tests / 2, freedom) * deviation / freedom**0.5
        near, far = (
            integrate.simpson(tail * stats.chi.pdf(deviation, freedom), x=deviation)
            for tail in (stats.norm.sf(critical - effect * pairs**0.5), stats.norm.cdf(-critical - effect * pairs**0.5))
        )
        assert near == pytest.approx(inference.POWER, abs=1e-11), pairs
        assert far < 1e-6  # it is left out
        assert effect > 0
        assert inference.pairs_needed(1.0, 1.001 * effect, tests=tests) == pairs


def test_equivalence_is_the_interval_of_90_percent_within_the_bounds():
    random = np.random.default_rng(1)
    for mean in (0.0, 0.1, 0.29, 0.4):
        values = random.normal(mean, 0.3, 15)
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
        p = inference.equivalence(values, within=0.3)
        assert (p < 0.05) == (low > -0.3 and high < 0.3)


def test_teachers_that_differ_widen_the_pooled_interval_to_that_of_their_means():
    """Balanced groups: the mixed model's standard error is that of the mean of the groups' means."""
    random = np.random.default_rng(2)
    of_teacher = np.array([-1.0, 0.2, 1.4])
    values = (of_teacher[:, None] + random.normal(0, 0.1, (3, 8))).ravel()
    teachers = np.repeat([0, 1, 2], 8)
    found = inference.pooled(values, teachers)
    means = values.reshape(3, 8).mean(1)
    assert found.mean == pytest.approx(means.mean(), abs=1e-6)
    assert found.standard_error == pytest.approx(means.std(ddof=1) / 3**0.5, rel=1e-3)
    half = stats.t.ppf(0.975, 2) * found.standard_error
    assert found.interval == pytest.approx((found.mean - half, found.mean + half))
    alone = inference.pooled(values[:8], teachers[:8])
    assert alone.interval == pytest.approx(tuple(stats.ttest_1samp(values[:8], 0).confidence_interval(0.95)))


def test_the_bootstrap_counts_the_images_the_seeds_and_the_teachers():
    """Its variance is the sum of the parts, each known from how the errors were made."""
    random = np.random.default_rng(3)
    images, seeds = 4000, 9
    theirs = np.zeros((seeds, images), bool)
    # Each image is wrong for all seeds or none: 2,000 of 4,000 images at random, so only the images vary.
    ours = np.broadcast_to(random.permutation(images) < images // 2, (seeds, images))
    found = inference.with_test_images(ours, theirs, [0] * seeds, resamples=1000)
    assert found.mean == pytest.approx(-50)
    assert found.standard_error == pytest.approx(100 * 0.5 / images**0.5, rel=0.1)
    # Each seed is wrong everywhere or nowhere: only the seeds vary.
    ours = np.zeros((seeds, images), bool)
    ours[::2] = True
    found = inference.with_test_images(ours, theirs, [0] * seeds, resamples=1000)
    share = 5 / 9
    assert found.standard_error == pytest.approx(100 * (share * (1 - share) / seeds) ** 0.5, rel=0.1)
    # Each teacher's students are wrong everywhere or nowhere: only the three teachers vary.
    ours = np.repeat([[True], [True], [False]], 3, axis=0) & np.ones((1, images), bool)
    found = inference.with_test_images(ours, theirs, np.repeat([0, 1, 2], 3), resamples=1000)
    assert found.standard_error == pytest.approx(100 * (2 / 9 / 3) ** 0.5, rel=0.1)
