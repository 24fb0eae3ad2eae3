"""Images per second and core of the training pipeline on JPEGs of ImageNet's size, beside decoding alone and PyTorch.

    taskset -c 0 python -m benchmarks.data [--images=256] [--side=224] [--rounds=5] [--output=FILE.json]

The images are generated: smooth colours and noise, 500x375 pixels, about 100 kB. Every loader makes uint8 images of
`side` pixels by a random resized crop and a flip. Ours is `open_source` on a folder of images, as it trains, with
`data.augment=random_resized_crop` and `random_resized_crop_fast`;
"decoding" is `tf.io.decode_jpeg` of whole images and nothing else; PyTorch's is a DataLoader in this process, with
PIL (torchvision's transforms) and, where opencv-python-headless is installed, with OpenCV. Hold it to one core: the
numbers are seconds of the processor, of all threads.
"""

import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf
import torch
from PIL import Image

from benchmarks import jpegs, report, side_by_side
from configs.default import get_config
from dgkd_jax.data.open import open_source
from dgkd_jax.errors import BadInput
from dgkd_jax.parity import torch_networks

BATCH = 32


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--images", type=int, default=256, help="generated, and read in each turn; a multiple of 32")
    parser.add_argument("--side", type=int, default=224, help="of the crops, in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each that are counted")
    args = parser.parse_args()
    report.check_output(args.output)
    if args.images < BATCH or args.images % BATCH:
        raise BadInput(f"--images={args.images}: must be a multiple of {BATCH}")
    if len(os.sched_getaffinity(0)) > 1:
        print("more than one core: threads that wait or spin count as work; see taskset in --help", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        paths = jpegs.write_folder(Path(folder), images=jpegs.encoded(args.images))
        size = statistics.mean(path.stat().st_size for path in paths)
        runs = {
            "ours": ours(Path(folder), args.images, args.side, "random_resized_crop"),
            "ours, fast": ours(Path(folder), args.images, args.side, "random_resized_crop_fast"),
            "decoding": lambda: [tf.io.decode_jpeg(tf.io.read_file(str(path))).shape for path in paths],
            "PyTorch, PIL": torch_loader(paths, args.side, _pil(args.side)),
        }
        if opencv := _opencv(args.side):
            runs["PyTorch, OpenCV"] = torch_loader(paths, args.side, opencv)
        seconds = side_by_side.alternate(runs, rounds=args.rounds, clock="cpu", pause=side_by_side.OPENMP_PAUSE)
    found, rows = [], []
    for name, times in seconds.items():
        rate, quicker = args.images / statistics.median(times), side_by_side.ratio(seconds, "ours", name)
        rows.append((name, f"{rate:.1f}", f"{quicker[0]:.2f}", f"{quicker[1]:.2f} … {quicker[2]:.2f}"))
        found.append({"loader": name, "images_per_core_second": rate, "ours_is_times_as_quick": quicker})
    print(f"{args.images} JPEGs of {jpegs.WIDTH}x{jpegs.HEIGHT}, {size / 1000:.0f} kB, to {args.side} pixels")
    print(report.table(("loader", "images/s/core", "ours is x", "lowest … highest"), rows))
    environment = report.environment("tensorflow-cpu", "torch", "torchvision", "pillow", "opencv-python-headless")
    report.finish(
        {"environment": environment, "arguments": vars(args), "bytes": size, "loaders": found}, output=args.output
    )


def ours(folder: Path, images: int, side: int, augment: str) -> Callable[[], None]:
    os.environ["TFDS_DATA_DIR"] = str(folder / "prepared")  # read when TFDS is imported, in open_source
    config = get_config()
    config.data.update(
        {
            "name": "image_folder",
            "manual_dir": str(folder),
            "image_size": side,
            "eval_resize": side,
            "augment": augment,
        }
    )
    source = open_source(config.data)
    batches = source.train_batches(seed=0, batch_size=BATCH, start_step=0)

    def run():
        for batch in itertools.islice(batches, images // BATCH):
            assert batch["image"].dtype == np.uint8
        _settle()

    return run


def _settle() -> None:
    """Waits until the threads that decode ahead have filled their buffers: that work belongs to this turn."""
    before = -1.0
    while time.process_time() - before > 0.005:
        before = time.process_time()
        time.sleep(0.2)


def torch_loader(paths: list[Path], side: int, load):
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            return load(paths[index]), index % 2

    loader = torch.utils.data.DataLoader(Images(), BATCH, shuffle=True)

    def run():
        for images, _ in loader:
            assert images.dtype == torch.uint8
            assert side in images.shape

    return run


def _pil(side: int):
    # Its builder knows how to import torchvision beside a torch of another build.
    torch_networks.create("resnet18", _Ten(), side=side)
    from torchvision import transforms

    steps = transforms.Compose(
        [transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    return lambda path: steps(Image.open(path).convert("RGB"))


class _Ten:
    num_classes = 10


def _opencv(side: int):
    try:
        import cv2
    except ImportError:
        return None
    from torchvision import transforms

    cv2.setNumThreads(1)

    def load(path: Path) -> torch.Tensor:
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        shape = torch.empty(1, *image.shape[:2])
        top, left, height, width = transforms.RandomResizedCrop.get_params(shape, (0.08, 1.0), (3 / 4, 4 / 3))
        image = cv2.resize(image[top : top + height, left : left + width], (side, side))
        return torch.from_numpy(image[:, ::-1].copy() if torch.rand(()) < 0.5 else image)

    return load


if __name__ == "__main__":
    report.run(main)
