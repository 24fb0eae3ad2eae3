"""Where the time of a training image goes: milliseconds of the processor for each part of random_resized_crop.

    taskset -c 0 python -m benchmarks.data_parts [--images=64] [--side=224] [--rounds=9] [--output=FILE.json]

On the images of `benchmarks.data`, one after the other in one tf.data graph, so that nothing works ahead. "nothing" is
what a graph costs that only hands an image on; it is in every other row too.
"""

import statistics

import numpy as np
import tensorflow as tf

from benchmarks import jpegs, report, side_by_side
from dgkd_jax.data import augment, tfds_source
from dgkd_jax.errors import BadInput


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--images", type=int, default=64, help="generated, and read in each turn")
    parser.add_argument("--side", type=int, default=224, help="of the crops, in pixels")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each that are counted")
    args = parser.parse_args()
    report.check_output(args.output)
    if args.images < 1:
        raise BadInput(f"--images={args.images}: 1 or more")

    tfds_source.one_thread_per_operation()
    runs = {name: _run(examples, part, args.images) for name, (examples, part) in parts(args.images, args.side).items()}
    seconds = side_by_side.alternate(runs, rounds=args.rounds, clock="cpu", pause=side_by_side.OPENMP_PAUSE)
    found = {name: [1e3 * time / args.images for time in times] for name, times in seconds.items()}
    rows = [
        (name, f"{statistics.median(times):.2f}", f"{min(times):.2f} … {max(times):.2f}")
        for name, times in found.items()
    ]
    print(report.table(("part", "ms/image", "lowest … highest"), rows))
    environment = report.environment("tensorflow-cpu")
    report.finish({"environment": environment, "arguments": vars(args), "milliseconds": found}, output=args.output)


def parts(images: int, side: int) -> dict:
    """Name -> (data set, what is done to each of its elements)."""
    uniforms = np.random.default_rng(1).random((images, augment.RANDOM_RESIZED_CROP_UNIFORMS)).astype(np.float32)
    files = tf.data.Dataset.from_tensor_slices((jpegs.encoded(images), uniforms))

    def window(file, uniforms):
        return augment.decode_random_window(file, uniforms[:-1], channels=3)

    def fast_window(file, uniforms):
        return augment.decode_random_window(file, uniforms[:-1], channels=3, fast=True)

    def crop(file, uniforms):
        return augment.random_resized_crop(file, uniforms, size=side, channels=3)

    def fast_crop(file, uniforms):
        return augment.random_resized_crop(file, uniforms, size=side, channels=3, fast=True)

    windows, crops = files.map(window).cache(), files.map(lambda *file: (crop(*file), file[1][-1])).cache()
    new = [side, side]
    return {
        "nothing": (files, lambda file, uniforms: uniforms),
        "window's place": (files, lambda _, u: augment.random_window(jpegs.HEIGHT, jpegs.WIDTH, u[:-1])),
        "window's place and decoding": (files, window),
        "the same, fast": (files, fast_window),
        "resizing, by rows": (windows, lambda image: augment.resized(image, new, interpolation="bilinear")),
        "resizing, tf.image.resize with antialias": (
            windows,
            lambda image: augment.to_uint8(tf.image.resize(image, new, antialias=True)),
        ),
        "resizing, tf.image.resize without": (
            windows,
            lambda image: augment.to_uint8(tf.image.resize(tf.cast(image, tf.float32), new)),
        ),
        "flip": (crops, augment.flip),
        "all": (files, crop),
        "all, fast": (files, fast_crop),
        "decoding of whole images": (files, lambda file, _: tf.io.decode_jpeg(file)),
    }


def _run(examples: tf.data.Dataset, part, images: int):
    options = tf.data.Options()
    options.autotune.enabled = False
    elements = iter(examples.repeat().map(part).with_options(options))

    def run():
        for _ in range(images):
            next(elements)

    return run


if __name__ == "__main__":
    report.run(main)
