"""What named gradients cost: one backward pass each, or one over stacked cotangents, beside that of the whole loss.

    python -m benchmarks.named_gradients [--student=resnet20] [--batch=64] [--rounds=5] [--clock=wall]
        [--output=FILE.json]

Times are of DKD's value and gradients with respect to the student's parameters, at random logits of the teacher: the
whole step but the teacher and the optimizer. MiB are the temporaries that the compiled program has planned.
"""

import argparse
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import report, side_by_side, training
from dgkd_jax import losses, models
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import DKD
from dgkd_jax.methods.progress import Progress
from dgkd_jax.models.network import Network
from dgkd_jax.runs.default import NAMED_GRADIENTS
from dgkd_jax.training.named_gradients import cotangents, value_and_named_gradients

METHOD = DKD(warmup_epochs=0.0)
PROGRESS = Progress(jnp.zeros((), jnp.int32), 1, 1)


def main() -> None:
    args = _arguments()
    parts = _network(args)
    programs = {"whole loss": jax.value_and_grad(lambda params: _loss(parts[0](params)[0]))}
    for optimizer in ("dot", "deepkd"):
        for name, how in (("a pass each", value_and_named_gradients), ("stacked", stacked)):
            programs[f"{optimizer}, {name}"] = how(parts[0], _loss, NAMED_GRADIENTS[optimizer])
    compiled = {name: jax.jit(program).lower(parts[1]).compile() for name, program in programs.items()}
    seconds = side_by_side.alternate(
        {name: functools.partial(_finished, program, parts[1]) for name, program in compiled.items()},
        rounds=args.rounds,
        clock=args.clock,
    )
    found, rows = [], []
    for name, program in compiled.items():
        spread = side_by_side.spread(seconds[name])
        times, lowest, highest = side_by_side.ratio(seconds, "whole loss", name)
        mib = program.memory_analysis().temp_size_in_bytes / 2**20
        rows.append((name, side_by_side.span(spread), f"{times:.2f} ({lowest:.2f} … {highest:.2f})", f"{mib:.1f}"))
        found.append({"gradients": name, "of_whole": (times, lowest, highest), "temporaries_mib": mib} | spread)
    print(f"{args.student}, batch {args.batch}, {args.clock} clock")
    print(report.table(("gradients", "ms [quartiles]", "x the whole loss's (range)", "temporaries, MiB"), rows))
    report.finish(
        {"environment": report.environment(), "arguments": vars(args), "gradients": found}, output=args.output
    )


def stacked(terms_of: Callable, loss_of: Callable, names: tuple[str, ...]) -> Callable[[Any], tuple[Any, Any]]:
    """As `value_and_named_gradients`, by one backward pass over the cotangents of all names."""

    def compute(params: Any) -> tuple[Any, Any]:
        terms, pull_back, beside = jax.vjp(terms_of, params, has_aux=True)
        loss, weights = jax.value_and_grad(loss_of)(terms)
        each = jax.tree.map(lambda *parts: jnp.stack(parts), *(cotangents(weights, name) for name in names))
        (gradients,) = jax.vmap(pull_back)(each)
        return (loss, beside), {
            name: jax.tree.map(operator.itemgetter(index), gradients) for index, name in enumerate(names)
        }

    return compute


def _loss(terms: dict[str, jax.Array]) -> jax.Array:
    return METHOD.loss(terms, PROGRESS)


def _network(args: argparse.Namespace) -> tuple[Callable, Any]:
    """A function: parameters -> batch means of the terms, BatchNorm's statistics; and parameters."""
    model = models.create(args.student, num_classes=training.CLASSES)
    variables = models.initialise(model, training.IMAGE_SHAPE, 0)
    student = Network(model.apply, None, training.MEAN, training.STD)
    batch = jax.tree.map(jnp.asarray, training.examples(args.batch))
    teacher_logits = jax.random.normal(jax.random.key(0), (args.batch, training.CLASSES))

    def terms_of(params: Any) -> tuple[dict[str, jax.Array], Any]:
        network = student.with_variables(variables | {"params": params})
        logits, updated = network(batch["image"], train=True, mutable=["batch_stats"])
        terms = {"ce": losses.cross_entropy(logits, batch["label"])}
        terms |= METHOD.terms(logits, teacher_logits, batch["label"])
        return jax.tree.map(jnp.mean, terms), updated

    return terms_of, variables["params"]


def _finished(program: Callable, params: Any) -> None:
    jax.block_until_ready(program(params))


def _arguments() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--student", default="resnet20", help="a model's name (default resnet20)")
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each that are counted")
    parser.add_argument("--clock", choices=side_by_side.CLOCKS, default="wall", help="cpu: with taskset -c 0")
    args = parser.parse_args()
    report.check_output(args.output)
    training.check_model("--student", args.student)
    for name in ("batch", "rounds"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name}={getattr(args, name)}: must be 1 or more")
    return args


if __name__ == "__main__":
    report.run(main)
