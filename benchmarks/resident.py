"""A training set in the device's memory beside the same batches from the host: images a second of the whole step.

    python -m benchmarks.resident [--pair=small_cnn_w24,small_cnn_w8] [--data=mnist5k] [--batch=128] [--steps=31]
                                  [--calls=1,8,32] [--rounds=3] [--output=FILE.json]

DKD of the student from the teacher (random weights of both), with the augmentation of the set's recipe: "streamed" is
`Source.train_batches` with the next batches on their way to the device, "resident" the set on the device with so many
steps in a call of the program, both as `training.feed` has them. Both are compiled before; each turn runs `steps` steps
of each, in turn. Seconds of the processor are of all threads: what the host does for the batches is in them.
`--data=generated` is 5,000 random images of CIFAR's size and format (PNG).
"""

import argparse
import functools
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import report, side_by_side
from configs import cifar100, mnist5k
from dgkd_jax import models
from dgkd_jax.data.open import open_source
from dgkd_jax.models.network import Network
from dgkd_jax.runs import sharding
from dgkd_jax.training.build import build
from dgkd_jax.training.feed import feed

GENERATED, CLASSES = 5000, 100


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--pair", default="small_cnn_w24,small_cnn_w8", help="teacher,student")
    parser.add_argument("--data", default="mnist5k", choices=("mnist5k", "generated"))
    parser.add_argument("--batch", type=int, default=128, help="images in a batch")
    parser.add_argument("--steps", type=int, default=31, help="in each turn of each")
    parser.add_argument("--calls", default="1,8,32", help="steps in a call, of each resident form")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    arguments = parser.parse_args()
    report.check_output(arguments.output)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(arguments, Path(folder))
        forms = {"streamed": _form(config, steps=arguments.steps, on_device_mib=0, steps_per_call=1)}
        for most in arguments.calls.split(","):
            forms[f"resident, {most} in a call"] = _form(
                config, steps=arguments.steps, on_device_mib=2048, steps_per_call=int(most)
            )
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
        for form in forms.values():
            next(form)  # compiles, and fills what is read ahead
        for _ in range(arguments.rounds):
            for name, form in forms.items():
                found[name].append(side_by_side.timed(functools.partial(next, form)))
    rows = _print_rates(found, images=arguments.steps * arguments.batch)
    report.finish({"environment": report.environment(), "rows": rows}, output=arguments.output)


def _print_rates(found: dict[str, list[tuple[float, float]]], *, images: int) -> list[dict[str, Any]]:
    """The table; returns its rows for the JSON file."""
    rows, lines = [], []
    processor_seconds = {name: [processor for _, processor in times] for name, times in found.items()}
    for name, times in found.items():
        wall, processor = (statistics.median(values) for values in zip(*times, strict=True))
        ratios = sorted(a / b for a, b in zip(processor_seconds["streamed"], processor_seconds[name], strict=True))
        rows.append({"form": name, "wall_s": wall, "processor_s": processor, "ratios": ratios, "images": images})
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} … {ratios[-1]:.2f})"
        lines.append((name, f"{images / wall:,.0f}", f"{images / processor:,.0f}", spread))
    print(report.table(("form", "images/s", "images/s of processor", "x streamed (processor)"), lines))
    return rows


def _form(config: ConfigDict, *, steps: int, on_device_mib: int, steps_per_call: int) -> Iterator[None]:
    """Runs `steps` steps each time that it is asked for the next."""
    config = config.copy_and_resolve_references()
    config.steps_per_call, config.data.on_device_mib = steps_per_call, on_device_mib
    source, mesh = open_source(config.data), sharding.make_mesh()
    model = models.create(config.teacher.model, num_classes=source.num_classes)
    variables = sharding.place(models.initialise(model, source.image_shape, 1), mesh)
    teacher = Network(model.apply, variables, source.mean, source.std)
    program, current = build(config, source, mesh, teacher)
    compiled, done = None, 0
    with feed(config, program, source=source, mesh=mesh, start=0) as fed:
        while True:
            end = done + steps
            while done < end:
                left = program.steps_per_epoch - done % program.steps_per_epoch
                count = min(fed.steps_per_call, end - done, left)
                given = fed.arguments(done, count)
                if compiled is None:
                    compiled = fed.program.lower(current, teacher, *given).compile()
                current = compiled(current, teacher, *given)
                done += count
            jax.block_until_ready(current)
            yield


def _config(arguments: argparse.Namespace, folder: Path) -> ConfigDict:
    config = (mnist5k if arguments.data == "mnist5k" else cifar100).get_config()
    config.method, config.batch_size = "dkd", arguments.batch
    config.teacher.model, config.student.model = arguments.pair.split(",")
    if arguments.data == "generated":
        random = np.random.default_rng(0)
        for split, count in (("train", GENERATED), ("test", CLASSES)):
            for index in range(count):
                path = folder / "images" / split / f"{index % CLASSES:03d}" / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
        os.environ["TFDS_DATA_DIR"] = str(folder / "prepared")  # read when TFDS is imported, in open_source
        config.data.name, config.data.manual_dir = "image_folder", str(folder / "images")
    return config


if __name__ == "__main__":
    report.run(main)
