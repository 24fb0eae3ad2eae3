"""A student as one pure function of raw images: all that the formats which hold a program need to know of it."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax.models.network import Network
from dgkd_jax.runs.student import Student


class Program(NamedTuple):
    """A classifier with its pre-processing and its weights inside.

    Attributes:
        logits: uint8 `[batch, height, width, channels]` -> float32 `[batch, classes]`.
        image_shape: (height, width, channels).
    """

    logits: Callable[[jax.Array], jax.Array]
    image_shape: tuple[int, int, int]


def program_of(student: Student) -> Program:
    """The student in float32, with the precision of matrix products that its run was evaluated with."""
    about, precision = student.about, student.config.matmul_precision
    network = Network(student.model.apply, student.variables, tuple(about["mean"]), tuple(about["std"]))

    def logits(images: jax.Array) -> jax.Array:
        with contextlib.nullcontext() if precision == "default" else jax.default_matmul_precision(precision):
            return network(images).astype(jnp.float32)

    return Program(logits, tuple(about["image_shape"]))
