"""DGKD's loss: DKD minus the coupling of its two gradients. Most settings use the single pass of `fused`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax.losses import checks, divergences, fused, soft_labels, target_split
from dgkd_jax.losses.coupling import (
    Convention,
    Distance,
    Wrt,
    check_options,
    coupling_of_gradients,
    of_mean_distance,
)


class DgkdTerms(NamedTuple):
    """The terms of DGKD.

    Attributes:
        tckd: `[...]`, as from `tckd`.
        nckd: `[...]`, as from `nckd`.
        coupling: scalar G, before the factor −ε.
    """

    tckd: jax.Array
    nckd: jax.Array
    coupling: jax.Array


def dgkd_terms(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    convention: Convention,
    distance: Distance = "mse",
    wrt: Wrt = "logits",
    parity_batch: int | None = None,
    kappa: float = 1e-8,
    where: jax.Array | None = None,
) -> DgkdTerms:
    r"""TCKD, NCKD and the coupling of their gradients. `distance="mse"` is computed in one pass (`fused.terms`).

    That pass has a gradient of its own and no forward-mode derivative: `jax.jvp` and `jax.jacfwd` of it raise
    TypeError. Its gradient can be differentiated again, in either mode.

    Args:
        wrt: what the two gradients are taken with respect to. `logits`: both to all of the student's logits.
            `own_logits`: each to its own, ∇TCKD to the target's and ∇NCKD to the others', as the blog writes its
            indices; then ‖∇TCKD − ∇NCKD‖² = T²·[(p−q)² + ‖ŝ−t̂‖²], without interaction. It needs `distance="mse"`.
        (others): as `tckd` and `coupling_of_gradients`.

    Returns:
        `DgkdTerms`, at least float32; differentiable in `student_logits`.

    Raises:
        ValueError: as `tckd` and `coupling_of_gradients`.
    """
    check_options(convention, distance, parity_batch, kappa, wrt)
    inputs = checks.check_inputs(student_logits, teacher_logits, labels, where)
    checks.check_positive("temperature", temperature)
    options = {"convention": convention, "parity_batch": parity_batch, "kappa": kappa}
    # The single pass has no gradient with respect to the temperature, and a traced one may be differentiated.
    own = wrt == "own_logits"
    if distance != "mse" or isinstance(temperature, jax.core.Tracer):
        return _of_separate_gradients(inputs, temperature, distance=distance, own_coordinates=own, **options)
    if inputs.has_soft_labels():
        target, nontarget, squared = soft_labels.expected_terms(*inputs[:3], temperature, own)
    else:
        target, nontarget, squared = fused.terms(*inputs[:2], inputs.is_target(), temperature, own)
    classes = inputs.student_logits.shape[-1]
    coupling = of_mean_distance(inputs.mean(squared), rows=inputs.count(), columns=classes, **options)
    return DgkdTerms(inputs.selected(target), inputs.selected(nontarget), coupling)


def _of_separate_gradients(
    inputs: checks.Inputs, temperature, *, distance: Distance, own_coordinates: bool, **options
) -> DgkdTerms:
    if inputs.has_soft_labels():
        raise ValueError(
            f"labels must be integers of shape {inputs.student_logits.shape[:-1]} for distance={distance!r} or a "
            "traced temperature; distributions need distance='mse' and a temperature that is a number"
        )
    logits = *inputs[:2], inputs.is_target(), temperature
    split = target_split.split(*logits)
    of_target, of_nontarget = (
        temperature * gradient(split) for gradient in (target_split.tckd_gradient, target_split.nckd_gradient)
    )
    if own_coordinates:
        of_target, of_nontarget = jnp.where(logits[2], of_target, 0.0), jnp.where(logits[2], 0.0, of_nontarget)
    return DgkdTerms(
        inputs.selected(divergences.target(*logits)),
        inputs.selected(divergences.nontarget(*logits)),
        coupling_of_gradients(of_target, of_nontarget, distance=distance, where=inputs.where, **options),
    )


def gradient_coupling(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    convention: Convention,
    distance: Distance = "mse",
    wrt: Wrt = "logits",
    parity_batch: int | None = None,
    kappa: float = 1e-8,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""The coupling term G of the gradients of TCKD and NCKD, before the factor −ε.

    Args: as `dgkd_terms`.

    Returns:
        Scalar, at least float32; differentiable in `student_logits`.

    Raises:
        ValueError: as `tckd` and `coupling_of_gradients`.
    """
    return dgkd_terms(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        convention=convention,
        distance=distance,
        wrt=wrt,
        parity_batch=parity_batch,
        kappa=kappa,
        where=where,
    ).coupling


def dgkd(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float,
    beta: float,
    epsilon: float,
    temperature: float,
    convention: Convention,
    distance: Distance = "mse",
    wrt: Wrt = "logits",
    parity_batch: int | None = None,
    kappa: float = 1e-8,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Decoupled gradient distillation, mean_i(α·TCKD_i + β·NCKD_i) − ε·G.

    Args:
        epsilon: ε > 0 pushes the two gradients apart, ε < 0 brings them together, 0 is DKD.
        (others): as `dkd` and `dgkd_terms`.

    Returns:
        Scalar, at least float32.

    Raises:
        ValueError: as `tckd` and `coupling_of_gradients`.

    Example:
        >>> z, v, y = jnp.zeros((4, 10)), jnp.eye(4, 10), jnp.arange(4)
        >>> loss = dgkd(z, v, y, alpha=1, beta=8, epsilon=0.1, temperature=4, convention="per_sample")
    """
    terms = dgkd_terms(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        convention=convention,
        distance=distance,
        wrt=wrt,
        parity_batch=parity_batch,
        kappa=kappa,
        where=where,
    )
    distillation = alpha * terms.tckd + beta * terms.nckd
    kept = distillation.size if where is None else jnp.maximum(jnp.sum(where), 1)
    return jnp.sum(distillation) / kept - epsilon * terms.coupling
