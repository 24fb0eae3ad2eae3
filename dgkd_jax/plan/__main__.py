"""Says what a run would cost on a TPU slice that is not here: its programs, compiled by the TPU's own compiler.

    python -m dgkd_jax.plan --config=FILE --topology=SLICE[,SLICE…] [--config.KEY=VALUE …]

--topology  v5e:16x16, v5p:2x2x4 or, as TPU VMs are ordered, v5e-256, v5p-32; several: one table. v4, v5e, v5p and v6e
--per-chip  images on each chip, in place of the config's batch_size, or eval_batch_size for other targets
--target    train (default) | evaluate | diagnose | teacher: which program of the run
--largest   find the largest batch that fits by compiling up to five more programs
--price     of a chip for an hour
--output    a file for everything, as JSON
--workdir   is main's, and not read: a command of dgkd_jax.main becomes one of dgkd_jax.plan by a --topology

It prints memory, time, speed, hours, the exchanges between chips and the costliest operations. It needs no TPU, data or
weights, but pip install -e '.[plan]' (Linux on x86-64), and minutes: ResNet-50 teaching ResNet-18 took seven of a
processor. How to read the page: docs/plan.md. Exit code 2: bad input, or the program does not fit.

Example: python -m dgkd_jax.plan --config=configs/imagenet_r50_r18.py --topology=v5e:16x16 --per-chip=128
"""

import argparse
import importlib.metadata
import json
import sys
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dgkd_jax.errors import ArgumentParser, BadInput, did_you_mean, exit_code_of
from dgkd_jax.plan import advice as advising
from dgkd_jax.plan import compiler, conduct, page, slices
from dgkd_jax.plan.program import TARGETS
from dgkd_jax.runs import launch


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""

    def work() -> None:
        arguments, rest = _parser().parse_known_args(argv[1:])
        config = launch.parsed([argv[0], *rest], usage=__doc__.strip())
        if not arguments.topology:
            raise BadInput("no --topology=SLICE given, for example --topology=v5e:16x16")
        on = [slices.named(name) for name in arguments.topology.split(",")]
        compiler.begin()
        launch.set_up(config)
        _plan(config, on, arguments)

    return exit_code_of(work)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m dgkd_jax.plan", add_help=False)
    parser.add_argument("--topology")
    parser.add_argument("--per-chip", type=_count)
    parser.add_argument("--target", type=_target, default="train")
    parser.add_argument("--largest", action="store_true")
    parser.add_argument("--price", type=_price)
    parser.add_argument("--output", type=epath.Path)
    parser.add_argument("--workdir")
    return parser


def _plan(config: ConfigDict, on: list[slices.Slice], arguments: argparse.Namespace) -> None:
    """Print the page, or the table of several slices, and write the JSON.

    Raises:
        BadInput: the program fits on none of the slices.
    """
    title, price = f"{config.name}, {config.method}", arguments.price
    plans, advice = [], []
    for each in on:
        if sys.stderr.isatty():
            print(f"compiling for {each.name}: this can take minutes", file=sys.stderr)
        plans.append(
            conduct.plan(config, each, target=arguments.target, per_chip=arguments.per_chip, largest=arguments.largest)
        )
        advice.append(advising.advice(plans[-1], config))
    version = f"libtpu {importlib.metadata.version('libtpu')}"
    if arguments.output:
        found = [page.as_json(plan, advice=lines, price=price) for plan, lines in zip(plans, advice, strict=True)]
        text = json.dumps({"compiler": version, "title": title, "plans": found}, indent=2)
        arguments.output.write_text(text + "\n")
    if len(plans) > 1:
        print(page.table(plans, title=title, price=price))
    elif plans[0].fits:
        print(page.page(plans[0], title=title, compiler=version, advice=advice[0], price=price))
    if not any(plan.fits for plan in plans):
        raise BadInput(page.too_large(plans[0], advice=advice[0]))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images, 1 or more")
    return int(text)


def _price(text: str) -> float:
    try:
        value: Any = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no price, such as 1.20")
    return value


def _target(text: str) -> str:
    if text not in TARGETS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(TARGETS)}{did_you_mean(text, TARGETS)}")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv))
