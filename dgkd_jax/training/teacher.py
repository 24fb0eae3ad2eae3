"""Gets a run's teacher, from PyTorch weights or by training it once, and checks its accuracy before the first step."""

import functools
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax import models, own_code, torch_port
from dgkd_jax.data.source import Description, Source
from dgkd_jax.errors import BadInput
from dgkd_jax.evaluate.evaluator import Evaluator, clean
from dgkd_jax.evaluate.taught_by import GIVEN
from dgkd_jax.models import network
from dgkd_jax.models.architecture import Architecture
from dgkd_jax.models.host_network import HostNetwork
from dgkd_jax.models.network import Network
from dgkd_jax.runs import checkpoint, sharding, student
from dgkd_jax.runs import config as config_rules
from dgkd_jax.runs import workdir as workdir_lib
from dgkd_jax.torch_port import files as weight_files
from dgkd_jax.training import loop
from dgkd_jax.training.given import FlaxTeacher

# Number of evaluation batches for the check of the teacher's accuracy.
_TRIAL_BATCHES = 8


class Taught(NamedTuple):
    """A teacher ready for use.

    Attributes:
        network: with variables on the mesh, and a fingerprint.
        row: its entry in `result.json`, without accuracies.
        evaluation: gives its accuracies for that entry; computed at the first call.
    """

    network: Network | HostNetwork
    row: dict[str, Any]
    evaluation: Callable[[], dict[str, float]]


def check_weights(teacher: ConfigDict) -> None:
    """Refuse what cannot be a file of weights, before anything slow begins.

    Raises:
        BadInput: it is an address, or a folder.
    """
    weights = teacher.weights
    if re.match(r"(https?|ftp)://", weights):
        raise BadInput(
            f"config.teacher.weights={weights} is an address on the web: download it first: curl -fLO {weights}, "
            "and name the file"
        )
    if weights and not weights.startswith(weight_files.HUB) and epath.Path(weights).is_dir():
        raise BadInput(f"config.teacher.weights={weights} is a folder; name a file in it (.pth, .safetensors or .npz)")


def missing_weights(teacher: ConfigDict) -> str | None:
    """What to do if the weights that the config names are missing; None if they are there."""
    if not teacher.weights or teacher.weights.startswith(weight_files.HUB) or epath.Path(teacher.weights).exists():
        return None  # whether the hub has it shows when it is fetched
    path = epath.Path(teacher.weights)
    source = torch_port.DOWNLOADS.get(path.name)
    provide = (
        f"mkdir -p '{path.parent}' && curl -fLo '{path}' {source}"
        if source
        else "put PyTorch weights there (.pth, .safetensors or .npz)"
    )
    return (
        f"The teacher's weights are missing: {teacher.model}, looked for at {path.resolve()}.\n"
        f"  Provide them:  {provide}\n"
        "  Or name others with --config.teacher.weights=FILE, or train a teacher first with --config.teacher.weights=''"
    )


def teach(config: ConfigDict, root: epath.Path, source: Source, mesh: Mesh, stop: Callable[[], bool]) -> Taught:
    """The teacher: from PyTorch weights if the config names some, else trained once and kept.

    Args:
        root: the folder of the config's runs.
        stop: as for `loop.fit`.

    Raises:
        BadInput: the weights do not fit the network, or the teacher's folder cannot be used.
        NumericFailure, StorageFailure, Preempted: as for `loop.fit`.
    """
    mean, std = _pixels(config.teacher, source)
    if config.teacher.weights:
        taught = functools.partial(_from_weights, config, source, mesh)
    else:
        taught = functools.partial(_trained, config, root, source, mesh, stop)
    return sharding.made_for(mesh, taught)(mean, std)


def untaught(config: ConfigDict, source: Description, mesh: Mesh) -> Network:
    """The teacher with shapes in place of its variables: what a program that uses it is compiled with.

    It is `config.teacher.model`, also where another run's network would be taken (`config.teacher.workdir`).

    Raises:
        BadInput: the network cannot take the images, or the pixels' statistics do not fit them.
    """
    mean, std = _pixels(config.teacher, source)
    architecture = sharding.made_for(mesh, network.of_section)(config.teacher, source, role="teacher")
    return network.of(architecture, sharding.shapes(architecture.shapes(source.image_shape), mesh), mean=mean, std=std)


