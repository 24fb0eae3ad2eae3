"""A network's program in a file: lets a work directory be read where the network's Python code is not."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from dgkd_jax.models.architecture import Apply, Architecture

FILE = "network.stablehlo"
_PLATFORMS = ("cpu", "cuda", "tpu")


def to_bytes(architecture: Architecture, image_shape: tuple[int, int, int]) -> bytes:
    """The network in evaluation mode as StableHLO, on CPUs, CUDA and TPUs.

    For any batch size; for one image where the network's code needs a number (`len(images)`).
    """
    program = jax.jit(lambda variables, images: architecture.apply(variables, images))
    exported, variables = export.export(program, platforms=_PLATFORMS), architecture.shapes(image_shape)
    (batch,) = export.symbolic_shape("batch")
    try:
        return exported(variables, jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)).serialize()
    except Exception:  # the network's own code raises what it likes on a size that is no number
        return exported(variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)).serialize()


def from_bytes(content: bytes) -> Apply:
    """The function of such a network: (variables, normalised images) -> logits.

    Raises:
        ValueError: the content is none of `to_bytes`.
    """
    try:
        program = export.deserialize(bytearray(content))
    except Exception as error:  # of the flat buffers below it, which has errors of many kinds
        raise ValueError(f"no stored program of a network: {type(error).__name__}") from error

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        variables = {"params": {}, "batch_stats": {}} | variables
        if any_size:
            return program.call(variables, images)
        return jax.lax.map(lambda image: program.call(variables, image[None])[0], images)

    any_size = not isinstance(program.in_avals[-1].shape[0], int)
    return apply
