"""Means over seeds, and tests of whether two groups of runs differ: paired by seed, with Holm's correction."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

MIN_PAIRS = 3  # with two, the test has one degree of freedom and almost no power


class Comparison(NamedTuple):
    """A comparison of paired values: first minus second.

    Attributes:
        pairs: number of them.
        mean: of the differences, in the values' unit.
        standard_error: of the mean; None with fewer than 2 pairs.
        interval: 95 % confidence interval of the mean; None where there is no test.
        p: two-sided p-value of the paired t-test; None where there is no test.
        reason: why there is no test; '' where there is one.
    """

    pairs: int
    mean: float
    standard_error: float | None
    interval: tuple[float, float] | None
    p: float | None
    reason: str


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n − 1), None for a single value.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("the mean of no values")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """The paired t-test (Student 1908) of two samples of equal length; their entries i form a pair.

    Raises:
        ValueError: the lengths differ, or are 0.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} values make no pairs")
    differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    mean, deviation = mean_and_deviation(differences)
    count = len(differences)
    error = None if deviation is None else deviation / count**0.5
    if count < MIN_PAIRS:
        return Comparison(count, mean, error, None, None, "n too small")
    # If all differences are equal, their deviation is rounding error, and the test would give p = 0.
    if deviation <= 1e-12 * max(np.abs(first).max(), np.abs(second).max()):
        return Comparison(count, mean, 0.0, None, None, "all differences equal")
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(0.95)
    return Comparison(count, mean, error, (float(interval.low), float(interval.high)), float(test.pvalue), "")


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the given order (Holm, Scandinavian Journal of Statistics 1979).

    The adjusted value of the i-th smallest of m is max over j ≤ i of min(1, (m − j + 1)·p_j).
    """
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * factors))
    result = np.empty(len(p_values))
    result[order] = adjusted
    return result.tolist()
