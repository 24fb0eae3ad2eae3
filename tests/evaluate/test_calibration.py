"""Calibration: by hand, and against a plain loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from dgkd_jax.evaluate import calibration, metrics


def logits_of(confidences):
    """Two classes; the top one is 0, with these probabilities."""
    confidences = np.asarray(confidences)
    return jnp.asarray(np.stack([np.log(confidences), np.log1p(-confidences)], -1), jnp.float32)


def test_expected_error_by_hand():
    """Two bins: 0.7 and 0.72 (one of two right), 0.95 four times (all right): (|1 − 1.42| + |4 − 3.8|)/6."""
    labels = jnp.asarray([0, 1, 0, 0, 0, 0, 1])
    mask = jnp.arange(7) < 6
    found = calibration.bins(logits_of([0.7, 0.72, 0.95, 0.95, 0.95, 0.95, 0.6]), labels, mask)
    assert found.count.tolist() == [0] * 10 + [2] + [0] * 3 + [4]
    assert found.correct.tolist() == [0] * 10 + [1] + [0] * 3 + [4]
    np.testing.assert_allclose(calibration.expected_error(found), 0.62 / 6, rtol=1e-6)  # float32


@pytest.mark.slow
def test_expected_error_is_that_of_a_loop_over_the_bins_however_batched():
    rng = np.random.default_rng(0)
    logits = (2 * rng.normal(size=(1000, 7))).astype(np.float32)
    labels = np.where(rng.random(1000) < 0.5, logits.argmax(-1), rng.integers(0, 7, 1000))
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == labels
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    totals = None
    for start, stop in ((0, 1), (1, 337), (337, 1000)):
        rows = jnp.asarray(logits[start:stop]), jnp.asarray(labels[start:stop]), jnp.ones(stop - start, bool)
        totals = metrics.merge(totals, calibration.bins(*rows)) if totals else calibration.bins(*rows)
    assert int(totals.count.sum()) == 1000
    np.testing.assert_allclose(calibration.expected_error(totals), expected, rtol=1e-5)  # float32 sums


def test_certainty_falls_in_the_last_bin():
    found = calibration.bins(jnp.asarray([[1e4, 0.0, 0.0]]), jnp.asarray([0]), jnp.asarray([True]))
    assert found.count.tolist() == [0] * 14 + [1]
    assert calibration.expected_error(found) == 0.0


def test_class_accuracy_counts_each_class_by_itself():
    logits, labels = jnp.eye(4)[jnp.asarray([0, 1, 0, 3, 3])], jnp.asarray([0, 0, 0, 3, 1])
    counts = calibration.class_counts(logits, labels, jnp.asarray([True, True, True, True, False]))
    assert counts.count.tolist() == [3, 0, 0, 1]
    np.testing.assert_array_equal(calibration.class_accuracy(counts), [2 / 3, np.nan, np.nan, 1.0])


def test_nothing_counted_is_not_a_number():
    empty = calibration.bins(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), jnp.zeros(2, bool))
    assert np.isnan(calibration.expected_error(empty))


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.5, 0.05], np.float32)
    correct = np.array([True, False, True, False])
    # The bins: two with accuracy 1/2 and confidence 0.95, one with 1 and 0.5, one with 0 and 0.05.
    expected = (2 * 0.45 + 0.5 + 0.05) / 4
    assert calibration.calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-7)
