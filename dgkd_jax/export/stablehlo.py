"""StableHLO in `jax.export`'s container: one file that JAX runs on a CPU, a GPU or a TPU without this package."""

import jax
import jax.export
import jax.numpy as jnp

from dgkd_jax.errors import BadInput
from dgkd_jax.export.program import Program
from dgkd_jax.models import layers

PLATFORMS = ("cpu", "cuda", "tpu")


def encode(program: Program) -> bytes:
    """The program for `PLATFORMS` and batches of any size, to be read by `jax.export.deserialize`.

    Raises:
        BadInput: the network computes with the size of the batch, so that it has to be known.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *program.image_shape), jnp.uint8)
    try:
        with layers.forms_chosen_by(jax.lax.platform_dependent):
            exported = jax.export.export(jax.jit(program.logits), platforms=PLATFORMS)(images)
    except jax.errors.InconclusiveDimensionOperation as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--format=stablehlo: the network does not take batches of any size: {reason}") from error
    return bytes(exported.serialize())
