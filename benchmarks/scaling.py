"""What more devices cost: the bytes of every collective of the compiled step, and a model of weak scaling.

    python -m benchmarks.scaling [--student=resnet20] [--teacher=resnet56] [--batch=64] [--step-ms=MS]
        [--latency-us=1] [--seconds=10] [--output=FILE.json]

The bytes are read from the programs that XLA compiles for 1, 2, 4 and 8 virtual CPU devices: they are facts of the
program. The scaling table is a MODEL, not a measurement: each device's step takes what one device takes (measured
here, or --step-ms from where you train), every byte then goes around a ring once for the sum and once for its result
with nothing overlapped, and each of a ring's 2·(n−1) hops waits --latency-us (an assumption) for each collective.
"""

import argparse
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import report, side_by_side, training
from dgkd_jax.errors import BadInput

DEVICES = (1, 2, 4, 8)
POD = (8, 64, 256)

# Gigabytes per second that one chip sends over all its links: half of what is published for both directions.
LINKS = {
    "TPU v5e ICI": (200.0, "400 GB/s bidirectional per chip, cloud.google.com/tpu/docs/v5e"),
    "TPU v5p ICI": (600.0, "1200 GB/s bidirectional per chip, docs.cloud.google.com/tpu/docs/v5p"),
}

