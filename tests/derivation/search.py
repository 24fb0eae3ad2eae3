"""Searches for counterexamples: random draws of many sizes, then L-BFGS and differential evolution from the best."""

import numpy as np
from derivation.algebra import split
from scipy import optimize

SIZES = (0.03, 0.3, 1.0, 3.0, 8.0)
LIMIT = 15.0  # a pair's logits differ by up to four times this: beyond, probabilities of exp(-60) meet rounding


def largest(function, size, *, draws=2000, polish=3, seed=0):
    """The largest value found of `function`, [points, size] -> [points], and where. A bound that is false is passed."""
    rng = np.random.default_rng([size, seed])
    points = rng.standard_normal((draws, size)) * rng.choice(SIZES, (draws, 1)) * rng.choice(SIZES, (draws, size))
    points = np.clip(points, -LIMIT, LIMIT)
    found = function(points)
    candidates = [points[index] for index in np.argsort(found)[-polish:]]
    steps = 1e-6 * np.eye(size)

    def slope(point):
        ahead, behind = np.split(function(np.concatenate([point + steps, point - steps])), 2)
        return -(ahead - behind) / 2e-6

    def negative(point):
        return -function(point[None])[0]

    limits = [(-LIMIT, LIMIT)] * size
    ends = [optimize.minimize(negative, start, jac=slope, bounds=limits, method="L-BFGS-B").x for start in candidates]
    spread = [(-6.0, 6.0)] * size
    settings = {
        "vectorized": True,
        "updating": "deferred",
        "maxiter": 30,
        "popsize": max(2, 40 // size),
        "polish": False,
    }
    ends.append(optimize.differential_evolution(lambda x: -function(x.T), spread, rng=seed, **settings).x)
    reached = np.concatenate([candidates, ends])
    values = function(reached)
    return float(values.max()), reached[values.argmax()]


def pair(points, *, temperature=1.0):
    """Teacher and student of each point, [points, 2·classes]: its logits, and the student's distance from them."""
    v, away = np.split(points, 2, axis=-1)
    return split(temperature * (v + away), temperature * v, np.zeros(len(points), np.int64), temperature)


def ratio(numerator, denominator, *, at_least=1e-7):
    """A quotient; 0 where the denominator is so small that its rounding counts."""
    counts = np.abs(denominator) > at_least
    return np.where(counts, numerator / np.where(counts, denominator, 1.0), 0.0)
