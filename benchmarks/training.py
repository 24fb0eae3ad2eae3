"""The training step of a named pair on invented images, for the benchmarks that need one but no data."""

import argparse
import functools
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from configs import default
from dgkd_jax import models
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import DGKD, Method
from dgkd_jax.models.network import Network
from dgkd_jax.parity.bare_step import bare_step
from dgkd_jax.runs import sharding
from dgkd_jax.training.optimizer import make_optimizer

IMAGE_SHAPE = (32, 32, 3)
CLASSES = 100
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)  # of the invented images' pixels, as the networks believe


def add_pair(parser: argparse.ArgumentParser, *, student: str, teacher: str, batch: int) -> None:
    parser.add_argument("--student", default=student, help=f"a model's name (default {student})")
    parser.add_argument("--teacher", default=teacher, help=f"a model's name (default {teacher})")
    parser.add_argument("--batch", type=int, default=batch, help=f"images in a global batch (default {batch})")


def check_pair(arguments: argparse.Namespace) -> None:
    """Raises BadInput for a model that there is not and for an empty batch."""
    for flag in ("student", "teacher"):
        check_model(f"--{flag}", getattr(arguments, flag))
    if arguments.batch < 1:
        raise BadInput(f"--batch={arguments.batch}: must be 1 or more")


def check_model(flag: str, name: str) -> None:
    """Raises BadInput for a model that there is not."""
    try:
        models.create(name, num_classes=CLASSES)
    except ValueError as error:
        raise BadInput(f"{flag}: {error}") from error


def examples(
    batch: int, *, image_shape: tuple[int, int, int] = IMAGE_SHAPE, classes: int = CLASSES
) -> dict[str, np.ndarray]:
    """A batch of random pixels and labels on the host; the same each time."""
    random = np.random.default_rng(0)
    return {
        "image": random.integers(0, 256, (batch, *image_shape), np.uint8),
        "label": random.integers(0, classes, batch, np.int32),
    }


def build(
    mesh: Mesh,
    *,
    student: str,
    teacher: str,
    batch: int,
    image_shape: tuple[int, int, int] = IMAGE_SHAPE,
    classes: int = CLASSES,
    dtype: str = "float32",
    method: Method | None = None,
    optimizer: optax.GradientTransformation | None = None,
    accumulate: int = 1,
) -> tuple[jax.stages.Wrapped, tuple[Any, Network, dict[str, jax.Array]]]:
    """The step of a run, as a run compiles it, and its arguments.

    Args:
        mesh: with axes `data` and `fsdp`.
        student, teacher: names of models.
        batch: images in the global batch; the mesh's size must divide it.
        image_shape: (height, width, channels).
        classes: of both networks.
        dtype: of the computation.
        method: None is DGKD with its defaults.
        optimizer: None is the default configuration's at a rate of 0.01.
        accumulate: parts of the batch.

    Returns:
        The jitted step, and the state (donated to it), the teacher and a batch, on the mesh.
    """

    def network(name: str, seed: int) -> Network:
        model = models.create(name, num_classes=classes, dtype=dtype)
        return Network(model.apply, models.initialise(model, image_shape, seed), MEAN, STD)

    optimizer = optimizer or make_optimizer(default.get_config().optimizer, lambda step: 0.01)
    step, start = bare_step(network(student, 0), method=method or DGKD(), optimizer=optimizer)
    taught = network(teacher, 1)
    current, placed = sharding.place(start, mesh), taught.with_variables(sharding.place(taught.variables, mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, current)
    step = functools.partial(step, accumulate=accumulate)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    host = examples(batch, image_shape=image_shape, classes=classes)
    return compiled, (current, placed, sharding.to_global(host, mesh))
