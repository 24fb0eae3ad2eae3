"""The interface of a data set: batches for training and evaluation. `open.py` opens one."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np


class Description(Protocol):
    """What a program must know of a data set: all but its examples.

    Attributes:
        name: of the data set.
        num_classes: labels are 0 … num_classes − 1.
        image_shape: (height, width, channels) of the images that the model sees.
        mean: of the pixels, per channel, in units of pixel/255.
        std: standard deviation of the pixels, per channel, in units of pixel/255.
        num_train: examples in the training split.
        num_eval: examples in the evaluation split.
        eval_split: name of the evaluation split: "test" or "validation".
        on_device: whether the training set may be kept in the device's memory, by `train_set` and `epoch_rows`;
            `train_batches` gives the same batches.
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
            BadInput: the split is smaller than one batch.
        """


class Source(Description, Protocol):
    """A training and an evaluation split."""

    def train_batches(
        self, *, seed: int, batch_size: int, start_step: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Batches `start_step`, `start_step` + 1, … without end; each is a function of `seed` and its step.

        Args:
            seed: in [0, 2³¹).
            batch_size: B, rows of the global batch.
            start_step: counted from 0 over all epochs.
            process_index: p of P = `process_count`; process p gets rows [p·B/P, (p+1)·B/P).

        Returns:
            Iterator of {"image": uint8 [B/P, height, width, channels], "label": int32 [B/P]}.

        Raises:
            BadInput: the batch is not divisible by the processes or readers, or is larger than the split; while
                iterating: a file is missing or damaged, or more images are undecodable than allowed.
        """

    def train_set(self) -> dict[str, np.ndarray] | None:
        """All training images before augmentation. Call it only if `on_device`.

        Returns:
            {"image": uint8 [examples, height, width, channels], "label": int32 [examples]}, the same on every
            process; None where an image cannot be decoded: then train with `train_batches`.
        """

    def epoch_rows(
        self, *, seed: int, batch_size: int, epoch: int, process_index: int = 0, process_count: int = 1
    ) -> dict[str, np.ndarray]:
        """What the rows of an epoch's batches are, for `on_device.batch`. Call it only if `on_device`.

        Args:
            seed, batch_size, process_index, process_count: as for `train_batches`.
            epoch: counted from 0.

        Returns:
            "index": int32 [steps, B/P], places in `train_set`; with augmentation also "window": int32 [steps, B/P, 3].
            Any other array [steps, B/P, ...] is added to the batches under its name.

        Raises:
            BadInput: as for `train_batches`.
        """

    def train_ids(self, *, seed: int, batch_size: int, step: int) -> list[str]:
        """A readable name of each example in a global batch: its file and its place in the file."""

    def eval_batches(
        self, *, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Every example of the evaluation split exactly once over all processes; all yield equally many batches.

        Returns:
            Iterator of "image" and "label" as from `train_batches`, and "mask": bool [B/P], False on padding rows.

        Raises:
            BadInput: as for `train_batches`.
        """
