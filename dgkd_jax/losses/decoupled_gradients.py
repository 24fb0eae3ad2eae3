"""DGKD's loss: DKD minus the coupling of its two gradients. Most settings use the single pass of `fused`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax.losses import checks, fused
from dgkd_jax.losses.coupling import (
    Convention,
    Distance,
    check_options,
    coupling_of_gradients,
    of_mean_distance,
)
from dgkd_jax.losses.distillation import terms_of
from dgkd_jax.losses.gradients import nckd_gradient_of, tckd_gradient_of
from dgkd_jax.losses.target_split import split_pair


class DgkdTerms(NamedTuple):
    """The terms of DGKD.

    Attributes:
        tckd, nckd: `[...]`, as from `tckd` and `nckd`.
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
    parity_batch: int | None = None,
    kappa: float = 1e-8,
) -> DgkdTerms:
    r"""TCKD, NCKD and the coupling of their gradients. `distance="mse"` is computed in one pass (`fused.terms`).

    That pass has a gradient of its own and no forward-mode derivative: `jax.jvp` and `jax.jacfwd` of it raise
    TypeError. Its gradient can be differentiated again, in either mode.

    Args: as `tckd` and `coupling_of_gradients`.

    Returns:
        `DgkdTerms`, at least float32; differentiable in `student_logits`.

    Raises:
        ValueError: as `tckd` and `coupling_of_gradients`.
    """
    # The single pass has no gradient with respect to the temperature, and a traced one may be differentiated.
    if distance != "mse" or isinstance(temperature, jax.core.Tracer):
        pair = split_pair(student_logits, teacher_logits, labels, temperature)
        options = {"convention": convention, "distance": distance, "parity_batch": parity_batch, "kappa": kappa}
        of_target, of_nontarget = tckd_gradient_of(pair, temperature), nckd_gradient_of(pair, temperature)
        return DgkdTerms(*terms_of(pair, temperature), coupling_of_gradients(of_target, of_nontarget, **options))
    check_options(convention, distance, parity_batch, kappa)
    student_logits, teacher_logits = checks.check_logits(student_logits, teacher_logits)
    checks.check_labels(labels, student_logits.shape)
    checks.check_positive("temperature", temperature)
    target, nontarget, squared = fused.terms(student_logits / temperature, teacher_logits / temperature, labels)
    coupling = of_mean_distance(
        temperature**2 * jnp.mean(squared),
        rows=squared.size,
        columns=student_logits.shape[-1],
        convention=convention,
        parity_batch=parity_batch,
        kappa=kappa,
    )
    return DgkdTerms(temperature**2 * target, temperature**2 * nontarget, coupling)


def gradient_coupling(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    convention: Convention,
    distance: Distance = "mse",
    parity_batch: int | None = None,
    kappa: float = 1e-8,
) -> jax.Array:
    r"""The coupling term G of the gradients with respect to the student's logits, before the factor −ε.

    Args: as `tckd` and `coupling_of_gradients`.

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
        parity_batch=parity_batch,
        kappa=kappa,
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
    parity_batch: int | None = None,
    kappa: float = 1e-8,
) -> jax.Array:
    r"""Decoupled gradient distillation, mean_i(α·TCKD_i + β·NCKD_i) − ε·G.

    Args:
        epsilon: ε > 0 pushes the two gradients apart, ε < 0 aligns them, 0 is DKD.
        (others): as `dkd` and `coupling_of_gradients`.

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
        parity_batch=parity_batch,
        kappa=kappa,
    )
    return jnp.mean(alpha * terms.tckd + beta * terms.nckd) - epsilon * terms.coupling
