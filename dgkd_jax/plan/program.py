"""The programs of a run, built as the run builds them, with shapes in place of arrays."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax import methods
from dgkd_jax.data.described import describe
from dgkd_jax.data.source import Description
from dgkd_jax.errors import BadInput
from dgkd_jax.evaluate.evaluator import Evaluator, Known, batch_rows
from dgkd_jax.models.network import Network
from dgkd_jax.runs import sharding
from dgkd_jax.training import checks, feed
from dgkd_jax.training.build import program_of
from dgkd_jax.training.cached_logits.teacher import CachedTeacher
from dgkd_jax.training.teacher import untaught

TARGETS = ("train", "evaluate", "diagnose", "teacher")


def described(config: ConfigDict) -> Description:
    """The data set of a run, unopened.

    Raises:
        BadInput: there are several methods, of which each has another program; or as `describe`.
    """
    if len(methods.names_of(config)) > 1:
        raise BadInput(f"config.method={config.method}: a plan is of one; give --config.method=dgkd, for example")
    return describe(config.data)


def rows_of(config: ConfigDict, target: str, *, devices: int) -> int:
    """Of the target's global batch."""
    if target == "train":
        return config.batch_size
    return batch_rows(config.eval_batch_size, described(config).num_eval, devices=devices)


def lower(config: ConfigDict, mesh: Mesh, *, target: str) -> jax.stages.Lowered:
    """A program of `python -m dgkd_jax.main` with this config on these devices, ready to be compiled.

    Args:
        config: validated.
        mesh: of devices that need not be here.
        target: `train`: the training step. `evaluate`: accuracy of a batch. `diagnose`: all that an evaluation
            measures, with the teacher's logits given. `teacher`: those logits.

    Raises:
        BadInput: the batch cannot be split over the devices, a network cannot take the images, or the method has no
            teacher.
    """
    source, method = described(config), methods.from_config(config)
    if target == "teacher" and not method.needs_teacher:
        raise BadInput(f"--target=teacher: method {config.method} has none")
    if target == "train":
        checks.check_batch(config, mesh)
    teacher = untaught(config, source, mesh) if method.needs_teacher else None
    cached = teacher is not None and bool(config.teacher.cache)
    in_training = CachedTeacher(teacher, "all classes") if cached else teacher
    program = program_of(config, source, mesh, in_training)
    if target == "train":
        step, arguments = feed.described(config, program, source=source, mesh=mesh, cached=cached)
        return step.lower(program.begins_as, in_training, *arguments)
    evaluator = Evaluator(mesh, batch_size=config.eval_batch_size)
    batch = _evaluated(source, mesh, rows=rows_of(config, target, devices=mesh.size))
    if target == "teacher":
        return evaluator.ask.lower(teacher, batch)
    student: Network = program.student.with_variables(program.begins_as.evaluated)
    if target == "evaluate":
        return evaluator.plain.lower(student, batch)
    if teacher is None:
        return evaluator.full.lower(student, None, batch, classes=None)
    logits = jax.ShapeDtypeStruct(
        (len(batch["label"]), source.num_classes), jnp.float32, sharding=batch["label"].sharding
    )
    return evaluator.full.lower(student, Known(), batch | {"teacher_logits": logits}, classes=None)


def _evaluated(source: Description, mesh: Mesh, *, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the evaluation split."""
    arrays = {
        "image": (source.image_shape, jnp.uint8),
        "label": ((), jnp.int32),
        "mask": ((), jnp.bool_),
    }
    by_row = sharding.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=by_row) for name, (shape, dtype) in arrays.items()
    }
