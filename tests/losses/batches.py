"""Random logits, and how the programs of these tests are compiled."""

from functools import partial

import jax
import numpy as np

# Each program runs once, so that optimising it costs far more than it saves.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_batch(*shape, seed=0, scale=2.0, dtype="float64"):
    """Student logits, teacher logits and labels of `shape` = (..., classes)."""
    rng = np.random.default_rng(seed)
    student, teacher = (scale * rng.standard_normal((2, *shape))).astype(dtype)
    return student, teacher, rng.integers(0, shape[-1], shape[:-1])
