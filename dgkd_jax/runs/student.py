"""Reads a student from the work directory of a finished or running run."""

import argparse
import json
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dgkd_jax import models, own_code
from dgkd_jax.data import quiet
from dgkd_jax.errors import BadInput
from dgkd_jax.models import network, stored_program
from dgkd_jax.models.architecture import Architecture
from dgkd_jax.runs.checkpoint import Checkpoints
from dgkd_jax.runs.record import Record


class Student(NamedTuple):
    """A student from a work directory.

    Attributes:
        variables: {"params", "batch_stats"}, float32: the average where the run keeps one.
        config: of the run.
        about: content of student.json: the data set's name, num_classes, image_shape, mean, std; enable_x64.
        step: of the checkpoint.
        accuracy: at this step, in [0, 1]; None where it was not evaluated.
        taught_by: fingerprint of the teacher's weights; None where there was no teacher.
        program: of a network that is not one of `models.NAMES`, from `stored_program`; else None.
    """

    variables: dict[str, Any]
    config: ConfigDict
    about: dict[str, Any]
    step: int
    accuracy: float | None
    taught_by: str | None
    program: bytes | None = None

    def architecture(self, dtype: str = "float32", *, from_code: bool = False) -> Architecture:
        """The network, without variables, for evaluation.

        Args:
            dtype: as `network.create`'s; a user's own network has its own.
            from_code: import a user's own network, instead of reading the program that its run has kept.

        Raises:
            BadInput: it cannot be rebuilt: the files are from another version, or were edited by hand.
        """
        name = self.config.student.model
        if not own_code.is_own(name) or from_code:
            return network.create(
                name,
                dtype,
                role="student",
                data=self.about["name"],
                num_classes=self.about["num_classes"],
                image_shape=tuple(self.about["image_shape"]),
            )
        if self.program is None:
            raise BadInput(f"the network {name} cannot be rebuilt: {stored_program.FILE} is missing")
        try:
            apply = stored_program.from_bytes(self.program)
        except ValueError as error:
            raise BadInput(f"{stored_program.FILE} of the work directory is damaged: {error}") from error
        return Architecture(
            name,
            apply,
            shapes=lambda _: jax.eval_shape(lambda: self.variables),
            initialise=lambda image_shape, seed: self.variables,
            gives_features=False,
        )

    @property
    def model(self) -> Any:
        """The Linen module, without variables.

        Raises:
            BadInput: it is a user's own; or no network has this name: the files are from another version, or were
                edited by hand.
        """
        if own_code.is_own(self.config.student.model):
            raise BadInput(f"the student is a network of its own, {self.config.student.model}, not of models.NAMES")
        try:
            return models.create(self.config.student.model, num_classes=self.about["num_classes"])
        except ValueError as error:
            raise BadInput(f"config.json or student.json of the work directory: {error}") from error


@quiet.meanwhile()
def read(workdir: epath.PathLike, *, step: int | str = "last") -> Student:
    """Read the student of a finished or running run from a checkpoint whose digest is right.

    Args:
        step: of the checkpoint; `last`: the newest undamaged one; `best`: the one with the best score so far.

    Raises:
        BadInput: no work directory, no such checkpoint, or no usable one.
    """
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    about = _read_json(workdir, "student.json", must_have="enable_x64")
    if not (workdir / "checkpoints").is_dir():
        raise _nothing_saved(workdir)
    with (
        jax.enable_x64(about["enable_x64"]),
        Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints, read_only=True) as checkpoints,
    ):
        if not checkpoints.steps:
            raise _nothing_saved(workdir)
        state, record = _restore(checkpoints, None if isinstance(step, str) else step)
        if step == "best":
            state, record = _restore(checkpoints, record.history.best_step)
        return Student(
            variables=jax.tree.map(np.asarray, _evaluated(state)),
            config=config,
            about=about,
            step=int(state["step"]),
            accuracy=record.accuracy,
            taught_by=record.teacher and record.teacher.fingerprint,
            program=_program(workdir),
        )


def read_config(workdir: epath.Path) -> ConfigDict:
    """The configuration of the run that a work directory belongs to.

    Raises:
        BadInput: there is none, or it is damaged.
    """
    return ConfigDict(_read_json(workdir, "config.json", must_have="keep_checkpoints"))


def is_finished(workdir: epath.Path) -> bool:
    """Whether a work directory holds its run's last checkpoint. Runs of older versions do not say which it is: true."""
    with Checkpoints(workdir / "checkpoints", keep=1, read_only=True) as checkpoints:
        latest = checkpoints.latest_step
    total = _read_json(workdir, "student.json", must_have="enable_x64").get("total_steps", latest)
    return latest is not None and latest >= total


def step_argument(text: str) -> int | str:
    """Parse the value of a command's --step."""
    if text in ("best", "last"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor best nor last")
    return int(text)


def _evaluated(state: dict[str, Any]) -> dict[str, Any]:
    """`TrainState.evaluated` for a state restored as nested dictionaries, in which empty collections are missing."""
    found = state.get("ema") or state
    return {"params": found["params"], "batch_stats": found.get("batch_stats") or {}}


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


def _program(workdir: epath.Path) -> bytes | None:
    path = workdir / stored_program.FILE
    return path.read_bytes() if path.exists() else None


def _nothing_saved(workdir: epath.Path) -> BadInput:
    return BadInput(f"--workdir={workdir}: no checkpoint yet; the first comes with the first evaluation")


def _restore(checkpoints: Checkpoints, step: int | None) -> tuple[dict[str, Any], Record]:
    if step is not None and step not in checkpoints.steps:
        there = ", ".join(map(str, checkpoints.steps))
        raise BadInput(f"no checkpoint of step {step} in {checkpoints.directory}; there are {there}, best and last")
    state, record = checkpoints.restore(step=step)
    return state, Record.from_json(record)