def _trained(
    config: ConfigDict,
    root: epath.Path,
    source: Source,
    mesh: Mesh,
    stop: Callable[[], bool],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Taught:
    workdir = epath.Path(config.teacher.workdir) if config.teacher.workdir else root / "teacher"
    if recorded := workdir_lib.identity_of(workdir):
        # A network that Python gave cannot be trained here, so the folder is its finished run.
        if config.teacher.workdir and (
            own_code.is_given(config.teacher.model) or _is_other_finished_run(workdir, recorded, config)
        ):
            return _from_run(config, workdir, source, mesh)
        config_rules.check_same_teacher(recorded, config, workdir=workdir)
    own = config_rules.of_teacher(config)
    try:
        trained = loop.fit(own, workdir=workdir, source=source, mesh=mesh, wait=True, stop=stop)
    except BadInput as problem:
        raise BadInput(config_rules.in_teachers_keys(str(problem))) from problem
    history = trained.history
    accuracies = {"last_accuracy": history.last_accuracy, "best_accuracy": history.best_accuracy}
    # Built anew for evaluation: the module that it was trained with has BatchNorm groups.
    module = network.of_section(config.teacher, source, role="teacher")
    return _taught(config, module, trained.variables, mean, std, str(workdir), history.seconds, lambda _: accuracies)


def _is_other_finished_run(workdir: epath.Path, recorded: dict[str, Any], config: ConfigDict) -> bool:
    """Whether a folder holds a finished run, of any method and network, that is not this teacher's own training."""
    same = recorded == config_rules.identity(config_rules.of_teacher(config))
    return not same and student.is_finished(workdir)


def _from_run(config: ConfigDict, workdir: epath.Path, source: Source, mesh: Mesh) -> Taught:
    """The student (or teacher) that a finished run has left."""
    if not student.is_finished(workdir):
        raise BadInput(
            f"config.teacher.workdir={workdir} holds a run that has not ended; let it end first, by the call or the "
            "command that began it"
        )
    read = student.read(workdir)
    shape, classes = tuple(read.about["image_shape"]), read.about["num_classes"]
    if shape != source.image_shape or classes != source.num_classes:
        raise BadInput(
            f"config.teacher.workdir={workdir}: its network sees images of shape {shape} and {classes} classes, and "
            f"{source.name} has {source.image_shape} and {source.num_classes}"
        )
    if jax.process_index() == 0:
        told = f"{read.config.student.model} by {read.config.method}, {read.config.epochs} epochs"
        print(f"the teacher is the network of the finished run {workdir}: {told}", file=sys.stderr)
    given = config.teacher.mean, config.teacher.std
    mean, std = given if config.teacher.mean else (tuple(read.about["mean"]), tuple(read.about["std"]))
    placed, evaluated = sharding.place(read.variables, mesh), _evaluated(config, source, mesh)
    return _taught(config, read.architecture(config.teacher.dtype), placed, mean, std, str(workdir), None, evaluated)


def _from_weights(
    config: ConfigDict, source: Source, mesh: Mesh, mean: tuple[float, ...], std: tuple[float, ...]
) -> Taught:
    architecture, weights = network.of_section(config.teacher, source, role="teacher"), config.teacher.weights
    if config.data.mock and not epath.Path(weights).exists():
        print(f"mock run: {weights} is no file here, the teacher has random weights", file=sys.stderr)
        variables, origin = architecture.initialise(source.image_shape, config.teacher.seed), "random"
    else:
        variables, origin = _ported(config, source), weights
    placed = sharding.place(variables, mesh)
    return _taught(config, architecture, placed, mean, std, origin, None, _evaluated(config, source, mesh))


def from_object(config: ConfigDict, given: FlaxTeacher | HostNetwork, source: Source, mesh: Mesh) -> Taught:
    """A teacher that Python gave.

    Raises:
        BadInput: a teacher on the host cannot be used here, or the pixels' statistics do not fit the images.
    """
    evaluated = _evaluated(config, source, mesh)
    if isinstance(given, FlaxTeacher):
        mean, std = _pixels(config.teacher, source)
        placed = sharding.place(given.variables, mesh)
        return _taught(config, given.architecture, placed, mean, std, GIVEN, None, evaluated)
    if jax.process_count() > 1:
        raise BadInput(
            f"the teacher {given.name} runs outside JAX, in one process only: make its logits in one, then train with "
            "teacher.cache"
        )
    row = {
        "model": given.name,
        "parameters": None,
        "weights": GIVEN,
        "fingerprint": given.fingerprint,
        "seconds": None,
    }
    return Taught(given, row, functools.cache(lambda: evaluated(given)))


def _evaluated(config: ConfigDict, source: Source, mesh: Mesh) -> Callable[[Network | HostNetwork], dict[str, float]]:
    """A function: teacher -> its accuracy for `result.json`."""

    def accuracies(teacher: Network | HostNetwork) -> dict[str, float]:
        evaluator = Evaluator(mesh, batch_size=config.eval_batch_size)
        correct, examples = evaluator.count(teacher, clean(source), batches=source.num_eval)
        return {"last_accuracy": correct / examples}

    return accuracies


def _taught(
    config: ConfigDict,
    architecture: Architecture,
    variables: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    origin: str,
    seconds: float | None,
    accuracies: Callable[[Network], dict[str, float]],
) -> Taught:
    teacher = network.of(architecture, variables, mean=mean, std=std, fingerprint=checkpoint.fingerprint(variables))
    row = {
        "model": architecture.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "weights": origin,
        "fingerprint": teacher.fingerprint,
        "seconds": seconds,
    }
    return Taught(teacher, row, functools.cache(lambda: accuracies(teacher)))


def _ported(config: ConfigDict, source: Source) -> Any:
    if config.teacher.model not in models.NAMES:
        raise BadInput(
            f"config.teacher.weights={config.teacher.weights}: PyTorch's weights are for the networks of "
            f"dgkd_jax.models.NAMES, and config.teacher.model={config.teacher.model!r} is none; give a finished run of "
            "it, config.teacher.workdir=DIR, or teacher=(module, variables) in Python"
        )
    model = models.create(config.teacher.model, num_classes=source.num_classes)
    entries = torch_port.load(config.teacher.weights)
    try:
        return torch_port.from_torch(entries, model, config.teacher.model, image_shape=source.image_shape)
    except BadInput as problem:
        advice = (
            f" If only the number of classes differs ({source.num_classes} here): list all of the weights' classes in "
            f"{config.data.manual_dir}/classes.txt, one folder name a line, in their order"
            if source.name == "image_folder"
            else ""
        )
        raise BadInput(f"config.teacher.weights={config.teacher.weights}: {problem}{advice}") from problem


def _pixels(teacher: ConfigDict, source: Description) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Pixel mean and standard deviation that the teacher's weights were trained with."""
    if not teacher.mean:
        return source.mean, source.std
    if len(teacher.mean) != source.image_shape[-1]:
        raise BadInput(
            f"config.teacher.mean={tuple(teacher.mean)} is not allowed: one number for each of the "
            f"{source.image_shape[-1]} channels of {source.name}"
        )
    return tuple(teacher.mean), tuple(teacher.std)


def try_teacher(config: ConfigDict, taught: Taught, source: Source, mesh: Mesh) -> None:
    """Check the teacher before the first step: one that is no better than chance is a mistake.

    Raises:
        BadInput: it gives probabilities instead of logits, or its correct answers exceed chance by at most 3 standard
            errors. The latter is not checked on generated images.
    """
    evaluator = Evaluator(mesh, batch_size=config.eval_batch_size)
    name = taught.row["model"]
    _check_logits(evaluator.first_logits(taught.network, clean(source)), name=name)
    correct, examples = evaluator.count(taught.network, clean(source), batches=_TRIAL_BATCHES)
    pixels = "as uint8"
    if isinstance(taught.network, Network):
        mean, std = (" ".join(f"{value:.4g}" for value in each) for each in (taught.network.mean, taught.network.std))
        pixels = f"mean {mean}, std {std}"
    if jax.process_index() == 0:
        print(
            f"teacher {name} of {taught.row['weights']}: {100 * correct / examples:.2f} % of the first "
            f"{examples} images of {source.eval_split}; pixel {pixels}",
            file=sys.stderr,
        )
    chance = 1 / source.num_classes
    if not config.data.mock and correct <= chance * examples + 3 * math.sqrt(chance * (1 - chance) * examples):
        raise BadInput(
            f"the teacher {name} ({taught.row['weights']}) is right on {correct} of {examples} images "
            f"of split {source.eval_split!r}, where guessing is right on {chance * examples:.0f}. Likely causes: the "
            "pixels are normalised otherwise than in its training (config.teacher.mean, std), its classes are in "
            "another order than this data set's, or its head was not trained for these classes."
        )


def _check_logits(logits: np.ndarray, *, name: str) -> None:
    """Raise BadInput where logits `[examples, classes]` are probabilities or not finite."""
    if not np.isfinite(logits).all():
        raise BadInput(f"the teacher {name} gives logits that are NaN or infinite on the evaluation split")
    if (logits >= 0).all() and np.abs(logits.sum(axis=1) - 1).max() < 1e-3:
        raise BadInput(
            f"the teacher {name} gives probabilities, each row sums to 1; it must give logits: leave the softmax out, "
            "or take the logarithm"
        )
