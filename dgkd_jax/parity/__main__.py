"""Agreement with PyTorch, measured: a table, a JSON file, and exit code 1 where a tolerance is missed.

    python -m dgkd_jax.parity losses
        every loss, convention and gradient, and where PyTorch's usual form breaks
    python -m dgkd_jax.parity deviations
        how much each known deviation of the DGKD repository, its README and its blog matters; needs no torch
    python -m dgkd_jax.parity training --pair=resnet14,resnet8 --steps=12 [--method=ce|kd|dkd|dgkd]
        the same training in both frameworks: loss and weights step by step
    python -m dgkd_jax.parity model --name=resnet18 [--weights=FILE] [--image_size=N] [--dtype=float64|float32]
        one network in both frameworks: the output of every layer, and the first one that differs

Bad input is one line on stderr and exit code 2. Without torch, recorded figures of a clone's tests/golden are used.
"""

import argparse
import importlib.util
import sys
from types import ModuleType

from dgkd_jax.data import quiet
from dgkd_jax.errors import ArgumentParser, BadInput, report
from dgkd_jax.parity import deviations, findings, losses, model, training


def main(arguments: list[str]) -> int:
    """Run one sub-command; returns the exit code."""
    quiet.for_good()
    try:
        options = _parser().parse_args(arguments)
        found = _run(options)
        print(findings.text(found))
        if options.output:
            findings.write(found, options.output)
            print(f"everything that was measured is in {options.output}")
    except BadInput as error:
        return report(error, command="dgkd_jax.parity")
    return 0 if found.passed else 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m dgkd_jax.parity",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        example="python -m dgkd_jax.parity losses",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=ArgumentParser)
    commands.add_parser("losses", help="every loss, convention and gradient over a grid of batches")
    commands.add_parser("deviations", help="the effect of each known deviation; docs/deviations.md says what to choose")
    command = commands.add_parser("training", help="the same training in both frameworks, step by step")
    command.add_argument("--pair", default="resnet14,resnet8", metavar="TEACHER,STUDENT", help="thin CIFAR ResNets")
    command.add_argument("--steps", default=12, type=int, metavar="N")
    command.add_argument("--method", help=f"one of {', '.join(training.METHODS)}; default all")
    command = commands.add_parser("model", help="the output of every layer, and the first one that differs")
    command.add_argument("--name", required=True, help="of dgkd_jax.models.NAMES")
    command.add_argument("--weights", metavar="FILE", help="PyTorch weights, as teacher.weights; default random ones")
    command.add_argument("--image_size", type=int, metavar="N", help="pixels a side; default the network's usual size")
    command.add_argument("--num_classes", type=int, metavar="N", help=f"default the file's; random: {model.CLASSES}")
    command.add_argument("--dtype", default="float64", help=f"one of {', '.join(model.TOLERANCES)}; default float64")
    command.add_argument("--seed", default=0, type=int, metavar="N", help="of the images and random weights; default 0")
    for command in commands.choices.values():
        command.add_argument("--output", metavar="FILE.json", help="write everything that was measured there")
    return parser


def _run(options: argparse.Namespace) -> findings.Report:
    if options.command == "deviations":
        return deviations.run()
    if options.command == "model":
        names = ("name", "weights", "image_size", "num_classes", "dtype", "seed")
        return model.run(_torch_side("torch_networks"), **{name: getattr(options, name) for name in names})
    reference = _torch_side("torch_reference")
    if options.command == "training":
        return training.run(reference, pair=options.pair, count=options.steps, method=options.method)
    return losses.run(reference)


def _torch_side(module: str) -> ModuleType | None:
    """That module of this folder, or None where torch is not installed; a torch that is broken raises its own error."""
    if importlib.util.find_spec("torch") is None:
        return None
    return importlib.import_module(f"dgkd_jax.parity.{module}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
