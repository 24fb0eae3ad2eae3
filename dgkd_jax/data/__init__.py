"""Data sets as batches: `open_source` gives a `Source`, `missing` says what only the user can provide.

TensorFlow is imported when a source is opened, never by importing this package.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from dgkd_jax.data import datasets
from dgkd_jax.data.mock import MockSource
from dgkd_jax.errors import BadInput

AUGMENTATIONS = ("none", "pad_crop", "pad_crop_flip", "random_resized_crop", "random_resized_crop_fast")
INTERPOLATIONS = ("bilinear", "bicubic")
_MIB = 2**20
_MEMORY_LIMIT = 2**30  # bytes of encoded training images that may stay in memory


class Source(Protocol):
    """A training and an evaluation split.

    Attributes:
        name: of the data set.
        num_classes: labels are 0 … num_classes − 1.
        image_shape: height, width, channels of what the model sees.
        mean: of the pixels, per channel, in units of pixel/255.
        std: likewise.
        num_train: examples in the training split.
        num_eval: examples in the evaluation split.
        eval_split: its name: "test" or "validation".
        on_device: whether training may take its images from the device's memory, which `train_set` and `epoch_rows` are
            for; `train_batches` gives the same batches.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    num_eval: int
    eval_split: str
    on_device: bool

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in an epoch.

        Raises:
            BadInput: there is none.
        """

    def train_batches(
        self, *, seed: int, batch_size: int, start_step: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches `start_step`, `start_step` + 1, … for ever; each a function of `seed` and its step alone.

        Args:
            seed: not negative, below 2³¹.
            batch_size: B, of the global batch.
            start_step: counted from 0 over all epochs.
            process_index: p of `process_count` P: it gets rows [p·B/P, (p+1)·B/P).

        Returns:
            Iterator of "image", uint8 [B/P, height, width, channels], and "label", int32 [B/P].

        Raises:
            BadInput: the batch cannot be divided over the processes or readers, or is larger than the split;
                while iterating: a file is missing or damaged, more images than allowed cannot be decoded.
        """

    def train_set(self) -> dict[str, np.ndarray] | None:
        """All training images as they are before augmentation; only where `on_device`.

        Returns:
            "image", uint8 [examples, height, width, channels], and "label", int32 [examples], the same on every
            process; None where an image cannot be decoded, so that training has to be by `train_batches`.
        """

    def epoch_rows(
        self, *, seed: int, batch_size: int, epoch: int, process_index: int = 0, process_count: int = 1
    ) -> dict[str, np.ndarray]:
        """What the rows of an epoch's batches are, as `resident.batch` takes it; only where `on_device`.

        Args:
            seed, batch_size, process_index, process_count: as for `train_batches`.
            epoch: counted from 0.

        Returns:
            "index", int32 [steps, B/P], places in `train_set`; with augmentation "window", int32 [steps, B/P, 3]; any
            other array [steps, B/P, ...] becomes part of the batches under its name.

        Raises:
            BadInput: as for `train_batches`.
        """

    def train_ids(self, *, seed: int, batch_size: int, step: int) -> list[str]:
        """What names the examples of one global batch to a person: file and place in it."""

    def eval_batches(
        self, *, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Every example of the evaluation split once over all processes; all yield equally many batches.

        Returns:
            Iterator of "image" and "label" as above and "mask", bool [B/P], False where a row is padding.

        Raises:
            BadInput: as for `train_batches`.
        """


def missing(data: Any) -> str | None:
    """What the user has to provide before `open_source` can work; within seconds and without TensorFlow.

    Args:
        data: the section `data` of a configuration.

    Returns:
        Lines that name what is missing, where it was looked for and the command that provides it; or None.
    """
    if data.mock:
        return None
    from dgkd_jax.data import prepare

    try:
        builder = prepare.find_builder(data)
        if not prepare.is_prepared(builder):
            prepare.check_preparable(data, builder)
    except BadInput as problem:
        return str(problem)
    return None


def open_source(data: Any) -> Source:
    """Open a data set, and build it first if that is needed and possible.

    Args:
        data: the section `data` of a configuration; its keys are explained in `configs/default.py`.

    Raises:
        BadInput: a key has a value that cannot be used, or the data set is missing.
    """
    entry = datasets.find(data.name)
    size = _check_view(data, entry)
    shared = {
        "name": data.name,
        "image_shape": (size, size, entry.channels),
        "mean": _per_channel("mean", data.mean, entry),
        "std": _per_channel("std", data.std, entry),
    }
    if data.mock:
        if entry.num_classes is None:
            raise BadInput(
                f"config.data.mock=True: without its files, config.data.name={data.name!r} has no number of classes; "
                "choose another, such as 'imagenet2012'"
            )
        return MockSource(
            **shared,
            num_classes=entry.num_classes,
            num_train=data.mock_train_examples,
            num_eval=data.mock_eval_examples,
            eval_split=entry.eval_split,
        )

    from dgkd_jax.data import pipeline, prepare

    pipeline.one_thread_per_operation()
    builder = prepare.prepare(data, prepare.find_builder(data))
    splits = builder.info.splits
    eval_split = entry.eval_split or next(name for name in splits if name != "train")
    if data.shuffle_buffer == 0 and splits["train"].num_bytes > _MEMORY_LIMIT:
        raise BadInput(
            f"config.data.shuffle_buffer=0 would hold all of {data.name} in memory, "
            f"{splits['train'].num_bytes / 2**30:.0f} GiB: give a number of records, such as 16384"
        )
    num_train = _train_examples(data, splits["train"].num_examples)
    # Crops that are resized stay the host's work, and a set with a shuffle buffer is one that does not fit in memory.
    can_be_on_device = not data.augment.startswith("random_resized_crop") and data.shuffle_buffer == 0
    decoded_bytes = num_train * math.prod(shared["image_shape"])
    return pipeline.TfdsSource(
        **shared,
        num_classes=builder.info.features["label"].num_classes,
        num_train=num_train,
        num_eval=splits[eval_split].num_examples,
        eval_split=eval_split,
        builder=builder,
        augment=data.augment,
        eval_resize=data.eval_resize,
        eval_interpolation=data.eval_interpolation,
        shuffle_buffer=data.shuffle_buffer,
        readers=data.readers,
        max_bad_images=data.max_bad_images,
        label_noise=data.label_noise,
        on_device=can_be_on_device and decoded_bytes <= data.on_device_mib * _MIB,
    )


def _train_examples(data: Any, there: int) -> int:
    if data.train_examples > there:
        raise BadInput(f"config.data.train_examples={data.train_examples}: {data.name} has {there} training images")
    return data.train_examples or there


def _check_view(data: Any, entry: datasets.DataSet) -> int:
    """Hold what is done to the images to what can be done; returns the side of what the model sees."""
    for key, value, choices in (
        ("augment", data.augment, AUGMENTATIONS),
        ("eval_interpolation", data.eval_interpolation, INTERPOLATIONS),
    ):
        if value not in choices:
            raise BadInput(f"config.data.{key}={value!r} is not allowed: one of {', '.join(map(repr, choices))}")
    for key, value, low in (
        ("image_size", data.image_size, 0),
        ("eval_resize", data.eval_resize, 0),
        ("shuffle_buffer", data.shuffle_buffer, 0),
        ("readers", data.readers, 1),
    ):
        if value < low:
            raise BadInput(f"config.data.{key}={value} is not allowed: {low} or more")
    size = data.image_size or entry.size
    if size is None:
        raise BadInput(
            f"config.data.image_size=0 is not allowed for {data.name}, whose images differ in size: "
            "give pixels, such as 224"
        )
    smallest = data.eval_resize or entry.size
    if smallest is not None and smallest < size:
        raise BadInput(
            f"config.data.image_size={size} is larger than the images, {smallest} pixels: "
            f"set config.data.eval_resize to {size} or more"
        )
    return size


def _per_channel(key: str, given: tuple[float, ...], entry: datasets.DataSet) -> tuple[float, ...]:
    if not given:
        return getattr(entry, key)
    if len(given) != entry.channels or not all(math.isfinite(value) for value in given):
        raise BadInput(
            f"config.data.{key}={tuple(given)} is not allowed: one number for each of {entry.channels} channels"
        )
    return tuple(given)
