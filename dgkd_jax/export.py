"""A trained student out of its work directory, as weights that PyTorch's networks load with strict=True.

    python -m dgkd_jax.torch_port export --workdir=DIR --output=student.safetensors [--step=N|best|last] [--overwrite]

Needs neither torch, the data set nor the devices of the run; and leaves the folder as it is, so the run may go on.
"""

import argparse
import json
import logging
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dgkd_jax import __version__, checkpoint, models, program, torch_port, weight_files
from dgkd_jax.errors import BadInput


class Student(NamedTuple):
    """What a work directory holds of its student.

    Attributes:
        variables: those that are evaluated: the average where the run keeps one.
        config: of the run.
        about: student.json: the data set's name, num_classes, image_shape, mean, std; and whether JAX had 64 bits.
        step: of the checkpoint.
        accuracy: at this step, in [0, 1]; None where it was not evaluated.
        taught_by: fingerprint of the teacher's weights; None where there was no teacher.
    """

    variables: dict[str, Any]
    config: ConfigDict
    about: dict[str, Any]
    step: int
    accuracy: float | None
    taught_by: str | None

    @property
    def model(self) -> Any:
        return _model(self.config, self.about)


def read(workdir: epath.PathLike, *, step: int | str = "last") -> Student:
    """The student of a finished or running work directory, from a checkpoint whose digest holds.

    Args:
        step: of the checkpoint; or `last`, the newest that is whole; or `best`, of the highest accuracy until then.

    Raises:
        BadInput: no work directory, no such checkpoint, or none that can be used.
    """
    workdir = epath.Path(workdir)
    config = ConfigDict(_read_json(workdir, "config.json", must_have="keep_checkpoints"))
    about = _read_json(workdir, "student.json", must_have="enable_x64")
    if not (workdir / "checkpoints").is_dir():
        raise _nothing_saved(workdir)
    with (
        jax.enable_x64(about["enable_x64"]),
        checkpoint.Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, read_only=True) as checkpoints,
    ):
        if not checkpoints.steps:
            raise _nothing_saved(workdir)
        like = _abstract_state(config, about)
        state, record = _restore(checkpoints, like, None if isinstance(step, str) else step)
        if step == "best":
            state, record = _restore(checkpoints, like, record["history"]["best_step"])
        variables = jax.tree.map(np.asarray, state.evaluated)
        taught_by = record["teacher"] and record["teacher"].split(",")[0]  # what follows: whether from a cache
        return Student(variables, config, about, int(state.step), record.get("accuracy"), taught_by)


def encode(student: Student, *, suffix: str) -> bytes:
    """The content of a weight file in PyTorch's names and layout, with metadata.

    Args:
        suffix: of `weight_files.WRITABLE`.

    Raises:
        BadInput: weights that are NaN or infinite.
    """
    name, image_shape = student.config.student.model, tuple(student.about["image_shape"])
    variables = student.variables if student.variables["batch_stats"] else {"params": student.variables["params"]}
    metadata = {
        "format": "pt",
        "model": name,
        "step": str(student.step),
        "accuracy": "not evaluated at this step" if student.accuracy is None else f"{student.accuracy:.6f}",
        "method": student.config.method,
        "data": student.about["name"],
        "num_classes": str(student.about["num_classes"]),
        **{key: json.dumps(student.about[key]) for key in ("image_shape", "mean", "std")},
        "dgkd_jax": __version__,
    }
    state_dict = torch_port.to_torch(variables, student.model, name, image_shape=image_shape)
    for entry, array in state_dict.items():
        if not np.isfinite(array).all():
            raise BadInput(f"the student of step {student.step} is unusable: {entry} holds NaN or infinite values")
    return weight_files.encode(state_dict, metadata, suffix=suffix)


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    try:
        jax.config.update("jax_platforms", "cpu")  # the accelerator may be the run's
        logging.getLogger().setLevel(logging.ERROR)
        print(_export(_arguments(argv)))
    except BadInput as error:
        print(f"dgkd_jax: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    def refuse(message: str) -> None:
        raise BadInput(f"{message}; try: python -m dgkd_jax.torch_port export --help")

    parser = argparse.ArgumentParser(prog="python -m dgkd_jax.torch_port", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export", help="write the student of a work directory for PyTorch", description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )  # fmt: skip
    parser.error = export.error = refuse  # argparse prints two lines, and exits from within
    export.add_argument("--workdir", required=True, type=epath.Path, help="of a finished or running run")
    export.add_argument("--output", required=True, type=epath.Path, help="FILE.safetensors or FILE.npz")
    export.add_argument("--step", default="last", type=step_argument, metavar="N|best|last", help="which checkpoint")
    export.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    return parser.parse_args(argv)


def step_argument(text: str) -> int | str:
    if text in ("best", "last"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor best nor last")
    return int(text)


def _export(arguments: argparse.Namespace) -> str:
    output = arguments.output
    if output.suffix not in weight_files.WRITABLE:
        raise BadInput(f"--output={output}: the name must end in {' or '.join(weight_files.WRITABLE)}")
    if output.exists() and not arguments.overwrite:
        raise BadInput(f"--output={output} exists already; give another name, or --overwrite to replace it")
    if not output.parent.is_dir():
        raise BadInput(f"--output={output}: there is no folder {output.parent}; make it first")
    student = read(arguments.workdir, step=arguments.step)
    content = encode(student, suffix=output.suffix)
    unfinished = output.with_name(f"{output.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(output)
    accuracy = "not evaluated" if student.accuracy is None else f"accuracy {100 * student.accuracy:.2f} %"
    return (
        f"{output}: {student.config.student.model} by {student.config.method} at step {student.step} ({accuracy} on "
        f"{student.about['name']}), {len(content) / 1e6:.1f} MB with PyTorch's names"
    )


def _read_json(workdir: epath.Path, file: str, *, must_have: str) -> dict[str, Any]:
    path = workdir / file
    if not path.exists():
        raise BadInput(
            f"--workdir={workdir}: no work directory of a run, {file} is not there "
            "(the command that started a run writes it again)"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path} is damaged ({error}); give the command that started the run once more") from error
    if not isinstance(content, dict) or must_have not in content:
        raise BadInput(f"--workdir={workdir}: no work directory of a run, its {file} is another program's")
    return content


def _nothing_saved(workdir: epath.Path) -> BadInput:
    return BadInput(f"--workdir={workdir}: no checkpoint yet; the first comes with the first evaluation")


def _model(config: ConfigDict, about: dict[str, Any]) -> Any:
    try:
        return models.create(config.student.model, num_classes=about["num_classes"])
    except ValueError as error:  # a network of another version, or files edited by hand
        raise BadInput(f"config.json or student.json of the work directory: {error}") from error


def _abstract_state(config: ConfigDict, about: dict[str, Any]) -> Any:
    variables = models.shapes(_model(config, about), tuple(about["image_shape"]))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.abstract_state(config, variables),
    )


def _restore(checkpoints: checkpoint.Checkpoints, like: Any, step: int | None) -> tuple[Any, dict[str, Any]]:
    if step is not None and step not in checkpoints.steps:
        there = ", ".join(map(str, checkpoints.steps))
        raise BadInput(f"no checkpoint of step {step} in {checkpoints.directory}; there are {there}, best and last")
    return checkpoints.restore(like, step=step)
