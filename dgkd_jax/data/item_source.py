"""A `Source` of a user's arrays or data set, without TensorFlow; each batch is a pure function of (seed, step)."""

import collections
import concurrent.futures
import dataclasses
import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dgkd_jax.data import on_device, order, philox, views
from dgkd_jax.data.items import Arrays, Items, classes, name, split, spread
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput

_MIB = 2**20
_BATCHES_AHEAD = 4
_EPOCH_STRIDE = 2**32  # an example's place in the whole run is epoch · stride + position in the epoch
# First words of the seeds of separate random streams; augmentation has the run's seed itself, which is below 2³¹.
_ORDER, _NOISE, _HOLDOUT = (number << 32 for number in (1, 2, 3))
_MEASURED = 1024  # images whose pixels give the mean and deviation
_AT_ONCE = 256  # images, when the whole set is read
_MOST_KEPT = 256 * _MIB  # bytes of an evaluation split that is kept in a work directory
KEPT_FILE = "evaluation_set.npz"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ItemSource:
    """A `Source` (see `data/source.py`) of two splits.

    Attributes:
        train, evaluate: the splits.
        augment, eval_resize, eval_interpolation, label_noise: keys of the config.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    num_eval: int
    on_device: bool
    train: Arrays | Items
    evaluate: Arrays | Items
    augment: str
    eval_resize: int
    eval_interpolation: str
    label_noise: float
    eval_split: str = "evaluate"

    def steps_per_epoch(self, batch_size: int) -> int:
        return order.steps_per_epoch(self.num_train, batch_size)

    def train_batches(
        self, *, seed: int, batch_size: int, start_step: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        steps = self.steps_per_epoch(batch_size)
        rows = order.rows_of_process(batch_size, process_index, process_count)

        def make(step: int) -> dict[str, np.ndarray]:
            epoch, in_epoch = divmod(step, steps)
            place = in_epoch * batch_size + np.arange(rows.start, rows.stop)
            return self.seen(_shuffled(self.num_train, seed, epoch)[place], seed, self.places(epoch, place))

        def batches():
            with concurrent.futures.ThreadPoolExecutor(1) as host:  # one: the examples of a batch have threads
                coming = collections.deque(host.submit(make, start_step + ahead) for ahead in range(_BATCHES_AHEAD))
                step = start_step + _BATCHES_AHEAD
                try:
                    while True:
                        yield coming.popleft().result()
                        coming.append(host.submit(make, step))
                        step += 1
                finally:
                    host.shutdown(cancel_futures=True)

        return batches()

    def train_set(self) -> dict[str, np.ndarray]:
        images, every = np.empty((self.num_train, *self.image_shape), np.uint8), np.empty(self.num_train, np.int32)
        for first in range(0, self.num_train, _AT_ONCE):
            places = range(first, min(first + _AT_ONCE, self.num_train))
            found, labels = self.train.examples(places)
            images[first : first + len(places)] = [self.central(image) for image in found]
            every[first : first + len(places)] = self._labels(labels, places)
        return {"image": images, "label": every}

    def epoch_rows(
        self, *, seed: int, batch_size: int, epoch: int, process_index: int = 0, process_count: int = 1
    ) -> dict[str, np.ndarray]:
        mine = order.rows_of_process(batch_size, process_index, process_count)
        steps = self.steps_per_epoch(batch_size)
        index = _shuffled(self.num_train, seed, epoch)[: steps * batch_size].reshape(steps, batch_size)
        rows = {"index": index[:, mine.start : mine.stop].astype(np.int32)}
        if self.augment != "none":
            place = np.arange(steps)[:, None] * batch_size + np.arange(mine.start, mine.stop)
            rows["window"] = self._windows(seed, self.places(epoch, place))
        return rows

    def train_ids(self, *, seed: int, batch_size: int, step: int) -> list[str]:
        epoch, in_epoch = divmod(step, self.steps_per_epoch(batch_size))
        chosen = _shuffled(self.num_train, seed, epoch)[in_epoch * batch_size : (in_epoch + 1) * batch_size]
        return [f"{self.train.what}[{place}]" for place in chosen]

    def eval_batches(
        self, *, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        share = len(order.rows_of_process(batch_size, process_index, process_count))
        start, stop = order.piece(self.num_eval, process_index, process_count)

        def batches():
            for number in range(order.eval_batches(self.num_eval, batch_size, process_count)):
                first = start + number * share
                places = range(min(first, stop), min(first + share, stop))
                batch = {
                    "image": np.zeros((share, *self.image_shape), np.uint8),
                    "label": np.zeros(share, np.int32),
                    "mask": np.arange(share) < len(places),
                }
                if places:
                    images, labels = self.evaluate.examples(places)
                    batch["image"][: len(places)] = [self.central(image) for image in images]
                    batch["label"][: len(places)] = self._in_range(labels, self.evaluate.what, places)
                yield batch

        return batches()

    @staticmethod
    def places(epoch: int, position: np.ndarray) -> np.ndarray:
        """Places in the whole run of positions in an epoch."""
        return epoch * _EPOCH_STRIDE + position

    def seen(self, chosen: np.ndarray, seed: int, places: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of the chosen examples, augmented by their places in the run."""
        images, labels = self.train.examples(chosen)
        if self.augment.startswith("random_resized_crop"):
            wanted = views.RANDOM_RESIZED_CROP_UNIFORMS
            size = self.image_shape[0]
            random = _uniforms(seed, places, wanted)
            seen = [views.random_resized_crop(each, u, size=size) for each, u in zip(images, random, strict=True)]
        else:
            seen = [self.central(image) for image in images]
            if self.augment != "none":
                windows = self._windows(seed, places)
                seen = [views.pad_crop(image, window) for image, window in zip(seen, windows, strict=True)]
        return {"image": np.stack(seen), "label": self._labels(labels, chosen)}

    def central(self, image: np.ndarray) -> np.ndarray:
        """An image as evaluation sees it."""
        if image.shape == self.image_shape and not self.eval_resize:
            return image
        if image.shape[-1] != self.image_shape[-1]:
            if image.shape[-1] != 1:
                raise BadInput(f"{self.name}: an image has {image.shape[-1]} channels, others {self.image_shape[-1]}")
            image = np.repeat(image, self.image_shape[-1], axis=-1)
        return views.central_view(
            image, resize=self.eval_resize, shape=self.image_shape, interpolation=self.eval_interpolation
        )

    def _windows(self, seed: int, places: np.ndarray) -> np.ndarray:
        return on_device.windows(
            philox.uniforms(seed, places), size=self.image_shape[0], mirror=self.augment == "pad_crop_flip"
        )

    def _labels(self, labels: np.ndarray, places: Sequence[int]) -> np.ndarray:
        """With the noise that the config asks for: which labels and what instead depends on the example only."""
        labels = self._in_range(labels, self.train.what, places)
        if not self.label_noise:
            return labels
        chance, shift, *_ = np.moveaxis(philox.uniforms(_NOISE, np.asarray(places)), -1, 0)
        other = 1 + (shift * (self.num_classes - 1)).astype(np.int32)
        return np.where(chance < self.label_noise, (labels + other) % self.num_classes, labels).astype(np.int32)

    def _in_range(self, labels: np.ndarray, what: str, places: Sequence[int]) -> np.ndarray:
        wrong = np.flatnonzero(labels >= self.num_classes)
        if wrong.size:
            first = int(wrong[0])
            raise BadInput(
                f"{what}[{places[first]}]: label {labels[first]} is not allowed, there are {self.num_classes} classes, "
                "numbered from 0; if there are more, give data.num_classes"
            )
        return labels