_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)
_ARRAY = re.compile(r"(?P<type>pred|[a-z]+\d+)\[(?P<shape>[\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a compiled program.

    Attributes:
        kind: XLA's name of it.
        arrays: of its result, (bytes of an entry, shape); XLA merges several into one.
    """

    kind: str
    arrays: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def bytes(self) -> int:
        return sum(size * int(np.prod(shape)) for size, shape in self.arrays)


def collectives(program: str) -> list[Collective]:
    """Those of an optimised HLO module's text that join more than one device."""
    found = []
    for line in program.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        arrays = tuple(
            (_entry_bytes(array["type"]), tuple(int(n) for n in array["shape"].split(",") if n))
            for array in _ARRAY.finditer(match["result"])
        )
        found.append(Collective(match["kind"], arrays))
    return found


def _entry_bytes(type_: str) -> int:
    return 1 if type_ == "pred" else max(int(re.sub(r"\D", "", type_)) // 8, 1)


class Expected(NamedTuple):
    """Bytes that a data-parallel step must or does sum over the devices.

    Attributes:
        gradients: of all parameters.
        batch_norm: mean and variance of every BatchNorm, and backwards one more sum as large as the mean (the other
            one that it needs is its bias's gradient).
        diagnostics: sums over the batch of both logit gradients, for `covariance`: two numbers per class.
    """

    gradients: int
    batch_norm: int
    diagnostics: int

    @property
    def total(self) -> int:
        return sum(self)


def expected(state: Any, *, classes: int) -> Expected:
    """For a state whose parameters are on every device."""

    def nbytes(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    return Expected(nbytes(state.params), nbytes(state.batch_stats) * 3 // 2, 2 * classes * 4)


def split(found: list[Collective]) -> tuple[int, int]:
    """(bytes of arrays, bytes of scalars)."""
    scalars = sum(size for each in found for size, shape in each.arrays if not shape)
    return sum(each.bytes for each in found) - scalars, scalars


def weak_scaling(
    *, step_ms: float, bytes_: int, count: int, devices: int, gigabytes: float, latency_us: float
) -> float:
    """The model: the share of n devices' throughput that is left, in (0, 1]."""
    if devices == 1:
        return 1.0
    moving = 2 * (devices - 1) / devices * bytes_ / (gigabytes * 1e9) * 1e3
    waiting = 2 * (devices - 1) * count * latency_us * 1e-3
    return step_ms / (step_ms + moving + waiting)


def measure_step(program: jax.stages.Compiled, inputs: tuple, *, seconds: float) -> dict[str, float]:
    """Milliseconds of one step on one device; the state goes through, since it is donated."""
    state, *rest = inputs

    def call():
        nonlocal state
        state = jax.block_until_ready(program(state, *rest))

    return side_by_side.spread(side_by_side.alternate({"step": call}, rounds=50, seconds=seconds)["step"])


def main() -> None:
    arguments = _arguments()
    # Before JAX looks for devices.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(DEVICES)}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    environment = report.environment()
    pair = {"student": arguments.student, "teacher": arguments.teacher, "batch": arguments.batch}
    counted, step = [], {"median_ms": arguments.step_ms}
    for devices in DEVICES:
        mesh = jax.make_mesh((devices, 1), ("data", "fsdp"), devices=jax.devices()[:devices])
        jitted, inputs = training.build(mesh, **pair)
        program = jitted.lower(*inputs).compile()
        counted.append(count(program, devices, expected(inputs[0], classes=training.CLASSES)))
        if devices == 1 and not arguments.step_ms:
            step = measure_step(program, inputs, seconds=arguments.seconds)
    print(report.table(COUNTED, [_row(each) for each in counted]))

    origin = "given" if arguments.step_ms else "measured here"
    print(f"\nMODEL (not measured): weak scaling, a step of {step['median_ms']:.4g} ms on each device ({origin})")
    modelled = model(counted[-1], step_ms=step["median_ms"], latency_us=arguments.latency_us)
    rows = [(each["link"], *(f"{share:.1%}" for share in each["shares"].values()), each["source"]) for each in modelled]
    print(report.table(("link", *(f"{n} devices" for n in POD), "source"), rows))
    report.finish(
        {"environment": environment, "pair": pair, "programs": counted, "step": step, "model": modelled},
        output=arguments.output,
    )


def _arguments() -> argparse.Namespace:
    parser = report.parser(__doc__)
    training.add_pair(parser, student="resnet20", teacher="resnet56", batch=64)
    parser.add_argument("--step-ms", type=float, help="of one device's step where you train (default: measured here)")
    parser.add_argument("--latency-us", type=float, default=1.0, help="of one hop, assumed (default 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring the step (default 10)")
    arguments = parser.parse_args()
    report.check_output(arguments.output)
    training.check_pair(arguments)
    if arguments.batch % max(DEVICES):
        raise BadInput(f"--batch={arguments.batch}: must be a multiple of {max(DEVICES)}, the devices")
    if arguments.step_ms is not None and not arguments.step_ms > 0:
        raise BadInput(f"--step-ms={arguments.step_ms}: must be greater than 0")
    if not arguments.latency_us >= 0:
        raise BadInput(f"--latency-us={arguments.latency_us}: must be 0 or more")
    return arguments


COUNTED = (
    "devices", "collectives", "gradients, B", "BatchNorm, B", "diagnostics, B", "scalars, B", "other, B", "all, B",
)  # fmt: skip


def count(program: jax.stages.Compiled, devices: int, due: Expected) -> dict[str, Any]:
    """The collectives of the program for so many devices, beside those that are due."""
    found = collectives(program.as_text())
    arrays, scalars = split(found)
    return {
        "devices": devices,
        "collectives": [each._asdict() | {"bytes": each.bytes} for each in found],
        "expected": due._asdict(),
        "arrays": arrays,
        "scalars": scalars,
        "other": arrays - due.total if devices > 1 else arrays,
    }


def _row(counted: dict[str, Any]) -> tuple[str, ...]:
    due = counted["expected"].values() if counted["devices"] > 1 else (0, 0, 0)
    in_all = counted["arrays"] + counted["scalars"]
    cells = (counted["devices"], len(counted["collectives"]), *due, counted["scalars"], counted["other"], in_all)
    return tuple(map(str, cells))


def model(counted: dict[str, Any], *, step_ms: float, latency_us: float) -> list[dict[str, Any]]:
    """For each of `LINKS` the share of the throughput that is left, for each of `POD`."""
    at = {
        "step_ms": step_ms,
        "bytes_": counted["arrays"] + counted["scalars"],
        "count": len(counted["collectives"]),
        "latency_us": latency_us,
    }
    return [
        {
            "link": link,
            "gigabytes_per_s": gigabytes,
            "source": source,
            "shares": {devices: weak_scaling(devices=devices, gigabytes=gigabytes, **at) for devices in POD},
        }
        for link, (gigabytes, source) in LINKS.items()
    ]


if __name__ == "__main__":
    report.run(main)
