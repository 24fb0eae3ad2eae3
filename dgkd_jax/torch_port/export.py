"""Exports a trained student from its work directory, as weights that PyTorch's networks load with strict=True.

    python -m dgkd_jax.torch_port export --workdir=DIR --output=student.safetensors [--step=N|best|last] [--overwrite]

Needs neither torch, the data set nor the run's devices. The work directory is only read, so the run may be running.
"""

import argparse
import json
import logging

import jax
import numpy as np
from etils import epath

from dgkd_jax import __version__, own_code
from dgkd_jax.errors import ArgumentParser, BadInput, exit_code_of
from dgkd_jax.runs.files import size_in_words, write_whole
from dgkd_jax.runs.student import Student, read, step_argument
from dgkd_jax.torch_port import convert
from dgkd_jax.torch_port import files as weight_files

_EXAMPLE = "python -m dgkd_jax.torch_port export --workdir=runs/mnist5k/dgkd-seed0 --output=student.safetensors"


def encode(student: Student, *, suffix: str) -> bytes:
    """The content of a weight file in PyTorch's names and layout, with metadata; of an own network in Flax's.

    Args:
        suffix: from `files.WRITABLE`.

    Raises:
        BadInput: a weight is NaN or infinite.
    """
    name, image_shape = student.config.student.model, tuple(student.about["image_shape"])
    variables = student.variables if student.variables["batch_stats"] else {"params": student.variables["params"]}
    own = own_code.is_own(name)
    if own:
        state_dict = _flax_names(variables)
    else:
        state_dict = convert.to_torch(variables, student.model, name, image_shape=image_shape)
    for entry, array in state_dict.items():
        if not np.isfinite(array).all():
            raise BadInput(f"the student of step {student.step} is unusable: {entry} holds NaN or infinite values")
    return weight_files.encode(state_dict, {"format": "flax" if own else "pt"} | metadata(student), suffix=suffix)


def metadata(student: Student) -> dict[str, str]:
    """What a file says of the student in it, besides its weights."""
    return {
        "model": student.config.student.model,
        "step": str(student.step),
        "accuracy": "not evaluated at this step" if student.accuracy is None else f"{student.accuracy:.6f}",
        "method": student.config.method,
        "data": student.about["name"],
        "num_classes": str(student.about["num_classes"]),
        **{key: json.dumps(student.about[key]) for key in ("image_shape", "mean", "std")},
        "dgkd_jax": __version__,
    }


def _flax_names(variables: dict) -> dict[str, np.ndarray]:
    """A user's own network has no names in PyTorch: collection/module/…/parameter."""
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    return {"/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in leaves}


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""

    def work() -> None:
        jax.config.update("jax_platforms", "cpu")  # the run may be using the accelerator
        logging.getLogger().setLevel(logging.ERROR)
        print(_export(_parser().parse_args(argv)))

    return exit_code_of(work)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m dgkd_jax.torch_port", example=_EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export",
        help="write the student of a work directory for PyTorch",
        description=__doc__.splitlines()[0],
        example=_EXAMPLE,
    )
    export.add_argument("--workdir", required=True, type=epath.Path, help="of a finished or running run")
    export.add_argument("--output", required=True, type=epath.Path, help="FILE.safetensors or FILE.npz")
    export.add_argument("--step", default="last", type=step_argument, metavar="N|best|last", help="which checkpoint")
    export.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    return parser


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
    write_whole(output, content)
    names = "Flax's" if own_code.is_own(student.config.student.model) else "PyTorch's"
    accuracy = "not evaluated" if student.accuracy is None else f"accuracy {100 * student.accuracy:.2f} %"
    return (
        f"{output}: {student.config.student.model} by {student.config.method} at step {student.step} ({accuracy} on "
        f"{student.about['name']}), {size_in_words(len(content))} with {names} names"
    )
