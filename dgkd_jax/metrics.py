"""Metrics as (sum, count) pairs: they add up over steps, batches and devices without rounding the count.

A `Totals` maps a name to such a pair. Correct answers and examples are summed as integers, so an accuracy is exact; the
rest is summed in JAX's default float: float32, or float64 where that is switched on.
"""

import jax
import jax.numpy as jnp

Totals = dict[str, tuple[jax.Array, jax.Array]]


def of_batch_means(means: dict[str, jax.Array]) -> Totals:
    """Scalars that are already means over a batch; batches are of equal size, so each counts once."""
    return {name: (jnp.asarray(value, float), jnp.ones((), jnp.int32)) for name, value in means.items()}


def accuracy(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Top-1 accuracy.

    Args:
        logits: float `[batch, classes]`.
        labels: integer `[batch]`.
        mask: bool `[batch]`, False where a row is padding; None counts all.

    Returns:
        (number of correct answers, number of examples), int32 both.
    """
    correct = jnp.argmax(logits, axis=-1) == labels
    counted = jnp.ones_like(correct) if mask is None else mask
    return jnp.sum(correct & counted, dtype=jnp.int32), jnp.sum(counted, dtype=jnp.int32)


def masked_mean(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of the values where `mask`, their number): `[batch]`, bool `[batch]` -> float, int32."""
    return jnp.sum(jnp.where(mask, values, 0.0), dtype=float), jnp.sum(mask, dtype=jnp.int32)


def merge(a: Totals, b: Totals) -> Totals:
    """The totals of both."""
    return jax.tree.map(jnp.add, a, b)


def zeros_like(totals: Totals) -> Totals:
    """Empty totals of the same names and types."""
    return jax.tree.map(jnp.zeros_like, totals)


def compute(totals: Totals) -> dict[str, float]:
    """Sums over counts, as Python floats (waits for the device); NaN where nothing was counted."""
    host = jax.device_get(totals)
    return {name: float(total) / float(count) if count else float("nan") for name, (total, count) in host.items()}
