"""CIFAR-10 from a folder of image files: FOLDER/train/CLASS/* (5,000 each) and FOLDER/test/CLASS/* (1,000 each).

Called by import path, so no TensorFlow is needed: data.name="configs.study.cifar10_images:screening(folder='…')".
"""

import concurrent.futures
import functools
import os
from pathlib import Path

import numpy as np
from PIL import Image

from dgkd_jax.errors import BadInput

FOLDER = os.environ.get("CIFAR10_FOLDER", "~/cifar10")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

Split = tuple[np.ndarray, np.ndarray]


def screening(folder: str = FOLDER) -> tuple[Split, Split]:
    """The first 1,000 training images of each class train, the last 1,000 of each class evaluate; no test image."""
    return _split(folder, "train", 0, 1000), _split(folder, "train", 4000, 5000)


def confirmation(folder: str = FOLDER) -> tuple[Split, Split]:
    """The same training images; 40,000 evaluate: all test images, then the 30,000 training images of neither list."""
    parts = _split(folder, "test", 0, 1000), _split(folder, "train", 1000, 4000)
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return _split(folder, "train", 0, 1000), (images, labels)


def everything(folder: str = FOLDER) -> tuple[Split, Split]:
    """All 50,000 training images; all 10,000 test images evaluate."""
    return _split(folder, "train", 0, 5000), _split(folder, "test", 0, 1000)


@functools.cache
def _split(folder: str, part: str, first: int, last: int) -> Split:
    """Images uint8 `[examples, 32, 32, 3]` and labels, class by class: files `first` to `last` of each, by name."""
    place = Path(folder).expanduser() / part
    if not place.is_dir():
        raise BadInput(
            f"{place}: no such folder; put CIFAR-10's images there as CLASS/NAME.jpg, or name the folder that holds "
            f"train and test by the environment variable CIFAR10_FOLDER"
        )
    classes = sorted(child for child in place.iterdir() if child.is_dir())
    files = [sorted(one.iterdir())[first:last] for one in classes]
    if len(classes) != 10 or {len(each) for each in files} != {last - first}:
        raise BadInput(f"{place}: expected 10 folders of at least {last} images each")
    labels = np.repeat(np.arange(10, dtype=np.int32), last - first)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        images = list(threads.map(_decode, [file for each in files for file in each]))
    return np.stack(images), labels


def _decode(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))
