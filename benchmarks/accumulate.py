"""What gradient accumulation saves and costs: memory, compilation and time of a step whose batch is cut into parts.

    python -m benchmarks.accumulate [--student=resnet20] [--teacher=resnet56] [--batch=64] [--parts=1,2,4] [--rounds=3]
                                    [--forms=run] [--output=FILE.json]

The whole step with DKD, teacher and optimizer. MiB are the temporaries that the compiled program has planned, which do
not depend on the machine's load. `--forms=run,loop,free` also has what a run does not do on a CPU: a loop over the
parts, and parts that XLA may compute in any order.
"""

import argparse
import contextlib
import time
from typing import Any
from unittest import mock

import jax

from benchmarks import report, side_by_side, training
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import DKD
from dgkd_jax.training import parts

FORMS = {
    "run": {},
    "loop": {"is_loop": lambda count, on: count > 1},
    "free": {"_after": lambda done, part: part},
}


def main() -> None:
    args = _arguments()
    steps: dict[str, _Step] = {}
    for count in args.parts:
        for form in args.forms if count > 1 else ("run",):
            steps[f"{count}, {form}" if count > 1 else "1"] = _Step(args, count, form)
    first = next(iter(steps))
    seconds = side_by_side.alternate(steps, rounds=args.rounds, clock="wall")
    found, rows = [], []
    for name, step in steps.items():
        spread = side_by_side.spread(seconds[name])
        times, lowest, highest = side_by_side.ratio(seconds, first, name)
        rows.append((name, f"{step.mib:.1f}", f"{step.compile_s:.1f}", side_by_side.span(spread),
                     f"{times:.2f} ({lowest:.2f} … {highest:.2f})"))  # fmt: skip
        found.append({"parts": name, "temporaries_mib": step.mib, "compile_s": step.compile_s} | spread)
    print(f"{args.teacher} teaches {args.student}, batch {args.batch}")
    print(
        report.table(
            ("parts", "temporaries, MiB", "compile, s", "step, ms [quartiles]", "x the first row's (range)"), rows
        )
    )
    report.finish({"environment": report.environment(), "arguments": vars(args), "steps": found}, output=args.output)


class _Step:
    """A compiled step; each call does one more."""

    def __init__(self, args: argparse.Namespace, count: int, form: str):
        mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
        step, (self._state, *self._inputs) = training.build(
            mesh, student=args.student, teacher=args.teacher, batch=args.batch, method=DKD(), accumulate=count
        )
        with mock.patch.multiple(parts, **FORMS[form]) if FORMS[form] else contextlib.nullcontext():
            lowered = step.lower(self._state, *self._inputs)
        began = time.perf_counter()
        self._compiled: Any = lowered.compile()
        self.compile_s = time.perf_counter() - began
        self.mib = self._compiled.memory_analysis().temp_size_in_bytes / 2**20

    def __call__(self) -> None:
        self._state = jax.block_until_ready(self._compiled(self._state, *self._inputs))


def _arguments() -> argparse.Namespace:
    parser = report.parser(__doc__)
    training.add_pair(parser, student="resnet20", teacher="resnet56", batch=64)
    parser.add_argument("--parts", default="1,2,4", help="of the batch, one or several numbers")
    parser.add_argument("--forms", default="run", help=f"one or several of {', '.join(FORMS)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each that are counted")
    args = parser.parse_args()
    report.check_output(args.output)
    training.check_pair(args)
    args.forms = args.forms.split(",")
    if unknown := set(args.forms) - set(FORMS):
        raise BadInput(f"--forms: {', '.join(unknown)} is none of {', '.join(FORMS)}")
    try:
        args.parts = [int(text) for text in args.parts.split(",")]
    except ValueError as error:
        raise BadInput(f"--parts={args.parts}: must be whole numbers, such as 1,2,4") from error
    for count in args.parts:
        if count < 1 or args.batch % count:
            raise BadInput(f"--parts: {count} must be 1 or more and divide --batch={args.batch}")
    return args


if __name__ == "__main__":
    report.run(main)
