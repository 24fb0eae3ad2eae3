"""The main job: a teacher, students distilled from it by each method asked for, and what came out."""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax import (
    checkpoint,
    models,
    predictions,
    program,
    sharding,
    steps,
    teacher_cache,
    torch_port,
    train,
    weight_files,
)
from dgkd_jax import config as config_rules
from dgkd_jax import data as data_lib
from dgkd_jax.errors import BadInput
from dgkd_jax.progress import duration

# Evaluation batches that a teacher is tried on before the first step.
_TRIAL_BATCHES = 8


class Taught(NamedTuple):
    """A teacher ready for use.

    Attributes:
        row: about it, for `result.json`.
        evaluation: its accuracies, for the row; computed when first asked for.
    """

    teacher: program.Teacher
    row: dict[str, Any]
    evaluation: Callable[[], dict[str, float]]


def run(
    config: ConfigDict, workdir: str | None = None, *, stop: Callable[[], bool] = lambda: False
) -> list[dict[str, Any]]:
    """Distil by `config.method` (or by each method, for `all`), reusing what earlier runs left.

    Args:
        config: validated.
        workdir: of the one method; the parent of one folder per method for `all`. None: runs/NAME/METHOD-seedSEED.
        stop: as `train.fit`.

    Returns:
        The content of each method's `result.json`, in order.

    Raises:
        BadInput: the data set, the teacher's weights or the work directory cannot be used.
        NumericFailure, StorageFailure, Preempted: as `train.fit`.
    """
    methods = steps.METHODS if config.method == "all" else (config.method,)
    source, mesh, taught = prepare(config, methods, stop=stop)
    cache = _open_cache(config, methods, source, taught) if taught and config.teacher.cache else None
    root = root_of(config)
    targets = {}
    for method in methods:
        folder = f"{method}-seed{config.seed}"
        if workdir is None:
            targets[method] = root / folder
        else:
            targets[method] = epath.Path(workdir) / (folder if config.method == "all" else "")
    if taught and any(train.latest_step(target) is None for method, target in targets.items() if method != "ce"):
        _try_teacher(config, taught, as_seen_by_teacher(source, config.teacher), mesh)
    return [_distil(config, method, target, source, mesh, taught, cache, stop) for method, target in targets.items()]


def root_of(config: ConfigDict) -> epath.Path:
    """The folder of a configuration's runs, unless others are given."""
    return epath.Path("runs") / (config.name + ("-mock" if config.data.mock else ""))


def prepare(
    config: ConfigDict, methods: tuple[str, ...], *, stop: Callable[[], bool]
) -> tuple[data_lib.Source, Mesh, Taught | None]:
    """The data set, the devices and, for methods other than `ce`, the teacher, trained here if need be.

    Raises:
        As `run`.
    """
    _check_present(config, methods)
    try:
        mesh = sharding.make_mesh(fsdp=config.mesh.fsdp)
    except ValueError as error:
        raise BadInput(f"config.{error}") from error
    source = data_lib.open_source(config.data)
    return source, mesh, _teach(config, root_of(config), source, mesh, stop) if set(methods) - {"ce"} else None


def _open_cache(
    config: ConfigDict, methods: tuple[str, ...], source: data_lib.Source, taught: Taught
) -> teacher_cache.Cache:
    """The teacher's cached logits, found to fit every method before the first one starts."""
    folder = epath.Path(config.teacher.cache)
    cache = teacher_cache.Cache(folder, config, teacher=taught.teacher.fingerprint, source=source)
    for method in methods:
        cache.check_objective(steps.objective_of(_with_method(config, method)))
    if jax.process_index() == 0:
        print(f"teacher's logits in training: {cache.about.description}, {folder}", file=sys.stderr)
    return cache


def _with_method(config: ConfigDict, method: str) -> ConfigDict:
    with (config := config.copy_and_resolve_references()).unlocked():
        config.method = method
    return config