def open_items(train: Any, evaluate: Any, data: Any) -> ItemSource:
    """A source of a user's data.

    Args:
        train: (images, labels), or a data set; see `items.py`.
        evaluate: likewise; None: `data.holdout` of `train` is kept for evaluation.
        data: the config's section `data`.

    Raises:
        BadInput: the data or a key cannot be used.
    """
    train = split(train, what="train")
    if evaluate is None:
        train, evaluate = _held_out(train, data.holdout)
    else:
        evaluate = split(evaluate, what="evaluate")
    if data.train_examples > len(train):
        raise BadInput(f"config.data.train_examples={data.train_examples}: there are {len(train)} training images")
    num_train = data.train_examples or len(train)
    measured, _ = train.examples(spread(len(train), _MEASURED))
    shape = _shape(measured, data)
    mean, std = (
        (tuple(data.mean), tuple(data.std)) if data.mean else _statistics([_channels(i, shape) for i in measured])
    )
    if len(mean) != shape[-1]:
        raise BadInput(f"config.data.mean={mean} is not allowed: one number for each of the {shape[-1]} channels")
    fits = num_train * math.prod(shape) <= data.on_device_mib * _MIB
    source = ItemSource(
        name=name(train, evaluate),
        num_classes=classes(train, given=data.num_classes),
        image_shape=shape,
        mean=mean,
        std=std,
        num_train=num_train,
        num_eval=len(evaluate),
        on_device=fits and not data.augment.startswith("random_resized_crop"),
        train=train,
        evaluate=evaluate,
        augment=data.augment,
        eval_resize=data.eval_resize,
        eval_interpolation=data.eval_interpolation,
        label_noise=data.label_noise,
    )
    if isinstance(train, Arrays):
        source._in_range(train.labels, train.what, range(len(train)))
    if isinstance(evaluate, Arrays):
        source._in_range(evaluate.labels, evaluate.what, range(len(evaluate)))
    return source


