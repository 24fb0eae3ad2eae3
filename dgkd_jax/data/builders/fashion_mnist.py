"""Fashion-MNIST from its four IDX files, such as those of Debian's package dataset-fashion-mnist."""

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dgkd_jax.errors import BadInput

DEFAULT_FOLDER = "/usr/share/datasets/fashion-mnist"
_PREFIXES = {"train": "train", "test": "t10k"}
_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip


def locate(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Image file and label file of each split.

    Raises:
        BadInput: names the first missing file.
    """
    return {
        split: (_file(folder, f"{prefix}-images-idx3-ubyte"), _file(folder, f"{prefix}-labels-idx1-ubyte"))
        for split, prefix in _PREFIXES.items()
    }


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file.

    Args:
        dimensions: the number that the array must have.

    Returns:
        uint8 array of the shape in the file's header.

    Raises:
        BadInput: wrong magic number, wrong length, or an unreadable file.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    magic = bytes([0, 0, 8, dimensions])  # 8: unsigned bytes
    if content[:4] != magic:
        raise BadInput(
            f"{path} is not the IDX file it should be: it begins with {content[:4].hex()}, not {magic.hex()}"
        )
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    if len(content) != header + math.prod(shape):
        raise BadInput(
            f"{path}: its header promises {math.prod(shape)} bytes of data, it holds {len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_split(image_file: Path, label_file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 28, 28] and labels [n], both uint8.

    Raises:
        BadInput: as `read_idx`; or the two files hold different numbers of examples.
    """
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if images.shape[1:] != (28, 28):
        raise BadInput(f"{image_file}: images of {images.shape[1]}x{images.shape[2]} pixels, expected 28x28")
    if len(images) != len(labels):
        raise BadInput(f"{image_file} holds {len(images)} images and {label_file} {len(labels)} labels")
    if len(labels) == 0 or labels.max() >= len(_CLASSES):
        raise BadInput(f"{label_file}: expected at least one label, and all below {len(_CLASSES)}")
    return images, labels


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise BadInput(
        f"The data set fashion_mnist_local is missing: looked for {name}[.gz] in {folder}.\n"
        "  Provide it:  apt-get install dataset-fashion-mnist\n"
        "  Or name a folder with the four IDX files: --config.data.manual_dir=FOLDER"
    )


class FashionMnistLocal(tfds.core.GeneratorBasedBuilder):
    """60,000 training and 10,000 test images of 28x28 grey pixels.

    Args:
        folder: with the IDX files; read only when the set is built.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder: Path, **kwargs):
        self.folder = folder
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Fashion-MNIST (Xiao et al., arXiv:1708.07747) from local IDX files.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=_CLASSES),
                }
            ),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        arrays = {split: read_split(*files) for split, files in locate(self.folder).items()}
        return {split: self._generate_examples(*pair) for split, pair in arrays.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator:
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield row, {"image": image[..., None], "label": int(label)}