def _check_present(config: ConfigDict, methods: tuple[str, ...]) -> None:
    """One message for everything that only the user can provide, before anything slow starts."""
    missing = []
    if not config.data.mock:
        missing.append(data_lib.missing(config.data))
        if set(methods) - {"ce"}:
            missing.append(_missing_weights(config.teacher))
    if set(methods) - {"ce"} and config.teacher.cache:
        missing.append(teacher_cache.missing(epath.Path(config.teacher.cache)))
    missing = [message for message in missing if message]
    if missing:
        raise BadInput("\n".join(missing))


def _missing_weights(teacher: ConfigDict) -> str | None:
    path = epath.Path(teacher.weights)
    if not teacher.weights or teacher.weights.startswith(weight_files.HUB) or path.exists():
        return None  # what the hub has shows when it is asked
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


def _teach(
    config: ConfigDict, root: epath.Path, source: data_lib.Source, mesh: Mesh, stop: Callable[[], bool]
) -> Taught:
    """The teacher: from PyTorch weights where the configuration names some, else trained once and kept."""
    source = as_seen_by_teacher(source, config.teacher)
    model = program.network(config.teacher.model, config.teacher.dtype, source=source)
    weights = config.teacher.weights
    if not weights:
        workdir = epath.Path(config.teacher.workdir) if config.teacher.workdir else root / "teacher"
        trained = train.fit(config_rules.of_teacher(config), workdir=workdir, source=source, mesh=mesh, stop=stop)
        variables, origin, seconds = trained.variables, str(workdir), trained.history.seconds
        history = trained.history

        def evaluation():
            return {"last_accuracy": history.last_accuracy, "best_accuracy": history.best_accuracy}
    else:
        if config.data.mock and not epath.Path(weights).exists():
            print(f"mock run: {weights} is no file here, the teacher has random weights", file=sys.stderr)
            host_variables, origin = models.initialise(model, source.image_shape, config.teacher.seed), "random"
        else:
            host_variables, origin = _ported(config, model, source), weights
        variables, seconds = sharding.place(host_variables, mesh), None

        @functools.cache
        def evaluation():
            accuracy = train.evaluate(config, model.apply, variables, source=source, mesh=mesh)["accuracy"]
            return {"last_accuracy": accuracy}

    fingerprint = checkpoint.fingerprint(variables)
    row = {
        "model": config.teacher.model,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "weights": origin,
        "fingerprint": fingerprint,
        "seconds": seconds,
    }
    teacher = program.Teacher(model.apply, variables, fingerprint, mean=source.mean, std=source.std)
    return Taught(teacher, row, evaluation)


