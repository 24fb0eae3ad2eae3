"""Means and paired tests against scipy, against tables, and by hand."""

import math

import pytest
from scipy import stats

from dgkd_jax.report import significance

DKD = [0.951, 0.957, 0.962, 0.949, 0.960]
DGKD = [0.955, 0.958, 0.961, 0.956, 0.964]


def test_mean_and_sample_standard_deviation():
    mean, deviation = significance.mean_and_deviation([1.0, 2.0, 6.0])
    assert mean == pytest.approx(3.0, abs=1e-15)
    assert deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2), rel=1e-15)  # n − 1


def test_one_value_has_no_deviation_and_none_is_an_error():
    assert significance.mean_and_deviation([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="no values"):
        significance.mean_and_deviation([])


def test_the_paired_test_is_scipys():
    found = significance.paired(DGKD, DKD)
    expected = stats.ttest_1samp([a - b for a, b in zip(DGKD, DKD, strict=True)], 0.0)  # another way to the same test
    assert found.pairs == 5
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)  # rounding of the differences alone
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)
    assert found.mean / found.standard_error == pytest.approx(expected.statistic, rel=1e-9)


def test_the_paired_test_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t = 2√3 with 2 degrees of freedom, whose tail is closed."""
    found = significance.paired([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    t = 2 * math.sqrt(3)
    assert found.standard_error == pytest.approx(1 / math.sqrt(3), rel=1e-12)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2), rel=1e-12)


def test_the_order_of_the_groups_is_the_sign():
    assert significance.paired(DGKD, DKD).mean == -significance.paired(DKD, DGKD).mean > 0


@pytest.mark.parametrize("pairs", [1, 2])
def test_fewer_than_three_pairs_are_not_tested(pairs):
    found = significance.paired(DGKD[:pairs], DKD[:pairs])
    assert (found.p, found.interval, found.reason) == (None, None, "n too small")


def test_equal_differences_give_no_certainty():
    """0.3 − 0.2 and 0.2 − 0.1 differ in the last bit, of which a t-test makes p < 1e-30."""
    found = significance.paired([0.3, 0.2, 0.4], [0.2, 0.1, 0.3])
    assert (found.p, found.reason) == (None, "all differences equal")


def test_samples_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="3 and 2 values"):
        significance.paired([1.0, 2.0, 3.0], [1.0, 2.0])


def test_holm_by_hand():
    """0.01·4, then 0.02·3 = 0.06, then max(0.06, 0.03·2), then max(0.06, 0.5)."""
    assert significance.holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06], rel=1e-12)
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []
