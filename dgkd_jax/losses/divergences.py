"""T² times a KL divergence of teacher and student, differentiable in any mode; its gradient keeps its digits too.

Unchecked: the public losses check their arguments and call these. `temperature` may be traced and differentiated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from dgkd_jax.losses import softmax_pair, target_split

# (student's logits, teacher's logits, classes, temperature) -> (value, gradient at the student's logits)
_ValueAndGradient = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]]


def _with_gradient(value_and_gradient: _ValueAndGradient, doc: str):
    """A function whose derivative is the given gradient; nothing flows into the teacher's logits."""

    def value(z, v, classes, temperature):
        return value_and_gradient(z, v, classes, temperature)[0]

    function = jax.custom_jvp(value)

    @partial(function.defjvp, symbolic_zeros=True)
    def derivative(primals, tangents):
        z, v, classes, temperature = primals
        of_logits, _, _, of_temperature = tangents
        found, gradient = value_and_gradient(z, v, classes, temperature)
        tangent = jnp.zeros_like(found)
        if not isinstance(of_logits, SymbolicZero):
            tangent += jnp.sum(gradient * of_logits, axis=-1)
        if not isinstance(of_temperature, SymbolicZero):
            tangent += jax.jvp(lambda t: value(z, v, classes, t), (temperature,), (of_temperature,))[1]
        return found, tangent

    function.__doc__ = doc
    return function


def _of_target(z, v, is_target, temperature):
    split = target_split.split(z, v, is_target, temperature)
    return temperature**2 * target_split.target_divergence(split), temperature * target_split.tckd_gradient(split)


def _of_rest(z, v, is_target, temperature):
    split = target_split.split(z, v, is_target, temperature)
    return temperature**2 * target_split.nontarget_divergence(split), temperature * target_split.nckd_gradient(split)


def _within(z, v, inside, temperature):
    pair = softmax_pair.compare(z, v, inside, temperature)
    return temperature**2 * softmax_pair.row_sums(pair.summands)[0], temperature * pair.gap


def _of_masses(z, v, inside, temperature):
    these, others = (softmax_pair.compare(z, v, which, temperature) for which in (inside, ~inside))
    odds = softmax_pair.odds(these.mass, others.mass, temperature)
    gap = softmax_pair.probability_gap(odds)[..., None]
    gradient = gap * (these.student - others.student)
    return temperature**2 * softmax_pair.binary_divergence(odds), temperature * gradient


target = _with_gradient(_of_target, "TCKD `[...]` of logits `[..., classes]` with one target each.")
nontarget = _with_gradient(_of_rest, "NCKD `[...]` of logits `[..., classes]` with one target each.")
within = _with_gradient(_within, "T²·KL of the softmaxes over the selected classes, `[...]`.")
masses = _with_gradient(_of_masses, "T²·KL of the probabilities of the selected classes against the others, `[...]`.")
