"""Exports the student of a finished or running run in a form that people deploy.

    python -m dgkd_jax.export --workdir=DIR --format=FORMAT [--output=PATH] [--step=N|best|last] [--overwrite]

  safetensors   weights with PyTorch's names and layout
  stablehlo     the program for JAX without this package, on CPU, GPU and TPU: read it with jax.export.deserialize
  onnx          the program for onnxruntime and other runtimes without JAX       (needs pip install '.[onnx]')
  huggingface   a folder to upload: a model card, the weights, timm's config     (needs pip install '.[hf]')

The programs take uint8 images [batch, height, width, channels], normalise them and give float32 logits.
The work directory is only read, apart from the default --output, WORKDIR/export/; the run may be running.
"""

import argparse
import importlib.util
import logging
import sys
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from dgkd_jax.errors import ArgumentParser, BadInput, did_you_mean, exit_code_of
from dgkd_jax.export import huggingface, onnx, stablehlo
from dgkd_jax.export.program import program_of
from dgkd_jax.report import work_directories
from dgkd_jax.runs.files import size_in_words, write_whole
from dgkd_jax.runs.student import Student, read, step_argument
from dgkd_jax.torch_port import export as torch_export


class _Format(NamedTuple):
    suffix: str  # of the file; "": it is a folder
    needs: ModuleType | None = None  # the module that names an extra


FORMATS = {
    "safetensors": _Format(".safetensors"),
    "stablehlo": _Format(".stablehlo"),
    "onnx": _Format(".onnx", onnx),
    "huggingface": _Format("", huggingface),
}


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""

    def work() -> None:
        jax.config.update("jax_platforms", "cpu")  # the run may be using the accelerator
        logging.getLogger().setLevel(logging.ERROR)
        print(_export(_parser().parse_args(argv)))

    return exit_code_of(work)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m dgkd_jax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        example="python -m dgkd_jax.export --workdir=runs/mnist5k/dgkd-seed0 --format=onnx --output=student.onnx",
    )
    parser.add_argument("--workdir", required=True, type=epath.Path, help="of a finished or running run")
    parser.add_argument("--format", required=True, type=_format, metavar="|".join(FORMATS), help="see above")
    parser.add_argument(
        "--output", type=epath.Path, metavar="PATH", help="default: student.FORMAT or huggingface in WORKDIR/export"
    )
    parser.add_argument("--step", default="last", type=step_argument, metavar="N|best|last", help="default: last")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def _format(text: str) -> str:
    if text not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(FORMATS)}{did_you_mean(text, FORMATS)}")
    return text


def _export(arguments: argparse.Namespace) -> str:
    chosen = FORMATS[arguments.format]
    if chosen.needs and importlib.util.find_spec(chosen.needs.PACKAGE) is None:
        raise BadInput(
            f"--format={arguments.format} needs {chosen.needs.PACKAGE}: pip install 'dgkd_jax[{chosen.needs.EXTRA}]', "
            f"in a clone pip install -e '.[{chosen.needs.EXTRA}]'"
        )
    output = arguments.output or arguments.workdir / "export" / (
        f"student{chosen.suffix}" if chosen.suffix else arguments.format
    )
    _check(output, suffix=chosen.suffix, given=bool(arguments.output), overwrite=arguments.overwrite)
    student = read(arguments.workdir, step=arguments.step)
    _check_finite(student)
    files = _files(student, arguments)
    for name, content in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    about = student.about
    accuracy = "not evaluated" if student.accuracy is None else f"accuracy {100 * student.accuracy:.2f} %"
    return (
        f"{output}: {student.config.student.model} by {student.config.method} at step {student.step} ({accuracy} on "
        f"{about['name']}), images of {'x'.join(map(str, about['image_shape']))}, {about['num_classes']} classes, "
        f"{size_in_words(sum(map(len, files.values())))}"
    )


def _files(student: Student, arguments: argparse.Namespace) -> dict[str, bytes]:
    """Path within the output -> content; the path of a single file is empty."""
    if arguments.format == "huggingface":
        return huggingface.files(student, work_directories.read(arguments.workdir))
    if arguments.format == "safetensors":
        return {"": torch_export.encode(student, suffix=".safetensors")}
    if arguments.format == "stablehlo":
        return {"": stablehlo.encode(program_of(student))}
    return {"": onnx.encode(program_of(student, from_code=True), torch_export.metadata(student))}


def _check(output: epath.Path, *, suffix: str, given: bool, overwrite: bool) -> None:
    """Refuse an output that cannot be or must not be written, before anything slow begins."""
    if suffix and output.suffix != suffix:
        raise BadInput(f"--output={output}: the name must end in {suffix}")
    if not suffix and output.exists() and not output.is_dir():
        raise BadInput(f"--output={output} is a file, and this format is a folder; give another name")
    if suffix and output.is_dir():
        raise BadInput(f"--output={output} is a folder; name a file in it")
    if output.exists() and not overwrite:
        raise BadInput(f"--output={output} exists already; give another name, or --overwrite to replace it")
    if given and not output.parent.is_dir():
        raise BadInput(f"--output={output}: there is no folder {output.parent}; make it first")


def _check_finite(student: Student) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(student.variables):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise BadInput(f"the student of step {student.step} is unusable: {name} holds NaN or infinite values")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
