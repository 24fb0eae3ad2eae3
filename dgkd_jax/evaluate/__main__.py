"""Evaluates a run's student and its teacher on the run's test split and on corrupted, scrambled and foreign sets.

    python -m dgkd_jax.evaluate --workdir=DIR --data=NAME[,NAME…] [--step=best|last|N] [--output=FOLDER]

  clean                   the evaluation split of the run
  gaussian_noise-3        a common corruption of that split and a severity, 1 to 5; without a number: all five
  corruptions             all of gaussian_noise, shot_noise, impulse_noise, defocus_blur, gaussian_blur, contrast,
                          brightness, pixelate and jpeg_compression
  noised-8                Gaussian noise in a square of 8 pixels; noised-8-wrapped: added as the DGKD repository does
  scrambled-4             patches of 4x4 pixels in random order
  image_folder:PATH       images in PATH/<class>/*, or PATH/test|validation|val/<class>/*: for example a stylised set
  tfds:NAME[:SPLIT]       any image set of TFDS: tfds:cifar10_corrupted/fog_1, tfds:imagenet_v2, tfds:imagenet_r

Prints a table and writes evaluations/NAME.json and NAME.npz in the work directory. Runs in one process.
"""

import argparse
import contextlib
import logging
import sys
from types import SimpleNamespace
from typing import Any

import jax
from etils import epath

from dgkd_jax.data import quiet
from dgkd_jax.errors import ArgumentParser, exit_code_of
from dgkd_jax.evaluate import per_example
from dgkd_jax.evaluate.evaluator import Evaluator
from dgkd_jax.evaluate.sets import evaluation_sets
from dgkd_jax.evaluate.table import table
from dgkd_jax.evaluate.taught_by import find_teacher
from dgkd_jax.models import network
from dgkd_jax.runs import allocator, launch, sharding, student


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""

    def work() -> None:
        quiet.for_good()
        logging.getLogger().setLevel(logging.ERROR)
        allocator.keep_freed_memory()
        print(_evaluate(_parser().parse_args(argv)))

    return exit_code_of(work)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m dgkd_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        example="python -m dgkd_jax.evaluate --workdir=runs/mnist5k/dgkd-seed0 --data=corruptions,scrambled-4",
    )
    parser.add_argument("--workdir", required=True, type=epath.Path, help="of a finished or running run")
    parser.add_argument("--data", required=True, metavar="NAME[,NAME…]", help="what to evaluate on")
    parser.add_argument(
        "--step", default="last", type=student.step_argument, metavar="N|best|last", help="default: last"
    )
    parser.add_argument("--output", type=epath.Path, metavar="FOLDER", help="default: WORKDIR/evaluations")
    parser.add_argument("--teacher", metavar="WHERE", help="its work directory or weights, if moved; or none")
    parser.add_argument("--data_dir", metavar="DIR", help="TFDS's folder; default: the run's")
    parser.add_argument("--seed", default=0, type=int, help="of noise and scrambles; default 0")
    return parser


def _evaluate(arguments: argparse.Namespace) -> str:
    trained = student.read(arguments.workdir, step=arguments.step)
    config = trained.config
    if arguments.data_dir:
        config.data.dir = arguments.data_dir
    launch.use_compilation_cache(config)
    run = SimpleNamespace(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in trained.about.items()}
    )
    precise = contextlib.nullcontext()
    if config.matmul_precision != "default":
        precise = jax.default_matmul_precision(config.matmul_precision)
    with jax.enable_x64(run.enable_x64), precise:
        sets = evaluation_sets(
            arguments.data, run=run, data=config.data, workdir=arguments.workdir, seed=arguments.seed
        )
        mesh = sharding.make_mesh()
        evaluated = network.of(
            trained.architecture(config.student.dtype),
            sharding.place(trained.variables, mesh),
            mean=run.mean,
            std=run.std,
        )
        teacher = find_teacher(trained, arguments.workdir, arguments.teacher, run=run, mesh=mesh)
        evaluator = Evaluator(mesh, batch_size=config.eval_batch_size)
        summaries = []
        for number, chosen in enumerate(sets, start=1):
            _show(f"{number} of {len(sets)}: {chosen.name}")
            rows = evaluator(evaluated, chosen, teacher=teacher, by_example=True).rows
            values = per_example.summary(rows, data=chosen.name, step=trained.step, classes=chosen.classes)
            per_example.write(arguments.output or arguments.workdir / "evaluations", values, rows)
            summaries.append(values)
        _show("")
    taught = f", teacher {config.teacher.model}" if teacher else ""
    title = f"{arguments.workdir}: student {config.student.model} by {config.method} at step {trained.step}{taught}"
    return f"{title}\n{table(summaries)}"


def _show(text: Any) -> None:
    """Replace the last line on the terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
