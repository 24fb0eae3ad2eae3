"""Reads a program as the TPU's compiler leaves it: what each operation is estimated to take, and what chips exchange.

The text is that of `jax.stages.Compiled.as_text`, after scheduling. On TPUs an operation of the entry computation names
`estimated_cycles` in its `backend_config`; all-reduces and the gradient of max-pooling name none.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<type>.*?) (?P<opcode>[\w\-]+)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(r"\b(?:calls|body|to_apply|called_computations)=\{?%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_LIMIT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_BITS = re.compile(r"^[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the program.

    Attributes:
        opcode: HLO's.
        type: of its result, as written.
        cycles: estimated; None where the compiler estimates nothing.
        name: of the JAX operation that it comes from, with the layers around it; "" where it has none.
        called: the computation that it runs, if any.
        trips: how often, if it is a loop; 0 where its length is not known; 1 for all that is no loop.
    """

    opcode: str
    type: str
    cycles: int | None
    name: str
    called: str | None
    trips: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Exchanges between chips of one kind.

    Attributes:
        kind: one of `COLLECTIVES`.
        overlaps: it is started, and waited for later, so that the chip can compute meanwhile.
        count: in a run of the program.
        bytes: of all their results, on one chip.
    """

    kind: str
    overlaps: bool
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Text:
    """What a program's text says.

    Attributes:
        cycles: estimated in all, one chip; loops of unknown length count as one round.
        by_name: cycles by the operations' names.
        collectives: the largest first.
        without_estimate: opcode -> number of operations that compute or communicate and have no estimate.
        custom_calls: target -> number.
        unknown_loops: loops whose length is not in the text.
    """

    cycles: int
    by_name: dict[str, int]
    collectives: tuple[Collective, ...]
    without_estimate: dict[str, int]
    custom_calls: dict[str, int]
    unknown_loops: int


def read(text: str) -> Text:
    """What the text of a compiled module says."""
    computations, entry = _parsed(text)
    by_name: collections.Counter[str] = collections.Counter()
    exchanged: dict[tuple[str, bool], list[int]] = {}
    silent: collections.Counter[str] = collections.Counter()
    unknown = 0
    for operation, times in _run(computations, entry):
        if operation.cycles:
            by_name[operation.name] += times * operation.cycles
        kind = operation.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            found = exchanged.setdefault((kind, operation.opcode != kind), [0, 0])
            found[0] += times
            found[1] += times * _result_bytes(operation)
        if operation.cycles is None and (kind in COLLECTIVES or operation.opcode == "select-and-scatter"):
            silent[kind] += times
        unknown += operation.opcode == "while" and operation.trips == 0
    collectives = [
        Collective(kind=kind, overlaps=overlaps, count=count, bytes=size)
        for (kind, overlaps), (count, size) in exchanged.items()
    ]
    return Text(
        cycles=sum(by_name.values()),
        by_name=dict(by_name),
        collectives=tuple(sorted(collectives, key=lambda each: -each.bytes)),
        without_estimate=dict(silent),
        custom_calls=dict(collections.Counter(re.findall(r'custom_call_target="(\w+)"', text))),
        unknown_loops=unknown,
    )


def _parsed(text: str) -> tuple[dict[str, list[Operation]], str]:
    """The operations of each computation, and the name of the one that the program begins with."""
    lines: dict[str, list[str]] = {}
    entry, here = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            here = lines.setdefault(match["name"], [])
            entry = match["name"] if match["entry"] else entry
        else:
            here.append(line)

    def rounds(condition: str) -> int:
        """Of a loop that counts from 0 to a limit; 0 where the condition is another."""
        limits = [limit[1] for line in lines.get(condition, ()) if (limit := _LIMIT.search(line))]
        counts = any("direction=LT" in line for line in lines.get(condition, ()))
        return int(limits[0]) if counts and len(limits) == 1 else 0

    computations = {
        name: [_operation(line, match, rounds) for line in found if (match := _INSTRUCTION.match(line))]
        for name, found in lines.items()
    }
    return computations, entry


def _operation(line: str, match: re.Match[str], rounds: Callable[[str], int]) -> Operation:
    cycles, name, called, trips = (pattern.search(line) for pattern in (_CYCLES, _OP_NAME, _CALLED, _TRIPS))
    length = 1
    if match["opcode"] == "while":
        condition = _CONDITION.search(line)
        length = int(trips[1]) if trips else rounds(condition[1]) if condition else 0
    return Operation(
        opcode=match["opcode"],
        type=match["type"],
        cycles=int(cycles[1]) if cycles else None,
        name=name[1].replace("\\", "") if name else "",
        called=called[1] if called else None,
        trips=length,
    )


def _run(computations: dict[str, list[Operation]], entry: str, times: int = 1) -> Iterator[tuple[Operation, int]]:
    """Each operation that is run, with how often: those of the entry, of loops, and exchanges within fusions."""
    for operation in computations.get(entry, ()):
        if operation.opcode in ("while", "call"):
            yield dataclasses.replace(operation, cycles=None), times
            for within, rounds in _run(computations, operation.called or "", times * max(operation.trips, 1)):
                yield dataclasses.replace(within, name=within.name or operation.name), rounds
            continue
        yield operation, times
        if operation.opcode in ("fusion", "async-start"):
            started = operation.opcode == "async-start"
            for within in computations.get(operation.called or "", ()):
                if within.opcode in COLLECTIVES:
                    opcode = f"{within.opcode}-start" if started else within.opcode
                    yield dataclasses.replace(within, opcode=opcode), times


def _result_bytes(operation: Operation) -> int:
    """Of the arrays of its result. What is started gives its operands too, before its results."""
    sizes = [_bytes(*array) for array in _ARRAY.findall(operation.type)]
    if operation.opcode in ("all-gather-start", "collective-permute-start"):
        sizes = (
            sizes[len(sizes) // 2 :][: max(len(sizes) // 2, 1)] if operation.opcode.startswith("all") else sizes[1:2]
        )
    return sum(sizes)


def _bytes(dtype: str, dimensions: str) -> int:
    count = math.prod(int(size) for size in dimensions.split(",") if size)
    bits = _BITS.match(dtype)
    return count * (1 if dtype == "pred" else math.ceil(int(bits[1]) / 8) if bits else 0)


def part_of(name: str) -> str:
    """The part of a training step that an operation belongs to: teacher; student, forward or backward; or rest."""
    path = _path(name)
    if any(step.startswith("transpose(jvp(") for step in path):
        return "student, backward"
    if any(step.startswith("jvp(") and step != "jvp()" for step in path):
        return "student, forward"
    return "teacher" if path and path[0][:1].isupper() else "rest"


def layer_of(name: str) -> str:
    """An operation's name for people: the layers within the network, and what is computed.

    `jit(train_step)/transpose(jvp(ResNet))/layer1_0/conv2/conv_general_dilated` is
    `layer1_0/conv2 conv_general_dilated`.
    """
    path = [step for step in _path(name) if not re.match(r"(transpose\()?jvp\(|while$|body$|closed_call$", step)]
    if len(path) > 1 and path[0][:1].isupper():
        path = path[1:]
    if "/" not in name:
        return f"copy of the argument {name}" if name else "(unnamed)"
    return f"{'/'.join(path[:-1])} {path[-1]}".strip() if path else name


def _path(name: str) -> list[str]:
    steps = name.split("/")
    return steps[1:] if steps[0].startswith("jit(") else steps
