"""Metrics as (sum, count) pairs, which can be added over steps, batches and devices.

A `Totals` maps a name to such a pair. Correct answers and examples are summed as integers, so an accuracy is exact;
all else is summed in JAX's default float: float32, or float64 if that is enabled.
"""

import jax
import jax.numpy as jnp

Totals = dict[str, tuple[jax.Array, jax.Array]]


def of_batch_means(means: dict[str, jax.Array]) -> Totals:
    """Totals of scalars that are already batch means; batches have equal size, so each mean counts once."""
    return {name: (jnp.asarray(value, float), jnp.ones((), jnp.int32)) for name, value in means.items()}


def accuracy(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Top-1 accuracy.

    Args:
        logits: float `[batch, classes]`.
        labels: integer `[batch]`, or float `[batch, classes]`: of a mixed image the class of highest weight counts.
        mask: bool `[batch]`, False where a row is padding; None counts all.

    Returns:
        (number of correct answers, number of examples), int32 both.
    """
    classes = labels if jnp.issubdtype(labels.dtype, jnp.integer) else jnp.argmax(labels, axis=-1)
    correct = jnp.argmax(logits, axis=-1) == classes
    counted = jnp.ones_like(correct) if mask is None else mask
    return jnp.sum(correct & counted, dtype=jnp.int32), jnp.sum(counted, dtype=jnp.int32)


def masked_mean(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[batch]`, bool `[batch]` -> (sum of the values where `mask` is true, float; their number, int32)."""
    return jnp.sum(jnp.where(mask, values, 0.0), dtype=float), jnp.sum(mask, dtype=jnp.int32)


def merge(a: Totals, b: Totals) -> Totals:
    """The sum of two totals."""
    return jax.tree.map(jnp.add, a, b)


def zeros_like(totals: Totals) -> Totals:
    """Empty totals with the same names and dtypes."""
    return jax.tree.map(jnp.zeros_like, totals)


def compute(totals: Totals) -> dict[str, float]:
    """Sum / count as Python floats (waits for the device); NaN where the count is 0."""
    host = jax.device_get(totals)
    return {name: float(total) / float(count) if count else float("nan") for name, (total, count) in host.items()}
