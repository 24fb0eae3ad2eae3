"""The training step of a named pair on invented images, for the benchmarks that need one but no data."""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from configs import default
from dgkd_jax import models, sharding, state, steps
from dgkd_jax.errors import BadInput

IMAGE_SHAPE = (32, 32, 3)
CLASSES = 100


def add_pair(parser: argparse.ArgumentParser, *, student: str, teacher: str, batch: int) -> None:
    parser.add_argument("--student", default=student, help=f"a model's name (default {student})")
    parser.add_argument("--teacher", default=teacher, help=f"a model's name (default {teacher})")
    parser.add_argument("--batch", type=int, default=batch, help=f"images in a global batch (default {batch})")


def check_pair(arguments: argparse.Namespace) -> None:
    """Raises BadInput for a model that there is not and for an empty batch."""
    for flag in ("student", "teacher"):
        try:
            models.create(getattr(arguments, flag), num_classes=CLASSES)
        except ValueError as error:
            raise BadInput(f"--{flag}: {error}") from error
    if arguments.batch < 1:
        raise BadInput(f"--batch={arguments.batch}: must be 1 or more")


def build(mesh: Mesh, *, student: str, teacher: str, batch: int) -> tuple[jax.stages.Wrapped, tuple[Any, Any, Any]]:
    """The step of DGKD with the default configuration's weights, as `dgkd_jax.train` compiles it, and its arguments.

    Args:
        mesh: with axes `data` and `fsdp`.
        student, teacher: names of models.
        batch: images in the global batch; the mesh's size must divide it.

    Returns:
        The jitted step, and the state (donated to it), the teacher's variables and a batch, on the mesh.
    """
    config = default.get_config()
    config.method = "dgkd"
    objective = steps.objective_of(config)
    network, teacher_network = (models.create(name, num_classes=CLASSES) for name in (student, teacher))
    optimizer = state.make_optimizer(config.optimizer, lambda step: 0.01)
    variables = models.initialise(network, IMAGE_SHAPE, 0)
    initial = state.create(variables, optimizer, ema=False, metric_names=steps.metric_names(objective))
    current = sharding.place(initial, mesh)
    teacher_variables = sharding.place(models.initialise(teacher_network, IMAGE_SHAPE, 1), mesh)
    rng = np.random.default_rng(0)
    images = {
        "image": rng.integers(0, 256, (batch, *IMAGE_SHAPE), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, batch).astype(np.int32),
    }
    step = functools.partial(
        steps.train_step,
        student=network.apply,
        teacher=teacher_network.apply,
        optimizer=optimizer,
        objective=objective,
        ramp=lambda step: jnp.asarray(1.0),
        epsilon=lambda step: jnp.asarray(config.dgkd.epsilon),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, current)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    return compiled, (current, teacher_variables, sharding.to_global(images, mesh))
