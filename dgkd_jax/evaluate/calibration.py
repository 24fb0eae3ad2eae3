"""Calibration of the probabilities, and accuracy per class.

Everything is a sum over examples, so totals of batches and devices can be added. The other usual measure of
calibration, the negative log-likelihood, is `losses.cross_entropy` without smoothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BINS = 15  # Guo et al., section 5


class Bins(NamedTuple):
    """Sums over the examples in `BINS` equal intervals of confidence (the probability of the top class).

    Attributes:
        count: int32 `[BINS]`, number of examples.
        correct: int32 `[BINS]`, examples whose top class is the label.
        confidence: float `[BINS]`, sum of the confidences.
    """

    count: jax.Array
    correct: jax.Array
    confidence: jax.Array


class ClassCounts(NamedTuple):
    """`count`: int32 `[classes]`, examples of each class; `correct`: int32 `[classes]`, those classified correctly."""

    count: jax.Array
    correct: jax.Array


def bins(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Bins:
    """Calibration sums of one batch. Bin m of M holds the confidences in (m/M, (m+1)/M], with m from 0.

    Args:
        logits: float `[batch, classes]`.
        labels: integer `[batch]`.
        mask: bool `[batch]`, False where a row is padding.
    """
    confidence = jnp.max(jax.nn.softmax(logits), axis=-1)
    index = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    member = (index[:, None] == jnp.arange(BINS)) & mask[:, None]
    correct = (jnp.argmax(logits, axis=-1) == labels)[:, None]
    return Bins(
        count=jnp.sum(member, axis=0, dtype=jnp.int32),
        correct=jnp.sum(member & correct, axis=0, dtype=jnp.int32),
        confidence=jnp.sum(jnp.where(member, confidence[:, None], 0.0), axis=0),
    )


def expected_error(totals: Bins) -> float:
    """Expected calibration error Σ_m (n_m/n)·|accuracy_m − confidence_m| in [0, 1]; NaN without examples.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017, arXiv:1706.04599, equation 3.
    """
    count = int(np.sum(totals.count))
    gaps = np.abs(np.asarray(totals.correct, np.float64) - np.asarray(totals.confidence, np.float64))
    return float(gaps.sum()) / count if count else float("nan")


def class_counts(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> ClassCounts:
    """Counts per class of one batch; arguments as for `bins`."""
    member = (labels[:, None] == jnp.arange(logits.shape[-1])) & mask[:, None]
    correct = (jnp.argmax(logits, axis=-1) == labels)[:, None]
    return ClassCounts(
        count=jnp.sum(member, axis=0, dtype=jnp.int32), correct=jnp.sum(member & correct, axis=0, dtype=jnp.int32)
    )


def class_accuracy(totals: ClassCounts) -> np.ndarray:
    """Float64 `[classes]` in [0, 1]; NaN for a class without examples."""
    count = np.asarray(totals.count)
    return np.where(count > 0, np.asarray(totals.correct) / np.maximum(count, 1), np.nan)


# -- for a whole set, on the host -------------------------------------------------------------------------------


def reliability(confidence: np.ndarray, correct: np.ndarray) -> dict[str, np.ndarray]:
    """The data of a reliability diagram. Bin m of `BINS` holds the confidences in (m/BINS, (m+1)/BINS], m from 0.

    Source: Guo et al., ICML 2017, arXiv:1706.04599, section 2.

    Args:
        confidence: `[examples]`, probability of the top class.
        correct: bool `[examples]`.

    Returns:
        Arrays `[BINS]`: `share` of the examples, mean `confidence`, `accuracy`; the last two are NaN in empty bins.
    """
    index = np.clip(np.ceil(np.asarray(confidence, np.float64) * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(index, minlength=BINS)
    filled = np.where(count > 0, count, np.nan)
    return {
        "share": count / max(count.sum(), 1),
        "confidence": np.bincount(index, weights=confidence, minlength=BINS) / filled,
        "accuracy": np.bincount(index, weights=correct, minlength=BINS) / filled,
    }


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error Σ_m share_m·|accuracy_m − confidence_m| in [0, 1] (Guo et al., equation 3)."""
    bins = reliability(confidence, correct)
    return float(np.nansum(bins["share"] * np.abs(bins["accuracy"] - bins["confidence"])))
