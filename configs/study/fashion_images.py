"""10,000 images of Fashion-MNIST with few classes, from the files of Debian's package dataset-fashion-mnist.

Called by import path: data.name="configs.study.fashion_images:of_classes(classes=3)".
"""

from pathlib import Path

import numpy as np

from dgkd_jax.data.builders.fashion_mnist import DEFAULT_FOLDER, locate, read_split

Split = tuple[np.ndarray, np.ndarray]
EXAMPLES = 10_000


def of_classes(classes: int = 10, folder: str = DEFAULT_FOLDER) -> tuple[Split, Split]:
    """The first 10,000 training images of the first `classes` classes, and all test images of these."""
    files = locate(Path(folder).expanduser())
    train, test = (_of_first(*read_split(*files[split]), classes) for split in ("train", "test"))
    return (train[0][:EXAMPLES], train[1][:EXAMPLES]), test


def _of_first(images: np.ndarray, labels: np.ndarray, classes: int) -> Split:
    kept = labels < classes
    return images[kept][..., None], labels[kept].astype(np.int32)
