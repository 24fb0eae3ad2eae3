"""Augmentation of a batch on the device, inside the training step: TrivialAugment, random erasing, then mixing.

A pure function of the batch, the seed and the step, applied once, before the teacher and the student see the batch.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from dgkd_jax.data import erasing, mixing, trivial_augment
from dgkd_jax.data.source import Description


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceAugment:
    """What is done to a training batch on the device.

    Attributes:
        seed: of the run.
        num_classes: C.
        fill: grey level of each channel for what is erased.
        trivial_augment: whether it is on.
        random_erasing: probability for each image; 0: off.
        mixup, cutmix: α of each; 0: off. Both: one of the two for each batch, by a fair coin.
    """

    seed: int
    num_classes: int
    fill: tuple[int, ...]
    trivial_augment: bool
    random_erasing: float
    mixup: float
    cutmix: float

    def __call__(self, batch: dict[str, jax.Array], step: jax.Array | int) -> dict[str, jax.Array]:
        """The batch that the networks see.

        Args:
            batch: {"image": uint8 `[batch, height, width, channels]`, "label": int `[batch]`}; others stay as they are.
            step: of the run, counted from 0.

        Returns:
            The batch with other images, and with mixing with labels float32 `[batch, C]`; with nothing on, `batch`.
        """
        if not (self.trivial_augment or self.random_erasing or self.mixes):
            return batch
        images = batch["image"]
        size, (height, width) = len(images), images.shape[1:3]
        # Of a fixed generator: another default of JAX's would make other batches.
        key = jax.random.fold_in(jax.random.key(self.seed, impl="threefry2x32"), step)
        operation, erased, mixed = jax.random.split(key, 3)
        if self.trivial_augment:
            images = trivial_augment.apply(images, trivial_augment.draw(operation, batch=size))
        if self.random_erasing:
            boxes = erasing.draw(erased, batch=size, probability=self.random_erasing, height=height, width=width)
            images = erasing.apply(images, boxes, fill=self.fill)
        if not self.mixes:
            return batch | {"image": images}
        mix = mixing.draw(mixed, mixup_alpha=self.mixup, cutmix_alpha=self.cutmix, height=height, width=width)
        labels = mixing.labels(batch["label"], mix, num_classes=self.num_classes)
        return batch | {"image": mixing.images(images, mix), "label": labels}

    @property
    def mixes(self) -> bool:
        """Whether labels become distributions."""
        return bool(self.mixup or self.cutmix)


def from_config(data: Any, source: Description, *, seed: int) -> DeviceAugment:
    """As the config's section `data` has it.

    Args:
        data: the section.
        source: the data set.
        seed: of the run.
    """
    return DeviceAugment(
        seed=seed,
        num_classes=source.num_classes,
        # 0 after normalisation, as in torchvision's recipe, to half a grey level.
        fill=tuple(int(level) for level in np.round(255 * np.array(source.mean))),
        trivial_augment=data.trivial_augment,
        random_erasing=data.random_erasing,
        mixup=data.mixup,
        cutmix=data.cutmix,
    )