def kept_evaluation(source: Source) -> bytes | None:
    """The evaluation split as the networks see it, as a file; None where it is too large to be kept in every run."""
    if source.num_eval * math.prod(source.image_shape) > _MOST_KEPT:
        return None
    images, labels = [], []
    for batch in source.eval_batches(batch_size=min(_AT_ONCE, source.num_eval)):
        images.append(batch["image"][batch["mask"]])
        labels.append(batch["label"][batch["mask"]])
    content = io.BytesIO()
    np.savez_compressed(content, images=np.concatenate(images), labels=np.concatenate(labels))
    return content.getvalue()


def open_kept(content: bytes, data: Any) -> ItemSource:
    """A source whose two splits are the evaluation split that `kept_evaluation` wrote.

    Raises:
        ValueError: the content is another.
    """
    try:
        with np.load(io.BytesIO(content)) as file:
            images, labels = file["images"], file["labels"]
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"no evaluation split: {error}") from error
    with (data := data.copy_and_resolve_references()).unlocked():
        # What was kept is what the networks see.
        data.update(augment="none", image_size=0, eval_resize=0, train_examples=0, num_classes=int(labels.max()) + 1)
    return open_items((images, labels), (images, labels), data)


def _held_out(train: Arrays | Items, share: float) -> tuple[Arrays | Items, Arrays | Items]:
    """Two parts of the training split, by a fixed random choice: without the share, and the share."""
    chosen = _shuffled(len(train), _HOLDOUT, 0)
    count = round(share * len(train))
    if not 0 < count < len(train):
        raise BadInput(
            f"config.data.holdout={share} of {len(train)} training images leaves none for evaluation or training; "
            "give evaluate=, or another share"
        )
    parts = np.sort(chosen[count:]), np.sort(chosen[:count])
    return tuple(_part(train, places, what) for places, what in zip(parts, ("train", "evaluate"), strict=True))


def _part(whole: Arrays | Items, places: np.ndarray, what: str) -> Arrays | Items:
    if isinstance(whole, Arrays):
        return Arrays(what, whole.images[places], whole.labels[places])
    return Items(what, _Chosen(whole.dataset, places), whole.threads)


class _Chosen:
    """Some items of a data set."""

    def __init__(self, dataset: Any, places: np.ndarray):
        self._dataset, self._places = dataset, places
        for attribute in ("classes", "features"):
            if hasattr(dataset, attribute):
                setattr(self, attribute, getattr(dataset, attribute))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> Any:
        return self._dataset[int(self._places[place])]


def _shape(measured: list[np.ndarray], data: Any) -> tuple[int, int, int]:
    """(height, width, channels) of what the networks see."""
    shapes = {image.shape[:2] for image in measured}
    channels = max(image.shape[-1] for image in measured)
    if data.image_size:
        return (data.image_size, data.image_size, channels)
    if len(shapes) > 1:
        small, large = min(shapes), max(shapes)
        raise BadInput(
            f"config.data.image_size=0: the images differ in size, from {small[0]}x{small[1]} to {large[0]}x{large[1]} "
            "pixels: give pixels, such as 224 (and data.eval_resize)"
        )
    ((height, width),) = shapes
    if data.augment != "none" and height != width:
        raise BadInput(
            f"config.data.augment={data.augment!r} is for square images, and these have {height}x{width} pixels; give "
            "data.image_size, or augment='none'"
        )
    return (height, width, channels)


def _channels(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    return image if image.shape[-1] == shape[-1] else np.repeat(image, shape[-1], axis=-1)


def _statistics(images: list[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over all pixels, in units of pixel/255, to four digits."""
    count, total, squares = 0, 0.0, 0.0
    for image in images:
        pixels = image.reshape(-1, image.shape[-1]) / 255
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + (pixels**2).sum(0)
    mean = total / count
    # A channel that never changes would be divided by 0.
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
    return tuple(np.round(mean, 4).tolist()), tuple(np.round(std, 4).tolist())


def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `count` places, a function of (seed, epoch)."""
    random = philox.uniforms(_ORDER + seed, epoch * _EPOCH_STRIDE + np.arange(count)).astype(np.float64)
    # 46 random bits; equal ones stay in order.
    return np.argsort(random[:, 0] + random[:, 1] * 2.0**-23, kind="stable")


def _uniforms(seed: int, places: np.ndarray, count: int) -> np.ndarray:
    """Float32 `[places, count]` in [0, 1)."""
    streams = [philox.uniforms(seed + (number << 36), places) for number in range(4, 4 + -(-count // 4))]
    return np.concatenate(streams, axis=-1)[:, :count]