def _try_teacher(config: ConfigDict, taught: Taught, source: data_lib.Source, mesh: Mesh) -> None:
    """Before the first step: a teacher that knows no more than chance is a mistake, not a teacher.

    Raises:
        BadInput: it has at most 3 standard errors more right answers than guessing has. Not on generated images.
    """
    correct, examples = train.count_correct(
        config, taught.teacher.apply, taught.teacher.variables, source=source, mesh=mesh, batches=_TRIAL_BATCHES
    )
    if jax.process_index() == 0:
        print(
            f"teacher {config.teacher.model} of {taught.row['weights']}: {100 * correct / examples:.2f} % of the first "
            f"{examples} images of {source.eval_split}; pixel mean {_rounded(source.mean)}, std {_rounded(source.std)}",
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


def _ported(config: ConfigDict, model: Any, source: data_lib.Source) -> Any:
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


def as_seen_by_teacher(source: data_lib.Source, teacher: ConfigDict) -> data_lib.Source:
    """The data set with the pixel mean and standard deviation that the teacher's weights know."""
    if not teacher.mean:
        return source
    if len(teacher.mean) != source.image_shape[-1]:
        raise BadInput(
            f"config.teacher.mean={tuple(teacher.mean)} is not allowed: one number for each of the "
            f"{source.image_shape[-1]} channels of {source.name}"
        )
    return dataclasses.replace(source, mean=tuple(teacher.mean), std=tuple(teacher.std))


def _rounded(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _distil(
    config: ConfigDict,
    method: str,
    workdir: epath.Path,
    source: data_lib.Source,
    mesh: Mesh,
    taught: Taught | None,
    cache: teacher_cache.Cache | None,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """One student by one method: trained, evaluated, and described in `workdir/result.json`."""
    config = _with_method(config, method)
    teacher, batches = (taught.teacher if steps.objective_of(config).needs_teacher else None), source
    if teacher and cache:
        # A run from a cache is another run than one with the live teacher: the numbers differ by the rounding.
        teacher = teacher._replace(fingerprint=f"{teacher.fingerprint}, {cache.about.description}")
        batches = teacher_cache.WithTeacher(source, cache)
    trained = train.fit(config, workdir=workdir, source=batches, mesh=mesh, teacher=teacher, stop=stop)
    predictions.leave_clean(
        workdir / "evaluations",
        student=predictions.Network(
            program.network(config.student.model, config.student.dtype, source=source).apply,
            trained.variables,
            source.mean,
            source.std,
        ),
        teacher=taught and taught.teacher,
        source=source,
        mesh=mesh,
        eval_batch_size=config.eval_batch_size,
        step=config.epochs * source.steps_per_epoch(config.batch_size),
    )
    history = trained.history
    result = {
        "name": config.name,
        "method": method,
        "seed": config.seed,
        "workdir": str(workdir),
        "mock": config.data.mock,
        "evaluation": {
            "split": source.eval_split,
            "examples": source.num_eval,
            "note": "best_accuracy is the highest of all evaluations on this split, so it was chosen on it; "
            "last_accuracy was not",
        },
        "teacher": taught and _teacher_row(taught, workdir),
        "student": {
            "model": config.student.model,
            "parameters": trained.parameters,
            "last_accuracy": history.last_accuracy,
            "best_accuracy": history.best_accuracy,
            "best_epoch": history.best_step / source.steps_per_epoch(config.batch_size),
            "epochs": config.epochs,
            "seconds": history.seconds,
        },
        "machine": {
            "backend": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            **{package: version(package) for package in ("dgkd_jax", "jax", "flax")},
        },
    }
    if jax.process_index() == 0:
        (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def _teacher_row(taught: Taught, workdir: epath.Path) -> dict[str, Any]:
    """The teacher's row of `result.json`; its evaluation from there, where an earlier run left it."""
    try:
        before = json.loads((workdir / "result.json").read_text())["teacher"]
    except (FileNotFoundError, ValueError):
        before = None
    if before and before["fingerprint"] == taught.row["fingerprint"]:
        return before
    return taught.row | taught.evaluation()


def table(results: list[dict[str, Any]]) -> str:
    """The results of one data set as a table for the terminal."""
    first = results[0]
    rows = [("", "model", "parameters", "last", "best (epoch)", "training")]
    if first["teacher"]:
        rows.append(_row("teacher", first["teacher"]))
    rows += [_row(result["method"], result["student"]) for result in results]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_align(i, cell, width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    evaluation = first["evaluation"]
    mock = ", mock data: the accuracies mean nothing" if first["mock"] else ""
    return "\n".join(
        [
            f"{first['name']}: accuracy on {evaluation['examples']:,} images of split "
            f"'{evaluation['split']}', seed {first['seed']}{mock}",
            *(line.rstrip() for line in lines),
            "last: after the last epoch. best: the highest of all epochs, chosen on this same split.",
        ]
    )


def _row(title: str, network: dict[str, Any]) -> tuple[str, ...]:
    def percent(key: str) -> str:
        accuracy = network.get(key)
        return "–" if accuracy is None or math.isnan(accuracy) else f"{100 * accuracy:.2f} %"

    epoch = f" ({network['best_epoch']:.4g})" if "best_epoch" in network else ""
    seconds = network["seconds"]
    return (
        title,
        network["model"],
        f"{network['parameters']:,}",
        percent("last_accuracy"),
        percent("best_accuracy") + epoch,
        "–" if seconds is None else duration(seconds),
    )


def _align(column: int, cell: str, width: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)
