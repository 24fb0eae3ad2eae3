"""The catalogue of data sets: what a model must know of each before any file is read.

Means and standard deviations are per channel, over all pixels of the training split, in units of pixel/255.
"""

import dataclasses
from typing import Any

from dgkd_jax.errors import BadInput, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set's entry.

    Attributes:
        num_classes: None where the files decide (a folder of images).
        num_train: examples in the training split, as published; None where the files decide. Read where the files are
            not: a run counts them.
        num_eval: likewise of the evaluation split.
        size: side of the images in pixels; None where it varies.
        channels: 1 or 3; decoding converts images to it.
        mean: per channel.
        std: per channel.
        eval_split: TFDS's name of the evaluation split; None where the files decide.
        host: that TFDS downloads from; None where nothing is downloaded.
    """

    num_classes: int | None
    num_train: int | None = None
    num_eval: int | None = None
    size: int | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_split: str | None = "test"
    host: str | None = None


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's

TABLE: dict[str, DataSet] = {
    # Measured: python -m dgkd_jax.data.prepare mnist5k --statistics
    "mnist5k": DataSet(
        num_classes=10, num_train=4000, num_eval=1000, size=28, channels=1, mean=(0.1311,), std=(0.3083,)
    ),
    # Measured: python -m dgkd_jax.data.prepare fashion_mnist_local --statistics
    "fashion_mnist_local": DataSet(
        num_classes=10, num_train=60_000, num_eval=10_000, size=28, channels=1, mean=(0.2860,), std=(0.3530,)
    ),
    "mnist": DataSet(
        num_classes=10,
        num_train=60_000,
        num_eval=10_000,
        size=28,
        channels=1,
        mean=(0.1307,),
        std=(0.3081,),
        host="storage.googleapis.com",
    ),
    "cifar10": DataSet(
        num_classes=10,
        num_train=50_000,
        num_eval=10_000,
        size=32,
        channels=3,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        host="www.cs.toronto.edu",
    ),
    "cifar100": DataSet(
        num_classes=100,
        num_train=50_000,
        num_eval=10_000,
        size=32,
        channels=3,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        host="www.cs.toronto.edu",
    ),
    # Figures in common use for SVHN's training split; not recomputed here.
    "svhn_cropped": DataSet(
        num_classes=10,
        num_train=73_257,
        num_eval=26_032,
        size=32,
        channels=3,
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        host="ufldl.stanford.edu",
    ),
    # ImageNet's figures: none are established for Food-101 itself.
    "food101": DataSet(
        num_classes=101,
        num_train=75_750,
        num_eval=25_250,
        size=None,
        channels=3,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        eval_split="validation",
        host="data.vision.ee.ethz.ch",
    ),
    "imagenet2012": DataSet(
        num_classes=1000,
        num_train=1_281_167,
        num_eval=50_000,
        size=None,
        channels=3,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        eval_split="validation",
    ),
    # Figures in common use for Tiny ImageNet's training split; not recomputed here.
    "tiny_imagenet": DataSet(
        num_classes=200,
        num_train=100_000,
        num_eval=10_000,
        size=64,
        channels=3,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        eval_split="validation",
    ),
    # ImageNet's figures; set data.mean and data.std for images that look different.
    "image_folder": DataSet(
        num_classes=None, size=None, channels=3, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, eval_split=None
    ),
}

NAMES: tuple[str, ...] = tuple(TABLE)


def of_builder(builder: Any) -> DataSet:
    """The entry of a user's own TFDS builder, from its features "image" and "label".

    Raises:
        BadInput: it has no such features.
    """
    features = builder.info.features
    if features is None or not {"image", "label"} <= set(features):
        found = ", ".join(features or ()) or "none"
        raise BadInput(f"the TFDS builder {builder.name} must have the features image and label, and has {found}")
    height, width, channels = features["image"].shape
    return DataSet(
        num_classes=features["label"].num_classes,
        size=height if height == width else None,
        channels=channels or 3,
        mean=_IMAGENET_MEAN if channels != 1 else (0.5,),
        std=_IMAGENET_STD if channels != 1 else (0.25,),
        eval_split=None,
    )


def find(name: str) -> DataSet:
    """The entry of the data set called `name`.

    Raises:
        BadInput: there is no such data set.
    """
    if name not in TABLE:
        raise BadInput(
            f"config.data.name={name!r} is not allowed: one of {', '.join(map(repr, NAMES))}{did_you_mean(name, NAMES)}"
        )
    return TABLE[name]
