"""Gets a run's teacher, from PyTorch weights or by training it once, and checks its accuracy before the first step."""

import functools
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax import models, torch_port
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput
from dgkd_jax.evaluate.evaluator import Evaluator, clean
from dgkd_jax.models import network
from dgkd_jax.models.network import Network
from dgkd_jax.runs import checkpoint, sharding
from dgkd_jax.runs import config as config_rules
from dgkd_jax.runs import workdir as workdir_lib
from dgkd_jax.torch_port import files as weight_files
from dgkd_jax.training import loop

# Number of evaluation batches for the check of the teacher's accuracy.
_TRIAL_BATCHES = 8


class Taught(NamedTuple):
    """A teacher ready for use.

    Attributes:
        network: with variables on the mesh, and a fingerprint.
        row: its entry in `result.json`, without accuracies.
        evaluation: gives its accuracies for that entry; computed at the first call.
    """

    network: Network
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
    return taught(mean, std)


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
        config_rules.check_same_teacher(recorded, config, workdir=workdir)
    trained = loop.fit(config_rules.of_teacher(config), workdir=workdir, source=source, mesh=mesh, wait=True, stop=stop)
    history = trained.history
    accuracies = {"last_accuracy": history.last_accuracy, "best_accuracy": history.best_accuracy}
    # Built anew for evaluation: the module that it was trained with has BatchNorm groups.
    apply = _module(config, source).apply
    return _taught(config, apply, trained.variables, mean, std, str(workdir), history.seconds, lambda _: accuracies)


def _from_weights(
    config: ConfigDict, source: Source, mesh: Mesh, mean: tuple[float, ...], std: tuple[float, ...]
) -> Taught:
    model, weights = _module(config, source), config.teacher.weights
    if config.data.mock and not epath.Path(weights).exists():
        print(f"mock run: {weights} is no file here, the teacher has random weights", file=sys.stderr)
        variables, origin = models.initialise(model, source.image_shape, config.teacher.seed), "random"
    else:
        variables, origin = _ported(config, model, source), weights

    def accuracies(teacher: Network) -> dict[str, float]:
        evaluation = Evaluator(mesh, batch_size=config.eval_batch_size)(teacher, clean(source))
        return {"last_accuracy": evaluation.metrics["accuracy"]}

    return _taught(config, model.apply, sharding.place(variables, mesh), mean, std, origin, None, accuracies)


def _module(config: ConfigDict, source: Source) -> Any:
    return network.create(
        config.teacher.model,
        config.teacher.dtype,
        data=source.name,
        num_classes=source.num_classes,
        image_shape=source.image_shape,
    )


def _taught(
    config: ConfigDict,
    apply: network.Apply,
    variables: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    origin: str,
    seconds: float | None,
    accuracies: Callable[[Network], dict[str, float]],
) -> Taught:
    teacher = Network(apply, variables, mean, std, checkpoint.fingerprint(variables))
    row = {
        "model": config.teacher.model,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "weights": origin,
        "fingerprint": teacher.fingerprint,
        "seconds": seconds,
    }
    return Taught(teacher, row, functools.cache(lambda: accuracies(teacher)))


def _ported(config: ConfigDict, model: Any, source: Source) -> Any:
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


def _pixels(teacher: ConfigDict, source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
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
        BadInput: its correct answers exceed chance by at most 3 standard errors. Not checked on generated images.
    """
    evaluator = Evaluator(mesh, batch_size=config.eval_batch_size)
    correct, examples = evaluator.count(taught.network, clean(source), batches=_TRIAL_BATCHES)
    mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (taught.network.mean, taught.network.std))
    if jax.process_index() == 0:
        print(
            f"teacher {config.teacher.model} of {taught.row['weights']}: {100 * correct / examples:.2f} % of the first "
            f"{examples} images of {source.eval_split}; pixel mean {mean}, std {std}",
            file=sys.stderr,
        )
    chance = 1 / source.num_classes
    if not config.data.mock and correct <= chance * examples + 3 * math.sqrt(chance * (1 - chance) * examples):
        raise BadInput(
            f"the teacher {config.teacher.model} ({taught.row['weights']}) is right on {correct} of {examples} images "
            f"of split {source.eval_split!r}, where guessing is right on {chance * examples:.0f}. Likely causes: the "
            "pixels are normalised otherwise than in its training (config.teacher.mean, std), its classes are in "
            "another order than this data set's, or its head was not trained for these classes."
        )
