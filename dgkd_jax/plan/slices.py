"""Slices of TPUs by name: what Google, GKE and the compiler call them."""

import dataclasses
import math
import re

from dgkd_jax.errors import BadInput, closest
from dgkd_jax.runs.chips import CHIPS, Chip

# The shapes that are rented, by the number of axes of the torus.
_SHAPES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: (
        *((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8)),
        *((8, 8, 8), (8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24)),
    ),
}
# What others call the chips: the accelerator types of TPU VMs, and GKE's labels of nodes.
_OTHER_NAMES = {
    "v5litepod": "v5e",
    "tpu-v4-podslice": "v4",
    "tpu-v5-lite-podslice": "v5e",
    "tpu-v5-lite-device": "v5e",
    "tpu-v5p-slice": "v5p",
    "tpu-v6e-slice": "v6e",
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are joined by their own links.

    Attributes:
        chip: what each is.
        shape: chips along each axis, as many as the chip has axes.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        return math.ceil(self.chips / self.chip.chips_per_host)

    @property
    def name(self) -> str:
        """As the compiler calls it: `v5e:4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def named(text: str) -> Slice:
    """The slice called `text`.

    Args:
        text: `v5e:4x4`, with the chips along each axis; or `v5e-16`, as TPU VMs are ordered: the number counts chips
            for v5e and v6e, and cores, two in a chip, for v4 and v5p. Google's `v5litepod-16` and GKE's
            `tpu-v5-lite-podslice:4x4` are the same slice.

    Raises:
        BadInput: there is no such slice; the message offers the nearest.
    """
    match = re.fullmatch(r"(?P<chip>[\w-]+?)(?:-(?P<count>\d+)|:(?P<shape>\d+(?:x\d+)*))", text)
    if not match:
        raise BadInput(f"--topology={text} is no name of a slice: write v5e:4x4 or v5e-16, one of {', '.join(CHIPS)}")
    chip = _chip(text, match["chip"])
    if match["count"]:
        return _of_count(text, chip, int(match["count"]))
    shape = tuple(map(int, match["shape"].split("x")))
    whole_hosts = all(side % 2 == 0 for side in shape[:2]) or set(shape) == {1}
    if len(shape) != chip.axes or not whole_hosts or not 0 < math.prod(shape) <= chip.most_chips:
        raise BadInput(f"--topology={text}: there is no such slice; the nearest is {_nearest(chip, math.prod(shape))}")
    return Slice(chip, shape)


def _chip(text: str, name: str) -> Chip:
    name = _OTHER_NAMES.get(name, name)
    if name not in CHIPS:
        near = closest(name, CHIPS)
        offered = f"the nearest is {text.replace(name, near[0], 1)}" if near else f"there are {', '.join(CHIPS)}"
        raise BadInput(f"--topology={text}: {name!r} is no chip that the compiler is known for; {offered}")
    return CHIPS[name]


def _of_count(text: str, chip: Chip, count: int) -> Slice:
    for shape in _SHAPES[chip.axes]:
        if math.prod(shape) * chip.cores_per_chip == count and math.prod(shape) <= chip.most_chips:
            return Slice(chip, shape)
    counted = "cores, two in a chip" if chip.cores_per_chip == 2 else "chips"
    near = _nearest(chip, count / chip.cores_per_chip)
    raise BadInput(
        f"--topology={text}: {chip.name}-N counts {counted}, and there is no such slice; the nearest is {near}"
    )


def _nearest(chip: Chip, chips: float) -> str:
    """The slice that is rented and whose number of chips is nearest, by both names."""
    offered = [shape for shape in _SHAPES[chip.axes] if math.prod(shape) <= chip.most_chips]
    shape = min(offered, key=lambda shape: abs(math.log(math.prod(shape) / max(chips, 0.5))))
    return f"{Slice(chip, shape).name} ({chip.name}-{math.prod(shape) * chip.cores_per_chip})"
