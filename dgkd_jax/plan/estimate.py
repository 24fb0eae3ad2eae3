"""What a compiled program costs on a slice, by the compiler's own figures and the published ones of the chips."""

import collections
import dataclasses
import math

from dgkd_jax.plan import hlo
from dgkd_jax.plan.compiler import Compiled, TooLarge
from dgkd_jax.plan.slices import Slice

_MIB, _GIB = 2**20, 2**30
COSTLIEST = 10  # operations that are listed
_WHOLE = 8  # batches are advised in multiples of this many images a chip, the sublanes of a vector register


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Of a program on each chip, MiB.

    Attributes:
        arguments: the state, the teacher, the batch.
        temporaries: while it runs.
        results: that do not reuse the arguments' memory.
    """

    arguments: float
    temporaries: float
    results: float

    @property
    def total(self) -> float:
        return self.arguments + self.temporaries + self.results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one run of a program that fits. Times are seconds on one chip.

    Attributes:
        memory: on each chip.
        gflop, gigabytes: 10⁹ operations; 10⁹ bytes to and from memory. Of a loop one round is counted.
        compute_s: of the operations at the chip's peak.
        memory_s: of the bytes at its bandwidth.
        roofline_s: the compiler's bound, from both, operation by operation; the larger of the two where it gives none.
        estimated_s: the compiler's estimate: the sum over operations, without exchanges.
        exchanges_s: of all collectives at the speed of the links, at least: without latency.
        collectives, without_estimate: as in `hlo.Text`.
        parts: share of the estimate by part (`hlo.part_of`), the largest first.
        costliest: (share of the estimate, part, layer and operation), the largest first.
        loops_unknown: loops that count as one round because their length is not in the text.
    """

    memory: Memory
    gflop: float
    gigabytes: float
    compute_s: float
    memory_s: float
    roofline_s: float
    estimated_s: float
    exchanges_s: float
    collectives: tuple[hlo.Collective, ...]
    without_estimate: dict[str, int]
    parts: dict[str, float]
    costliest: tuple[tuple[float, str, str], ...]
    loops_unknown: int

    @property
    def limited_by(self) -> str:
        return "memory" if self.memory_s > self.compute_s else "compute"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A program on a slice.

    Attributes:
        topology: the slice.
        target: which program (`program.TARGETS`).
        batch_size: of the program, global.
        cost: None where it does not fit.
        needed_gib: what a program that does not fit needs on each chip; None where the compiler does not say.
        largest: images a chip that fit.
        largest_is: how that is known: `compiled`, or `estimated` from this program alone; "" where it is not.
        accumulate: parts of the batch that are computed one after the other, in a loop.
        steps: of the whole training; None for other programs.
        steps_per_epoch: likewise.
        streamed: the training images come from the hosts in every step, not from the chips' memory.
        compile_s: that the compiler took.
    """

    topology: Slice
    target: str
    batch_size: int
    cost: Cost | None
    needed_gib: float | None
    largest: int | None
    largest_is: str
    accumulate: int
    steps: int | None
    steps_per_epoch: int | None
    streamed: bool
    compile_s: float

    @property
    def per_chip(self) -> float:
        return self.batch_size / self.topology.chips

    @property
    def fits(self) -> bool:
        return self.cost is not None

    @property
    def images_per_second(self) -> float | None:
        """On the whole slice."""
        return self.batch_size / self.cost.estimated_s if self.cost and self.cost.estimated_s else None

    @property
    def share_of_peak(self) -> float | None:
        """None where most operations are in a loop, of which the compiler counts one round."""
        if self.cost is None or not self.cost.estimated_s or (self.accumulate > 1 and self.target == "train"):
            return None
        return self.cost.compute_s / self.cost.estimated_s

    @property
    def hours(self) -> float | None:
        """Of all training steps."""
        return self.steps * self.cost.estimated_s / 3600 if self.cost and self.steps else None


def cost_of(compiled: Compiled, on: Slice, *, of_step: bool) -> Cost:
    """What a program costs.

    Args:
        compiled: for the slice.
        on: the slice.
        of_step: it is a training step, so that its operations are those of a teacher and a student.
    """
    analysis, text = compiled.program.cost_analysis() or {}, hlo.read(compiled.program.as_text())
    chip = on.chip
    flops, bytes_ = analysis.get("flops", 0.0), analysis.get("bytes accessed", 0.0)
    compute_s, memory_s = flops / (1e12 * chip.peak_tflops), bytes_ / (1e9 * chip.hbm_gb_per_s)
    # For each of these calls the compiler takes a second off, and for some that only unusual options bring.
    bound = analysis.get("optimal_seconds", 0.0) + text.custom_calls.get("ConcatBitcast", 0)
    by_part: collections.Counter[str] = collections.Counter()
    by_layer: collections.Counter[tuple[str, str]] = collections.Counter()
    for name, cycles in text.by_name.items():
        part = hlo.part_of(name) if of_step else ""
        by_part[part] += cycles
        by_layer[part, hlo.layer_of(name)] += cycles
    whole = max(text.cycles, 1)
    return Cost(
        memory=_memory(compiled),
        gflop=flops / 1e9,
        gigabytes=bytes_ / 1e9,
        compute_s=compute_s,
        memory_s=memory_s,
        roofline_s=bound if bound > 0 else max(compute_s, memory_s),
        estimated_s=text.cycles / (1e9 * chip.clock_ghz),
        exchanges_s=sum(exchange_s(each, on) for each in text.collectives),
        collectives=text.collectives,
        without_estimate=text.without_estimate,
        parts={part: cycles / whole for part, cycles in by_part.most_common()} if of_step else {},
        costliest=tuple((cycles / whole, *where) for where, cycles in by_layer.most_common(COSTLIEST) if cycles),
        loops_unknown=text.unknown_loops,
    )


def _memory(compiled: Compiled) -> Memory:
    found = compiled.program.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes / _MIB,
        temporaries=found.temp_size_in_bytes / _MIB,
        results=(found.output_size_in_bytes - found.alias_size_in_bytes) / _MIB,
    )


def exchange_s(exchange: hlo.Collective, on: Slice) -> float:
    """Seconds that exchanges take at least: their bytes over all of a chip's links that lead to others.

    A chip that sums N bytes with all others sends 2·N·(chips − 1)/chips, and half of that to gather or to scatter them.
    """
    if on.chips == 1:
        return 0.0
    # A ring closes where an axis has the torus's whole length: 16 chips in a plane, multiples of 4 in three dimensions.
    closed = (lambda side: side == 16) if on.chip.axes == 2 else (lambda side: side % 4 == 0)
    links = sum(2 if closed(side) else 1 for side in on.shape if side > 1)
    sent = (2 if exchange.kind == "all-reduce" else 1) * exchange.bytes * (on.chips - 1) / on.chips
    return sent / (1e9 * on.chip.link_gb_per_s * links)


def largest_estimated(found: Cost | TooLarge, on: Slice, *, per_chip: float, constant_mib: float) -> int | None:
    """Images a chip that should fit, if temporaries grow with the batch; None where nothing is known.

    Args:
        found: of the one program that was compiled.
        on: the slice.
        per_chip: images a chip of that program.
        constant_mib: of its arguments, what does not grow with the batch: the state and the teacher.
    """
    there = 1024 * on.chip.hbm_gib
    if isinstance(found, TooLarge):
        if found.needed_gib is None:
            return None
        growing = 1024 * found.needed_gib
    else:
        growing = found.memory.total - constant_mib
        there -= constant_mib
    return whole(per_chip * there / growing) if growing > 0 else None


def whole(images: float) -> int:
    """Rounded down to a multiple that the chip computes well, where there are as many."""
    return math.floor(images / _WHOLE) * _WHOLE if images >= _WHOLE else math.floor(images)
