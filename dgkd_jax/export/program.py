"""A student as one pure function of raw images: all that the formats which hold a program need to know of it."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax.models import network
from dgkd_jax.runs.student import Student


class Program(NamedTuple):
    """A classifier with its pre-processing and its weights inside.

    Attributes:
        logits: uint8 `[batch, height, width, channels]` -> float32 `[batch, classes]`.
        image_shape: (height, width, channels).
    """

    logits: Callable[[jax.Array], jax.Array]
    image_shape: tuple[int, int, int]


def program_of(student: Student, *, from_code: bool = False) -> Program:
    """The student in float32, with the precision of matrix products that its run was evaluated with.

    Args:
        from_code: a user's own network is imported, instead of the program that its run has kept.

    Raises:
        BadInput: as `Student.architecture`.
    """
    about, precision = student.about, student.config.matmul_precision
    mean, std = tuple(about["mean"]), tuple(about["std"])
    classifier = network.of(student.architecture(from_code=from_code), student.variables, mean=mean, std=std)

    def logits(images: jax.Array) -> jax.Array:
        with contextlib.nullcontext() if precision == "default" else jax.default_matmul_precision(precision):
            return classifier(images).astype(jnp.float32)

    return Program(logits, tuple(about["image_shape"]))
