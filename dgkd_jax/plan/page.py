"""A plan as text for people, and as JSON."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dgkd_jax.plan.estimate import Plan

LEFT_OUT = """\
This is the compiler's estimate; nothing was run. It leaves out the exchanges between chips (their line above is a lower
bound, without latency), the gradient of max-pooling, loops whose length the program does not tell, and all that a run
does besides this program: reading and decoding images, evaluations, checkpoints, compiling, waiting for a slice."""

_PROGRAMS = {
    "train": "the training step",
    "evaluate": "accuracy of an evaluation batch",
    "diagnose": "all measurements of an evaluation batch, the teacher's logits given",
    "teacher": "the teacher's logits of an evaluation batch",
}


def page(plan: Plan, *, title: str, compiler: str, advice: list[str], price: float | None) -> str:
    """One program on one slice.

    Args:
        plan: of a program that fits.
        title: the run's name and method.
        compiler: its name and version.
        advice: lines.
        price: of a chip for an hour; None: not given.
    """
    slice_ = plan.topology
    lines = [
        f"{title}: {_PROGRAMS[plan.target]} on {slice_.name}, {_counted(slice_.chips, 'chip')} on "
        f"{_counted(slice_.hosts, 'host')}",
        f"{_images(plan.per_chip)} a chip, batch {plan.batch_size:,}; compiled by {compiler} in {plan.compile_s:.0f} s",
        "",
        *(f"{name:<18}{value}" for name, value in _figures(plan, price)),
        *_lists(plan),
    ]
    if advice:
        lines += ["", "advice", *(f"  - {line}" for line in advice)]
    return "\n".join([*lines, "", LEFT_OUT])


def too_large(plan: Plan, *, advice: list[str]) -> str:
    """A line about a program that does not fit."""
    needed = "more memory, and" if plan.needed_gib is None else f"{plan.needed_gib:.2f} GiB on each chip, and"
    return (
        f"{_PROGRAMS[plan.target]} does not fit {plan.topology.name} with {_images(plan.per_chip)} a chip: it needs "
        f"{needed} a chip has {plan.topology.chip.hbm_gib} GiB; {'; '.join(advice)}"
    )


def _figures(plan: Plan, price: float | None) -> list[tuple[str, str]]:
    cost, chip, memory = plan.cost, plan.topology.chip, plan.cost.memory
    figures = [
        (
            "memory of a chip",
            f"{memory.arguments:,.0f} MiB arguments + {memory.temporaries:,.0f} MiB temporaries + "
            f"{memory.results:,.0f} MiB results = {memory.total / 1024:.2f} of {chip.hbm_gib} GiB: fits",
        )
    ]
    if plan.largest:
        known = "found by compiling" if plan.largest_is == "compiled" else "a guess from this program; --largest looks"
        figures.append(("largest batch", f"{plan.largest:,} images a chip ({known})"))
    figures += [
        ("work of a chip", f"{_three(cost.gflop)} GFLOP, {_three(cost.gigabytes)} GB to and from memory"),
        (
            "time",
            f"{_ms(cost.estimated_s)} estimated; at least {_ms(cost.roofline_s)}; work alone {_ms(cost.compute_s)}, "
            f"memory alone {_ms(cost.memory_s)}: limited by {cost.limited_by}",
        ),
        ("exchanges", f"at least {_ms(cost.exchanges_s)} at the speed of the links, not in the time"),
        ("speed", _speed(plan)),
    ]
    if plan.hours is not None:
        text = (
            f"{plan.steps:,} steps, {plan.steps_per_epoch:,} an epoch: {plan.hours:.3g} hours, "
            f"{plan.hours * plan.topology.chips:,.3g} chip-hours"
        )
        if price is not None:
            text += f", {plan.hours * plan.topology.chips * price:,.2f} at {price:g} a chip-hour"
        figures.append(("training", text))
    if plan.streamed:
        a_core = plan.images_per_second / plan.topology.hosts / chip.host_cores
        figures.append(("images from hosts", f"{plan.images_per_second / plan.topology.hosts:,.0f} a second from each "
                        f"host, {a_core:,.0f} from each of its {chip.host_cores} virtual CPUs"))  # fmt: skip
    return figures


def _speed(plan: Plan) -> str:
    share = "" if plan.share_of_peak is None else f"; {_percent(plan.share_of_peak)} of the peak"
    rate = plan.images_per_second
    return f"{rate / plan.topology.chips:,.0f} images/s a chip, {rate:,.0f} in all{share}"


def _lists(plan: Plan) -> list[str]:
    cost, lines = plan.cost, []
    if cost.parts:
        lines += ["", "where the time goes: " + "; ".join(f"{part} {share:.0%}" for part, share in cost.parts.items())]
    lines += ["", "exchanges between chips" + ("" if cost.collectives else ": none")]
    for each in cost.collectives:
        overlaps = "beside other work" if each.overlaps else "nothing else meanwhile"
        lines.append(f"  {each.count:>5}  {each.kind:<20}{_size(each.bytes):>12}  {overlaps}")
    lines += ["", "costliest operations"]
    width = max((len(part) for _, part, _ in cost.costliest), default=0)
    lines += [f"  {share:6.1%}  {part:<{width}}  {layer}".rstrip() for share, part, layer in cost.costliest]
    if cost.without_estimate:
        silent = ", ".join(f"{count} {opcode}" for opcode, count in cost.without_estimate.items())
        lines.append(f"  without an estimate: {silent}")
    if cost.loops_unknown:
        lines.append(f"  {cost.loops_unknown} loops count as one round: the program does not tell their length")
    return lines


def table(plans: list[Plan], *, title: str, price: float | None) -> str:
    """The same program on several slices, side by side."""
    rows: dict[str, list[str]] = {
        "chips": [f"{plan.topology.chips:,}" for plan in plans],
        "images a chip": [f"{plan.per_chip:,.3g}" for plan in plans],
        "batch": [f"{plan.batch_size:,}" for plan in plans],
        "memory, GiB": [_memory(plan) for plan in plans],
        "largest, images a chip": [f"{plan.largest:,}" if plan.largest else "–" for plan in plans],
        "estimated time, ms": [_of(plan, lambda plan: _three(1e3 * plan.cost.estimated_s)) for plan in plans],
        "at least, ms": [_of(plan, lambda plan: _three(1e3 * plan.cost.roofline_s)) for plan in plans],
        "exchanges, at least, ms": [_of(plan, lambda plan: _three(1e3 * plan.cost.exchanges_s)) for plan in plans],
        "exchanges": [_of(plan, lambda plan: f"{sum(e.count for e in plan.cost.collectives)}") for plan in plans],
        "images/s a chip": [
            _of(plan, lambda plan: f"{plan.images_per_second / plan.topology.chips:,.0f}") for plan in plans
        ],
        "images/s": [_of(plan, lambda plan: f"{plan.images_per_second:,.0f}") for plan in plans],
        "share of the peak": ["–" if plan.share_of_peak is None else _percent(plan.share_of_peak) for plan in plans],
    }
    if any(plan.hours is not None for plan in plans):
        rows["hours"] = [_of(plan, lambda plan: f"{plan.hours:.3g}") for plan in plans]
        rows["chip-hours"] = [_of(plan, lambda plan: f"{plan.hours * plan.topology.chips:,.3g}") for plan in plans]
        if price is not None:
            rows[f"at {price:g} a chip-hour"] = [
                _of(plan, lambda plan: f"{plan.hours * plan.topology.chips * price:,.2f}") for plan in plans
            ]
    names = [plan.topology.name for plan in plans]
    first = max(map(len, rows))
    widths = [max(len(name), *(len(row[column]) for row in rows.values())) for column, name in enumerate(names)]
    lines = [
        f"{name:<{first}}  " + "  ".join(f"{value:>{width}}" for value, width in zip(row, widths, strict=True))
        for name, row in {"": names, **rows}.items()
    ]
    return "\n".join([f"{title}: {_PROGRAMS[plans[0].target]}", "", *lines, "", LEFT_OUT])


def _of(plan: Plan, value: Callable[[Plan], str]) -> str:
    return value(plan) if plan.fits else "–"


def _memory(plan: Plan) -> str:
    there = plan.topology.chip.hbm_gib
    if plan.fits:
        return f"{plan.cost.memory.total / 1024:.2f} of {there}"
    return f"{'more' if plan.needed_gib is None else f'{plan.needed_gib:.1f}'} > {there}"


def as_json(plan: Plan, *, advice: list[str], price: float | None) -> dict[str, Any]:
    """Everything that a plan says; times in seconds, memory in MiB, money in the price's currency."""
    hours = plan.hours
    found = dataclasses.asdict(plan)
    found["topology"] = {
        "name": plan.topology.name,
        "chips": plan.topology.chips,
        "hosts": plan.topology.hosts,
        "chip": dataclasses.asdict(plan.topology.chip),
    }
    if plan.cost is not None:
        found["cost"]["costliest"] = [list(each) for each in plan.cost.costliest]
        found["cost"]["limited_by"] = plan.cost.limited_by
    return found | {
        "per_chip": plan.per_chip,
        "fits": plan.fits,
        "images_per_second": plan.images_per_second,
        "share_of_peak": plan.share_of_peak,
        "hours": hours,
        "chip_hours": hours and hours * plan.topology.chips,
        "price": None if hours is None or price is None else hours * plan.topology.chips * price,
        "advice": advice,
    }


def _three(value: float) -> str:
    """Three digits, without an exponent where they are whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _size(bytes_: int) -> str:
    return f"{bytes_ / 2**20:,.2f} MiB" if bytes_ >= 2**20 else f"{bytes_ / 2**10:,.1f} KiB"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _images(count: float) -> str:
    return f"{count:,.4g} image{'' if count == 1 else 's'}"
