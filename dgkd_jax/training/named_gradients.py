"""The gradients of the parts of a loss, by name, from one forward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Terms = dict[str, jax.Array]


def value_and_named_gradients(
    terms_of: Callable[[Any], tuple[Terms, Any]], loss_of: Callable[[Terms], jax.Array], names: tuple[str, ...]
) -> Callable[[Any], tuple[tuple[jax.Array, Any], dict[str, Any]]]:
    """A function: parameters -> ((loss, what `terms_of` gives beside the terms), name -> gradient).

    A gradient is that of the loss through some of its terms, the others held fixed: "task" is the cross-entropy "ce",
    "kd" all other terms, any other name the term of that name. Each has the weights and ramps of the loss.
    If every term is in exactly one, they add up to the gradient of the loss. DGKD's coupling, which is of TCKD and
    NCKD together, is in "kd"; a config that asks for DGKD with "tckd" and "nckd" is refused.

    Each gradient is a backward pass of its own. One pass over stacked cotangents gives the same, and takes as long or
    longer on a CPU (docs/performance.md).

    Args:
        terms_of: parameters -> scalars by name, among them "ce", and anything else, which is not differentiated.
        loss_of: those scalars -> the loss.
        names: of the gradients.
    """

    def compute(params: Any) -> tuple[tuple[jax.Array, Any], dict[str, Any]]:
        terms, pull_back, beside = jax.vjp(terms_of, params, has_aux=True)
        loss, weights = jax.value_and_grad(loss_of)(terms)
        return (loss, beside), {name: pull_back(cotangents(weights, name))[0] for name in names}

    return compute


def cotangents(weights: Terms, name: str) -> Terms:
    """The derivatives of the loss with respect to its terms, those of the gradient `name`; 0 for the other terms.

    Raises:
        ValueError: the loss has no term of that name.
    """
    chosen = {"task": {"ce"}, "kd": set(weights) - {"ce"}}.get(name, {name})
    if not chosen or not chosen <= set(weights):
        raise ValueError(f"no gradient {name!r}: the terms of the loss are {', '.join(weights)}")
    return {term: weight if term in chosen else jnp.zeros_like(weight) for term, weight in weights.items()}
