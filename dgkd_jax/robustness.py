"""A run's student beside its teacher, on its own test split and on corrupted, scrambled and foreign sets.

    python -m dgkd_jax.evaluate --workdir=DIR --data=NAME[,NAME…] [--step=best|last|N] [--output=FOLDER]

  clean                   the evaluation split of the run
  gaussian_noise-3        a common corruption of it and its severity, 1 to 5; without a number: all five, and their mean
  corruptions             all of gaussian_noise, shot_noise, impulse_noise, defocus_blur, gaussian_blur, contrast,
                          brightness, pixelate and jpeg_compression
  noised-8                Gaussian noise in a square of 8 pixels; noised-8-wrapped: as the DGKD repository adds it
  scrambled-4             squares of 4 pixels in random order
  image_folder:PATH       images in PATH/<class>/*, or PATH/test|validation|val/<class>/*: a stylised set, for example
  tfds:NAME[:SPLIT]       any image set of TFDS: tfds:cifar10_corrupted/fog_1, tfds:imagenet_v2, tfds:imagenet_r

Prints a table, and leaves evaluations/NAME.json and NAME.npz in the work directory. Runs in one process.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dgkd_jax import checkpoint, export, models, predictions, program, sharding, torch_port
from dgkd_jax import config as config_rules
from dgkd_jax import data as data_lib
from dgkd_jax.data import corrupt
from dgkd_jax.errors import BadInput

_NUMBERED = re.compile(r"(?P<kind>[a-z_]+)-(?P<number>\d+)(?P<wrapped>-wrapped)?")
_EXAMPLES = ("noised-8", "noised-8-wrapped", "scrambled-4", "image_folder:PATH", "tfds:NAME")


class EvaluationSet(NamedTuple):
    """Something to evaluate on.

    Attributes:
        name: as it was asked for.
        num_examples: in it.
        batches: batch size -> batches, padded, with a mask.
        corruption: of the images, on the device; None = they are taken as they are.
        classes: the network's classes to choose among; None = all.
    """

    name: str
    num_examples: int
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    corruption: predictions.Corruption | None = None
    classes: tuple[int, ...] | None = None


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""
    try:
        for name, value in {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}.items():
            os.environ.setdefault(name, value)  # before TensorFlow is imported, or it chats
        logging.getLogger().setLevel(logging.ERROR)
        print(_evaluate(_arguments(argv)))
    except BadInput as error:
        print(f"dgkd_jax: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    def refuse(message: str) -> None:
        raise BadInput(f"{message}; try: python -m dgkd_jax.evaluate --help")

    parser = argparse.ArgumentParser(
        prog="python -m dgkd_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse  # argparse prints two lines, and exits from within
    parser.add_argument("--workdir", required=True, type=epath.Path, help="of a finished or running run")
    parser.add_argument("--data", required=True, metavar="NAME[,NAME…]", help="what to evaluate on")
    parser.add_argument(
        "--step", default="last", type=export.step_argument, metavar="N|best|last", help="default: last"
    )
    parser.add_argument("--output", type=epath.Path, metavar="FOLDER", help="default: WORKDIR/evaluations")
    parser.add_argument("--teacher", metavar="WHERE", help="its work directory or weights, if moved; or none")
    parser.add_argument("--data_dir", metavar="DIR", help="TFDS's folder; default: the run's")
    parser.add_argument("--seed", default=0, type=int, help="of noise and scrambles; default 0")
    return parser.parse_args(argv)


def _evaluate(arguments: argparse.Namespace) -> str:
    student = export.read(arguments.workdir, step=arguments.step)
    config = student.config
    if arguments.data_dir:
        config.data.dir = arguments.data_dir
    if config.compilation_cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache))
    run = SimpleNamespace(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in student.about.items()}
    )
    precise = contextlib.nullcontext()
    if config.matmul_precision != "default":
        precise = jax.default_matmul_precision(config.matmul_precision)
    with jax.enable_x64(run.enable_x64), precise:
        sets = evaluation_sets(arguments.data, run=run, data=config.data, seed=arguments.seed)
        mesh = sharding.make_mesh()
        model = program.network(config.student.model, config.student.dtype, source=run)
        network = predictions.Network(model.apply, sharding.place(student.variables, mesh), run.mean, run.std)
        teacher = _teacher(student, arguments.workdir, arguments.teacher, run, mesh)
        predict = predictions.Predictor(network, teacher, mesh=mesh)
        summaries = []
        for number, chosen in enumerate(sets, start=1):
            if sys.stderr.isatty():
                print(f"\r\033[K{number} of {len(sets)}: {chosen.name}", end="", file=sys.stderr, flush=True)
            batch_size = predict.batch_size(config.eval_batch_size, chosen.num_examples)
            rows = predict(
                chosen.batches(batch_size),
                num_examples=chosen.num_examples,
                batch_size=batch_size,
                corruption=chosen.corruption,
                classes=chosen.classes,
            )
            values = predictions.summary(rows, data=chosen.name, step=student.step, classes=chosen.classes)
            predictions.write(arguments.output or arguments.workdir / "evaluations", values, rows)
            summaries.append(values)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
    taught = f", teacher {config.teacher.model}" if teacher else ""
    title = f"{arguments.workdir}: student {config.student.model} by {config.method} at step {student.step}{taught}"
    return f"{title}\n{table(summaries)}"


def evaluation_sets(names: str, *, run: Any, data: Any, seed: int = 0) -> list[EvaluationSet]:
    """The sets of a comma-separated list, opened; a name that says several is replaced by them.

    Args:
        names: see the top of this file.
        run: what the networks see: num_classes, image_shape, mean, std (the work directory's student.json).
        data: the section `data` of the run's configuration.
        seed: of noise and scrambles.

    Raises:
        BadInput: an unknown name, a side that does not fit the images, or a set that cannot be opened.
    """
    expanded = [single for name in names.split(",") for single in _expand(name.strip())]
    changes = {name: _change(name, run.image_shape, seed) for name in expanded if not _is_foreign(name)}
    source = data_lib.open_source(data) if changes else None
    opened = []
    for name in dict.fromkeys(expanded):
        if name in changes:
            on_host, on_device = changes[name]
            opened.append(EvaluationSet(name, source.num_eval, functools.partial(_batches, source, on_host), on_device))
            continue
        from dgkd_jax.data import test_sets  # imports TFDS

        kind, _, where = name.partition(":")
        if kind == "tfds":
            tfds_name, _, split = where.partition(":")
            foreign = test_sets.open_tfds(tfds_name, split, run=run, data=data)
        else:
            foreign = test_sets.open_folder(where, run=run, data=data)
        opened.append(EvaluationSet(name, foreign.source.num_eval, foreign.batches, classes=foreign.restricted_to))
    return opened


def _is_foreign(name: str) -> bool:
    return name.startswith(("tfds:", "image_folder:"))


def _expand(name: str) -> list[str]:
    if name == "corruptions":
        return [f"{corruption}-{severity}" for corruption in corrupt.CORRUPTIONS for severity in corrupt.SEVERITIES]
    if name in corrupt.CORRUPTIONS:
        return [f"{name}-{severity}" for severity in corrupt.SEVERITIES]
    return [name]


def _change(name: str, image_shape: tuple[int, ...], seed: int) -> tuple[Callable | None, Callable | None]:
    """What is done to the images: on the host, on the device."""
    if name == "clean":
        return None, None
    match = _NUMBERED.fullmatch(name)
    kind, number = (match["kind"], int(match["number"])) if match else (name, None)
    wrapped = bool(match and match["wrapped"])
    if kind == "noised" and number is not None:
        largest = corrupt.largest_noise_patch(image_shape)
        if not 1 <= number <= largest:
            raise BadInput(
                f"--data={name}: a side of 1 to {largest} pixels fits between the patch's corner and the edge"
            )
        return None, functools.partial(corrupt.noise_patch, side=number, wrapped=wrapped, seed=seed)
    if kind == "scrambled" and number is not None and not wrapped:
        sides = corrupt.patch_sides(image_shape)
        if number not in sides:
            height, width = image_shape[:2]
            raise BadInput(
                f"--data={name}: patches of {number} pixels do not divide an image of {height}x{width} into several; "
                f"these do: {', '.join(map(str, sides))}"
            )
        return None, functools.partial(corrupt.scramble_patches, side=number, seed=seed)
    if kind in corrupt.CORRUPTIONS and not wrapped:
        if number not in corrupt.SEVERITIES:
            raise BadInput(f"--data={name}: the severity is 1 to 5, or left out for all five")
        if kind in corrupt.ON_HOST:
            return functools.partial(corrupt.jpeg_compression, severity=number), None
        return None, functools.partial(corrupt.corrupt, name=kind, severity=number, seed=seed)
    known = ("clean", "corruptions", *corrupt.CORRUPTIONS, *_EXAMPLES)
    raise BadInput(
        f"--data={name}: no such set{config_rules.nearest(name, known)} There are {', '.join(known)}; "
        "a corruption may have a severity: contrast-3"
    )


def _batches(source: Any, on_host: Callable | None, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    for batch in source.eval_batches(batch_size=batch_size):
        yield batch if on_host is None else {**batch, "image": on_host(batch["image"])}


def _teacher(
    student: export.Student, workdir: epath.Path, given: str | None, run: Any, mesh: Mesh
) -> predictions.Network | None:
    """The teacher that the run had, found where the run recorded it, or else beside the run; or where it is `given`.

    Raises:
        BadInput: it is not there, or has other weights than those that the student was taught by.
    """
    config = student.config
    where = given or _recorded_teacher(workdir, config)
    if where in (None, "none"):
        return None
    model = program.network(config.teacher.model, config.teacher.dtype, source=run)
    path = epath.Path(where)
    if not path.exists() and given is None:
        path = workdir.resolve().parent / path.name  # the runs' folder was moved
    if where == "random":
        variables = models.initialise(model, run.image_shape, config.teacher.seed)
    elif (path / "config.json").exists():
        variables = export.read(path).variables
    elif path.is_file() or where.startswith("hf:"):
        state_dict = torch_port.load(str(path) if path.is_file() else where)
        variables = torch_port.from_torch(state_dict, model, config.teacher.model, image_shape=run.image_shape)
    else:
        raise BadInput(
            f"the teacher is not at {where}: say where it is with --teacher=WORKDIR or --teacher=FILE, "
            "or --teacher=none to leave it out"
        )
    variables = sharding.place(variables, mesh)
    found = checkpoint.fingerprint(variables)
    if student.taught_by not in (None, found):
        raise BadInput(
            f"the teacher at {path if path.exists() else where} is not the one that taught this student (weights "
            f"{student.taught_by}, found {found}): say where that is with --teacher=WHERE, or --teacher=none"
        )
    mean, std = tuple(config.teacher.mean) or run.mean, tuple(config.teacher.std) or run.std
    return predictions.Network(model.apply, variables, mean, std)


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
    if config.method == "ce":
        return None
    # The run is not finished: as the configuration says.
    return config.teacher.weights or config.teacher.workdir or str(workdir.resolve().parent / "teacher")


def table(summaries: list[dict[str, Any]]) -> str:
    """Evaluations as a table for the terminal, with the mean of a corruption where all its severities are there."""
    taught = summaries[0]["teacher"] is not None
    header = ["set", "examples"]
    for figure in ("accuracy", "CE", "ECE"):
        header += [figure, "teacher's"] if taught else [figure]
    rows = [(*header, "agreement") if taught else tuple(header)]
    full = []
    for position, values in enumerate(summaries):
        rows.append(_row(values["data"], values))
        five = summaries[max(position - 4, 0) : position + 1]
        kind = values["data"].rsplit("-", 1)[0]
        if kind in corrupt.CORRUPTIONS and [v["data"] for v in five] == [f"{kind}-{s}" for s in corrupt.SEVERITIES]:
            rows.append(_row(f"{kind}: mean", _mean(five)))
            full += five
    if len(full) == 5 * len(corrupt.CORRUPTIONS):
        rows.append(_row("corruptions: mean", _mean(full)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)])
        for row in rows
    ]
    restricted = sorted({values["restricted_to_classes"] for values in summaries} - {None})
    notes = ["CE in nats; ECE: expected calibration error, 15 bins"]
    if taught:
        notes.append("agreement: student and teacher choose the same class")
    if restricted:
        notes.append(f"sets with {' or '.join(map(str, restricted))} of the classes: the choice is among these alone")
    return "\n".join([*lines, "; ".join(notes)])


def _mean(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every figure, over sets."""
    first = summaries[0]
    mean = {"examples": first["examples"], "agreement": None, "teacher": None}
    for who in ("student", "teacher"):
        if first[who]:
            mean[who] = {key: float(np.mean([values[who][key] for values in summaries])) for key in first[who]}
    if first["teacher"]:
        mean["agreement"] = float(np.mean([values["agreement"] for values in summaries]))
    return mean


def _row(name: str, values: dict[str, Any]) -> tuple[str, ...]:
    networks = [values[who] for who in ("student", "teacher") if values[who]]
    agreement = [] if values["agreement"] is None else [f"{100 * values['agreement']:.2f} %"]
    return (
        name,
        f"{values['examples']:,}",
        *(f"{100 * network['accuracy']:.2f} %" for network in networks),
        *(f"{network['ce']:.3f}" for network in networks),
        *(f"{100 * network['ece']:.2f} %" for network in networks),
        *agreement,
    )
