"""What a study can and cannot say of a difference: power, equivalence, pooled estimates, and intervals that count the
test images and the teachers. All of paired differences, in points of accuracy.

Needs statsmodels: pip install -e '.[study]'.
"""

import importlib
import math
import types
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from dgkd_jax.errors import BadInput

LEVEL, POWER = 0.05, 0.8


class Estimate(NamedTuple):
    """A mean difference, its standard error and its 95 % interval."""

    mean: float
    standard_error: float
    interval: tuple[float, float]


def smallest_detectable(deviation: float, pairs: int, *, tests: int = 1) -> float:
    """The true difference that the paired t-test finds with 80 % power at the first step of Holm's procedure.

    Args:
        deviation: standard deviation of the paired differences.
        pairs: their number, 2 or more.
        tests: how many tests Holm's procedure corrects for.
    """
    upper = 1.0
    while _power(upper, pairs, tests) < POWER:
        upper *= 2
    return deviation * optimize.brentq(lambda effect: _power(effect, pairs, tests) - POWER, 0.0, upper)


def pairs_needed(deviation: float, difference: float, *, tests: int = 1) -> int:
    """The number of pairs with which that test finds a true `difference` with 80 % power."""
    effect = abs(difference) / deviation
    pairs = 2
    while _power(effect, pairs, tests) < POWER:
        pairs += 1
    return pairs


def _power(effect: float, pairs: int, tests: int) -> float:
    """The power of the two-sided test for a mean of `effect` standard deviations, at LEVEL / tests.

    Of the noncentral t distribution's two tails it counts the effect's own. The other one is below 1e-6 at a power of
    80 %, and scipy's is NaN at times. So is statsmodels', whose solver then returns the value that it started from.
    """
    critical = stats.t.isf(LEVEL / tests / 2, pairs - 1)
    return float(stats.nct.sf(critical, pairs - 1, effect * math.sqrt(pairs)))


def equivalence(differences: Sequence[float], *, within: float) -> float:
    """The p-value of two one-sided t-tests (Schuirmann 1987): small if the true mean lies within ± `within`.

    Args:
        differences: two or more, not all equal.
        within: greater than 0.
    """
    described = _statsmodels("stats.weightstats").DescrStatsW(np.asarray(differences, np.float64))
    return float(described.ttost_mean(-within, within)[0])


def pooled(differences: Sequence[float], groups: Sequence[object]) -> Estimate:
    """The mean difference where each group has its own, drawn at random: a mixed model with a random intercept.

    The interval is of Student's t with as many degrees of freedom as there are groups less one, since a few groups
    say little of how groups differ.

    Args:
        differences: two or more.
        groups: of each difference, for example its teacher; with one group alone its spread cannot be known, and the
            estimate is the plain mean.
    """
    values = np.asarray(differences, np.float64)
    count = len(set(groups))
    if count < 2 or count == len(values) or np.ptp(values) == 0:
        return _estimate(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5), len(values) - 1)
    models = _statsmodels("regression.mixed_linear_model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance of 0 between groups is an allowed answer
        found = models.MixedLM(values, np.ones((len(values), 1)), groups=np.asarray(groups)).fit(reml=True)
    error = float(found.bse_fe[0])
    if not math.isfinite(error):
        raise ArithmeticError(f"the mixed model of {len(values)} differences in {count} groups has no standard error")
    return _estimate(float(found.fe_params[0]), error, count - 1)


def with_test_images(
    ours: np.ndarray, theirs: np.ndarray, teachers: Sequence[object], *, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """The mean difference of two arms with an interval from the bootstrap over teachers, seeds and test images.

    Each resample draws teachers, of each teacher its seeds, and images, all with replacement; the same for both arms.

    Args:
        ours, theirs: bool `[seeds, images]`: the examples that each student got wrong; row i of both has the same seed.
        teachers: of each row.
    """
    gained = 100.0 * (theirs.astype(np.float32) - ours.astype(np.float32))
    random = np.random.default_rng(seed)
    seeds, images = gained.shape
    rows_of = [np.flatnonzero(np.asarray(teachers) == teacher) for teacher in dict.fromkeys(teachers)]
    means = np.empty(resamples)
    for number in range(resamples):
        drawn = [rows_of[index] for index in random.integers(0, len(rows_of), len(rows_of))]
        rows = np.concatenate([random.choice(rows, len(rows)) for rows in drawn])
        weights = np.bincount(random.integers(0, images, images), minlength=images).astype(np.float32)
        means[number] = (np.bincount(rows, minlength=seeds) / len(rows)) @ (gained @ weights) / images
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(gained.mean()), float(means.std(ddof=1)), (float(low), float(high)))


def _estimate(mean: float, error: float, degrees: int) -> Estimate:
    half = float(stats.t.ppf(0.975, degrees)) * error
    return Estimate(mean, error, (mean - half, mean + half))


def _statsmodels(module: str) -> types.ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pandas to statsmodels
            return importlib.import_module(f"statsmodels.{module}")
    except ImportError as error:
        raise BadInput("the results of a study need statsmodels: pip install -e '.[study]'") from error
