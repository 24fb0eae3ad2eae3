"""How long does it take to go on in the middle of an epoch? First batch at its beginning and near its end.

    python -m benchmarks.resume [--images=4000] [--buffer=1000] [--rounds=3] [--output=FILE.json]

JPEGs of ImageNet's size (103 kB, 224-pixel crops) in TFRecords, streamed through a shuffle buffer as ImageNet is. A run
that goes on reads what the epoch had before, without decoding it, to fill the buffer as it was; sets in memory
(`data.shuffle_buffer=0`) skip indices instead.
"""

import functools
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks import jpegs, report, side_by_side
from configs.default import get_config
from dgkd_jax.data.open import open_source
from dgkd_jax.data.source import Source

BATCH, KINDS = 32, 16


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--images", type=int, default=4000, help="in the epoch")
    parser.add_argument("--buffer", type=int, default=1000, help="images in the shuffle buffer")
    parser.add_argument("--rounds", type=int, default=3, help="of each, in turns")
    arguments = parser.parse_args()
    report.check_output(arguments.output)
    with tempfile.TemporaryDirectory() as folder:
        source = _source(Path(folder), arguments)
        steps = source.steps_per_epoch(BATCH)
        starts = {"beginning": 0, "end": steps - 1}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in starts}
        for _ in range(arguments.rounds):
            for name, step in starts.items():
                found[name].append(side_by_side.timed(functools.partial(_first_batch, source, step)))
    rows = []
    for name, step in starts.items():
        wall, cpu = (statistics.median(values) for values in zip(*found[name], strict=True))
        rows.append({"start": name, "images skipped": step * BATCH, "wall, s": wall, "processor, s": cpu})
        print(f"first batch at the {name:9} of an epoch ({step * BATCH:6} images before it): {wall:6.2f} s, "
              f"{cpu:6.2f} s of the processor")  # fmt: skip
    skipped = rows[1]["images skipped"]
    for unit in ("wall, s", "processor, s"):
        print(f"per skipped image, {unit.split(',')[0]}: {1e6 * (rows[1][unit] - rows[0][unit]) / skipped:.0f} µs")
    report.finish({"environment": report.environment(), "rows": rows}, output=arguments.output)


def _first_batch(source: Source, step: int) -> None:
    next(source.train_batches(seed=0, batch_size=BATCH, start_step=step))


def _source(folder: Path, arguments) -> Source:
    kinds = jpegs.encoded(KINDS)
    jpegs.write_folder(folder / "images", images=[kinds[index % KINDS] for index in range(arguments.images)])
    os.environ["TFDS_DATA_DIR"] = str(folder / "prepared")  # read when TFDS is imported, in open_source
    data = get_config().data
    data.update(
        name="image_folder",
        manual_dir=str(folder / "images"),
        image_size=224,
        eval_resize=256,
        augment="random_resized_crop",
        shuffle_buffer=arguments.buffer,
    )
    return open_source(data)


if __name__ == "__main__":
    report.run(main)
