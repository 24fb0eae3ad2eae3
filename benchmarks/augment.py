"""What augmentation on the device takes of each image: its parts, and all of it as configs/imagenet_strong.py has it.

    python -m benchmarks.augment [--size=224] [--batch=32] [--rounds=9] [--cores=N] [--output=FILE.json]

One compiled program each, on random pixels; the parts take turns. Processor time is of all threads.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from benchmarks import report, side_by_side
from dgkd_jax.data.device_augment import DeviceAugment

NOTHING = DeviceAugment(
    seed=0, num_classes=1000, fill=(124, 116, 104), trivial_augment=False, random_erasing=0.0, mixup=0.0, cutmix=0.0
)
PARTS = {
    "mixup or CutMix": {"mixup": 0.2, "cutmix": 1.0},
    "random erasing": {"random_erasing": 0.1},
    "TrivialAugment": {"trivial_augment": True},
    "all": {"trivial_augment": True, "random_erasing": 0.1, "mixup": 0.2, "cutmix": 1.0},
}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--size", type=int, default=224, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each part")
    report.add_cores(parser)
    arguments = parser.parse_args()
    report.check_output(arguments.output)
    report.use_cores(arguments.cores)
    random = np.random.default_rng(0)
    batch = {
        "image": jax.device_put(random.integers(0, 256, (arguments.batch, *2 * (arguments.size,), 3), np.uint8)),
        "label": jax.device_put(random.integers(0, 1000, arguments.batch, np.int32)),
    }
    runs = {
        name: functools.partial(_run, jax.jit(dataclasses.replace(NOTHING, **on)), batch) for name, on in PARTS.items()
    }
    times = {clock: side_by_side.alternate(runs, rounds=arguments.rounds, clock=clock) for clock in side_by_side.CLOCKS}
    rows = [
        {"part": name} | {clock: _per_image(found[name], arguments.batch) for clock, found in times.items()}
        for name in PARTS
    ]
    columns = ("part", "ms an image [quartiles]", "of the processor")
    print(report.table(columns, [(row["part"], *(side_by_side.span(row[clock]) for clock in times)) for row in rows]))
    report.finish({"environment": report.environment(), "rows": rows}, output=arguments.output)


def _run(augment: Any, batch: dict[str, jax.Array]) -> None:
    jax.block_until_ready(augment(batch, np.int32(1)))


def _per_image(seconds: list[float], images: int) -> dict[str, float]:
    return side_by_side.spread([second / images for second in seconds])


if __name__ == "__main__":
    report.run(main)
