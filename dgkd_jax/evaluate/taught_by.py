"""Finds the teacher of a run, for comparisons after the run."""

import json
from typing import Any

from etils import epath
from jax.sharding import Mesh

from dgkd_jax import models, torch_port
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import needs_teacher
from dgkd_jax.models import network
from dgkd_jax.models.network import Network
from dgkd_jax.runs import checkpoint, sharding, student

# In result.json, where the teacher was an object from Python and not a file.
GIVEN = "given in Python"


def find_teacher(
    taught: student.Student, workdir: epath.Path, given: str | None, *, run: Any, mesh: Mesh
) -> Network | None:
    """The teacher of a run: `given`, or where the run recorded it, or else next to the run.

    Args:
        taught: the run's student.
        workdir: of the run.
        given: a work directory, a file of weights, or "none"; None: find it.
        run: what the networks see: name, num_classes, image_shape, mean, std (the work directory's student.json).
        mesh: for the teacher's variables.

    Returns:
        None if the run had none, it was an object from Python, or `given` is "none".

    Raises:
        BadInput: it is not there, or its weights are not those that taught the student.
    """
    config = taught.config
    where = given or _recorded_teacher(workdir, config)
    if where in (None, "none", GIVEN):
        return None
    path = epath.Path(where)
    if not path.exists() and given is None:
        path = workdir.resolve().parent / path.name  # the folder of the runs was moved
    mean, std = tuple(config.teacher.mean) or run.mean, tuple(config.teacher.std) or run.std
    if (path / "config.json").exists():
        read = student.read(path)
        architecture, variables = read.architecture(config.teacher.dtype), read.variables
        if not config.teacher.mean:
            mean, std = tuple(read.about["mean"]), tuple(read.about["std"])
    elif where == "random":
        architecture = network.of_section(config.teacher, run, role="teacher")
        variables = architecture.initialise(run.image_shape, config.teacher.seed)
    elif path.is_file() or where.startswith("hf:"):
        architecture = network.of_section(config.teacher, run, role="teacher")
        state_dict = torch_port.load(str(path) if path.is_file() else where)
        model = models.create(config.teacher.model, num_classes=run.num_classes)
        variables = torch_port.from_torch(state_dict, model, config.teacher.model, image_shape=run.image_shape)
    else:
        raise BadInput(
            f"the teacher is not at {where}: say where it is with --teacher=WORKDIR or --teacher=FILE, "
            "or --teacher=none to leave it out"
        )
    variables = sharding.place(variables, mesh)
    found = checkpoint.fingerprint(variables)
    if taught.taught_by not in (None, found):
        raise BadInput(
            f"the teacher at {path if path.exists() else where} is not the one that taught this student (weights "
            f"{taught.taught_by}, found {found}): say where that is with --teacher=WHERE, or --teacher=none"
        )
    return network.of(architecture, variables, mean=mean, std=std, fingerprint=found)


def _recorded_teacher(workdir: epath.Path, config: Any) -> str | None:
    path = workdir / "result.json"
    if path.exists():
        try:
            row = json.loads(path.read_text())["teacher"]
            return row["weights"] if row else None
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{path} is damaged; give the command that made the run once more, or --teacher=WHERE"
            ) from error
    if not needs_teacher(config.method):
        return None
    # The run is not finished: use the config.
    return config.teacher.weights or config.teacher.workdir or str(workdir.resolve().parent / "teacher")
