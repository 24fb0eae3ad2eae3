"""Standardised logits, a step before any loss."""

import jax
import jax.numpy as jnp

from dgkd_jax.losses import checks

_GUARD = 1e-7  # the authors'; beside the standard deviation, in logits


def standardize(logits: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    r"""(x − mean) / (1e-7 + std) over the classes, std unbiased (Sun et al., CVPR 2024, arXiv:2403.01427).

    Apply it to the student's and to the teacher's logits, then any loss. The loss then no longer depends on the shift
    and scale of either side. Gradients flow through it. Code: sunshangquan/logit-standardization-KD.

    Args:
        logits: float `[..., classes]`. −inf: the class is absent, stays −inf, and does not count.
        where: bool `[...]`; False gives zeros, whatever the logits are.

    Returns:
        `[..., classes]`, at least float32. Equal logits give zeros, and gradients of 0.

    Raises:
        ValueError: fewer than two classes, wrong types.
    """
    inputs = checks.check_inputs(logits, where=where)
    x = inputs.student_logits
    there = x != -jnp.inf
    count = jnp.sum(there, axis=-1, keepdims=True)
    present = jnp.where(there, x, 0.0)
    mean = jnp.sum(present, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(there, present - mean, 0.0)
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / jnp.maximum(count - 1, 1)
    varies = variance > 0
    deviation = jnp.sqrt(jnp.where(varies, variance, 1.0))
    return jnp.where(there, jnp.where(varies, centred / (_GUARD + deviation), 0.0), -jnp.inf)
