"""Reads TFDS data sets as batches of uint8 images; each batch is a pure function of (seed, step).

One tf.data graph covers all epochs. An epoch's seeds are tensors inside it, so a new epoch needs no new graph; starting
at any step means starting in its epoch and skipping records before anything is decoded. Random numbers are stateless:
from (seed, epoch, reader) for the order, and from (seed, epoch, position) for augmentation, where position = step in
the epoch · batch size + row of the global batch. `order.py` says which reader supplies which row.

`shuffle_buffer` selects one of two ways to read; positions, decoding and augmentation are the same for both. With 0 a
reader shuffles its whole piece: the encoded records stay in memory and an epoch is a permutation of indices. With
another number the records are streamed from disk through a buffer of that size, for sets larger than memory. The buffer
is filled anew in each epoch, which delays training by about 10 µs per record; and continuing within an epoch reads the
records that it skips.
"""

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from dgkd_jax.data import augment, on_device, order, philox
from dgkd_jax.errors import BadInput

# Records in flight. On images of a few hundred bytes AUTOTUNE takes twice as long as a fixed large number, on large
# images equally long; there are as many worker threads as cores.
_PARALLEL = max(64, os.cpu_count() or 1)
_BATCHES_AHEAD = 4
_DECODED_AT_ONCE = 256  # images per batch when the whole set is decoded
_EPOCH_STRIDE = 2**32  # an example's place in the whole run is epoch · stride + position in the epoch


def one_thread_per_operation() -> None:
    """Stop TensorFlow from splitting single operations over threads, in the whole process.

    An image's operations are too small for that, and images are processed in parallel anyway: on two cores, ImageNet's
    crops need 0.7 times the processor time (docs/performance.md). No effect if TensorFlow has already started.
    """
    with contextlib.suppress(RuntimeError):  # raised if it has already started
        tf.config.threading.set_intra_op_parallelism_threads(1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TfdsSource:
    """A `Source` (see `data/source.py`) of a prepared TFDS data set.

    Attributes:
        builder: of a prepared set with the features "image" and "label".
        augment: a value of `config.data.augment`.
        eval_resize: shorter side before the central crop, pixels; 0: not resized.
        eval_interpolation: for that resizing: "bilinear" or "bicubic".
        shuffle_buffer: in records; 0: all records stay in memory and are shuffled completely.
        readers: number of pieces in which the training split is read.
        max_bad_images: undecodable training images that are tolerated.
        label_noise: share of the training labels that are replaced; which and by what depends on the example only.
        on_device: whether `train_set` and `epoch_rows` may be called.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    num_eval: int
    eval_split: str
    builder: Any
    augment: str
    eval_resize: int
    eval_interpolation: str
    shuffle_buffer: int
    readers: int
    max_bad_images: int = 0
    label_noise: float = 0.0
    on_device: bool = False
    _bad: set[str] = dataclasses.field(default_factory=set, repr=False)  # ids of undecodable images found so far
    _held: dict = dataclasses.field(default_factory=dict, repr=False)  # records in memory, by (split, start, stop)

    def steps_per_epoch(self, batch_size: int) -> int:
        return order.steps_per_epoch(self.num_train, batch_size)

    def train_batches(
        self, *, seed: int, batch_size: int, start_step: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        rows = order.rows_of_process(batch_size, process_index, process_count)
        readers = order.readers_of_process(self.readers, batch_size, process_index, process_count)

        def examples_from(step: int) -> tuple[tf.data.Dataset, Callable, Callable]:
            """Dataset of (place, element) of this process's rows from `step` on; `load`: these -> example; `lookup`."""
            examples, lookup = self._epochs(seed=seed, batch_size=batch_size, start_step=step, readers=readers)
            if self.readers == 1 and process_count > 1:
                examples = examples.filter(
                    lambda place, _: (
                        (place % _EPOCH_STRIDE % batch_size >= rows.start)
                        & (place % _EPOCH_STRIDE % batch_size < rows.stop)
                    )
                )

            def load(place, element):
                record = lookup(element)
                image = self._train_image(record["image"], tf.stack([_int64(seed), place]))
                return self._example(self._with_label_noise(record), image)

            return examples, load, lookup

        def batches():
            # At exit, `tf` may be gone before an unfinished generator is closed.
            undecodable = tf.errors.InvalidArgumentError
            step = start_step
            while True:
                examples, load, _ = examples_from(step)
                try:
                    for batch in _batched(examples, load, len(rows)):
                        yield batch
                        step += 1
                except undecodable as error:
                    examples, load, lookup = examples_from(step)
                    yield self._without_bad_images(examples.take(len(rows)), load, lookup, error)
                    step += 1

        self.steps_per_epoch(batch_size)
        return self._explaining(batches())

    def train_ids(self, *, seed: int, batch_size: int, step: int) -> list[str]:
        examples, lookup = self._epochs(seed=seed, batch_size=batch_size, start_step=step, readers=range(self.readers))
        return [lookup(element)["tfds_id"].numpy().decode() for _, element in examples.take(batch_size)]

    def train_set(self) -> dict[str, np.ndarray] | None:
        elements, lookup = self._in_order("train", 0, self.num_train)

        def load(element):
            record = lookup(element)
            return self._example(self._with_label_noise(record), self._eval_image(record["image"]))

        images = np.empty((self.num_train, *self.image_shape), np.uint8)
        labels = np.empty(self.num_train, np.int32)
        done = 0
        try:
            for batch in _batched(elements, load, _DECODED_AT_ONCE):
                rows = slice(done, done := done + len(batch["label"]))
                images[rows], labels[rows] = batch["image"], batch["label"]
        except tf.errors.InvalidArgumentError:
            return None  # `train_batches` names the image, or replaces it
        return {"image": images, "label": labels}

    def epoch_rows(
        self, *, seed: int, batch_size: int, epoch: int, process_index: int = 0, process_count: int = 1
    ) -> dict[str, np.ndarray]:
        order.readers_of_process(self.readers, batch_size, process_index, process_count)
        mine = order.rows_of_process(batch_size, process_index, process_count)
        steps, share = self.steps_per_epoch(batch_size), batch_size // self.readers
        index = np.empty((steps, self.readers, share), np.int32)
        for reader in range(self.readers):
            start, stop = order.piece(self.num_train, reader, self.readers)
            shuffled = _shuffled(stop - start, _order_key(seed, epoch, reader)).numpy()
            index[:, reader] = start + shuffled[: steps * share].reshape(steps, share)
        rows = {"index": index.reshape(steps, batch_size)[:, mine.start : mine.stop]}
        if self.augment != "none":
            places = epoch * _EPOCH_STRIDE + np.arange(steps)[:, None] * batch_size + np.arange(mine.start, mine.stop)
            uniforms = philox.uniforms(seed, places)
            rows["window"] = on_device.windows(
                uniforms, size=self.image_shape[0], mirror=self.augment == "pad_crop_flip"
            )
        return rows

    def _without_bad_images(
        self, examples: tf.data.Dataset, load: Callable, lookup: Callable, error: Exception
    ) -> dict[str, np.ndarray]:
        """The rows of one batch, with each undecodable image replaced by the next decodable one of the batch.

        So a batch is still a function of seed and step.

        Raises:
            BadInput: more undecodable images than allowed, or no decodable one.
        """
        rows = []
        for place, element in examples:
            try:
                rows.append({key: value.numpy() for key, value in load(place, element).items()})
            except tf.errors.InvalidArgumentError as bad:
                record = lookup(element)
                if not self._is_damaged(record):
                    raise  # another error, such as an image that is too small
                rows.append(None)
                name = record["tfds_id"].numpy().decode()
                if name not in self._bad:
                    self._bad.add(name)
                    logging.error("image %s of %s cannot be decoded: %s", name, self.name, _reason(bad))
        good = [index for index, row in enumerate(rows) if row]
        if len(self._bad) > self.max_bad_images or not good:
            raise BadInput(
                f"{self.name} in {self.builder.data_dir}: {len(self._bad)} training image(s) cannot be decoded, where "
                f"config.data.max_bad_images={self.max_bad_images}: {', '.join(sorted(self._bad)[:8])}. "
                "Mend the files, or allow more to be replaced by their neighbours."
            ) from error
        whole = [rows[next((g for g in good if g >= index), good[0])] for index in range(len(rows))]
        return {key: np.stack([row[key] for row in whole]) for key in whole[0]}

    def eval_batches(
        self, *, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        share = len(order.rows_of_process(batch_size, process_index, process_count))
        start, stop = order.piece(self.num_eval, process_index, process_count)
        count = order.eval_batches(self.num_eval, batch_size, process_count)
        if start == stop:
            batches = iter(())
        else:
            elements, lookup = self._in_order(self.eval_split, start, stop)

            def load(element):
                record = lookup(element)
                return self._example(record, self._eval_image(record["image"]))

            batches = self._explaining(_batched(elements, load, share))
        return self._padded(batches, share, count)

    def _epochs(
        self, *, seed: int, batch_size: int, start_step: int, readers: range
    ) -> tuple[tf.data.Dataset, Callable]:
        """Dataset of (place, element) of these readers' examples from `start_step` on; `lookup`: element -> record."""
        pieces = {reader: order.piece(self.num_train, reader, self.readers) for reader in readers}
        first, last = pieces[readers[0]][0], pieces[readers[-1]][1]
        held = None if self.shuffle_buffer else self._load("train", first, last)
        rows, steps = batch_size // self.readers, self.steps_per_epoch(batch_size)
        start_epoch, start_in_epoch = divmod(start_step, steps)

        def elements_of(reader, epoch):
            start, stop = pieces[reader]
            key = _order_key(seed, epoch, reader)
            if held is not None:
                return tf.data.Dataset.from_tensor_slices(start - first + _shuffled(stop - start, key))
            file_seed, record_seed = tf.unstack(tf.random.stateless_uniform([2], key, 0, 2**62, tf.int64))
            files_at_once = max(4, 16 // self.readers)  # TFDS's default, 16, per reader would be too many
            records = self._read("train", start, stop, shuffle_seed=file_seed, files_at_once=files_at_once)
            return records.shuffle(self.shuffle_buffer, seed=record_seed, reshuffle_each_iteration=False)

        # Otherwise autograph would rewrite TFDS's own code too.
        @tf.autograph.experimental.do_not_convert
        def one_epoch(epoch):
            done = tf.where(epoch == start_epoch, _int64(start_in_epoch), _int64(0))
            streams = []
            for reader in readers:
                step, row = tf.range(steps, dtype=tf.int64)[:, None], tf.range(rows, dtype=tf.int64)
                places = epoch * _EPOCH_STRIDE + step * batch_size + reader * rows + row
                places = tf.data.Dataset.from_tensor_slices(tf.reshape(places, [-1]))  # as many as an epoch uses
                streams.append(tf.data.Dataset.zip(places, elements_of(reader, epoch)).skip(done * rows))
            if len(streams) == 1:
                return streams[0]
            turns = tf.tile(tf.repeat(tf.range(len(streams), dtype=tf.int64), rows), [_int64(steps) - done])
            return tf.data.Dataset.choose_from_datasets(streams, tf.data.Dataset.from_tensor_slices(turns))

        epochs = tf.data.Dataset.range(start_epoch, 2**31)
        return epochs.flat_map(one_epoch), _lookup_in(held)

    def _in_order(self, split: str, start: int, stop: int) -> tuple[tf.data.Dataset, Callable]:
        """Dataset of every element of a piece of a split, in order; `lookup`: element -> record."""
        if self.shuffle_buffer:
            return self._read(split, start, stop), _lookup_in(None)
        return tf.data.Dataset.range(stop - start), _lookup_in(self._load(split, start, stop))

    def _read(
        self,
        split: str,
        start: int,
        stop: int,
        *,
        shuffle_seed: tf.Tensor | None = None,
        files_at_once: int = 16,
    ) -> tf.data.Dataset:
        """Records of a piece of a split, streamed from disk; images are still encoded."""
        options = tfds.ReadConfig(
            shuffle_seed=shuffle_seed,
            shuffle_reshuffle_each_iteration=False,
            interleave_cycle_length=files_at_once,
            num_parallel_calls_for_interleave_files=files_at_once,
            num_parallel_calls_for_decode=_PARALLEL,
            try_autocache=False,
            skip_prefetch=True,
            add_tfds_id=True,
        )
        return self.builder.as_dataset(
            split=f"{split}[{start}:{stop}]",
            shuffle_files=shuffle_seed is not None,
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=options,
        )

    def _load(self, split: str, start: int, stop: int) -> dict[str, tf.Tensor]:
        """Records of a piece of a split as tensors, kept for later calls.

        Files are read one after the other, so the order does not depend on how the split is cut.
        """
        key = (split, start, stop)
        if key not in self._held:
            dataset = self._read(split, start, stop, files_at_once=1).batch(stop - start)
            with self._reading():
                records = dataset.get_single_element()
            self._held[key] = {name: records[name] for name in ("image", "label", "tfds_id")}
        return self._held[key]

    def _train_image(self, encoded: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
        size, _, channels = self.image_shape
        if self.augment.startswith("random_resized_crop"):
            uniforms = tf.random.stateless_uniform([augment.RANDOM_RESIZED_CROP_UNIFORMS], key)
            fast = self.augment == "random_resized_crop_fast"
            return augment.random_resized_crop(encoded, uniforms, size=size, channels=channels, fast=fast)
        image = self._eval_image(encoded)
        if self.augment == "none":
            return image
        uniforms = tf.random.stateless_uniform([augment.PAD_CROP_UNIFORMS], key)
        return augment.pad_crop(image, uniforms, size=size, mirror=self.augment == "pad_crop_flip")

    def _eval_image(self, encoded: tf.Tensor) -> tf.Tensor:
        size, _, channels = self.image_shape
        return augment.central_view(
            encoded, resize=self.eval_resize, size=size, channels=channels, interpolation=self.eval_interpolation
        )

    def _with_label_noise(self, record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        if not self.label_noise:
            return record
        # The hash keys are fixed, so the label noise is the same in every run.
        key = tf.strings.to_hash_bucket_strong(record["tfds_id"], 2**31, key=[0, 1])
        chance = tf.random.stateless_uniform([], tf.stack([key, _int64(0)]))
        shift = tf.random.stateless_uniform([], tf.stack([key, _int64(1)]), 1, self.num_classes, tf.int32)
        label = tf.cast(record["label"], tf.int32)
        noisy = tf.where(chance < self.label_noise, (label + shift) % self.num_classes, label)
        return record | {"label": noisy}

    def _example(self, record: dict[str, tf.Tensor], image: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            "image": tf.ensure_shape(image, self.image_shape),
            "label": tf.cast(record["label"], tf.int32),
        }

    def _explaining(self, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
        while True:
            with self._reading():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Translate TensorFlow's errors about damaged files and unusable images into `BadInput`."""
        try:
            yield
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError, tf.errors.NotFoundError) as error:
            why = self._first_damage() or _reason(error)
            raise BadInput(f"{self.name} in {self.builder.data_dir} cannot be read: {why}") from error

    def _is_damaged(self, record: dict[str, tf.Tensor]) -> bool:
        try:
            augment.decode(record["image"], channels=self.image_shape[-1])
        except tf.errors.InvalidArgumentError:
            return True
        return False

    def _first_damage(self) -> str | None:
        """Read all files and images in order; the first unreadable one, or None."""
        for split in ("train", self.eval_split):
            for file in self.builder.info.splits[split].filepaths:
                try:
                    for _ in tf.data.TFRecordDataset(os.fspath(file)):
                        pass
                except (tf.errors.DataLossError, tf.errors.NotFoundError) as error:
                    return f"{file}: {_reason(error)}"
            for record in self._read(split, 0, self.builder.info.splits[split].num_examples, files_at_once=1):
                if self._is_damaged(record):
                    return f"image {record['tfds_id'].numpy().decode()} cannot be decoded"
        return None

    def _padded(self, batches: Iterator, share: int, count: int) -> Iterator[dict[str, np.ndarray]]:
        """Exactly `count` batches of `share` examples, with a mask that is False on padding rows."""
        nothing = {"image": np.zeros((0, *self.image_shape), np.uint8), "label": np.zeros(0, np.int32)}
        for _ in range(count):
            batch = next(batches, nothing)
            real = len(batch["label"])
            padded = {
                key: np.pad(value, [(0, share - real)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()
            }
            yield {**padded, "mask": np.arange(share) < real}


def _reason(error: tf.errors.OpError) -> str:
    """An error's message, without the names of TensorFlow's graph."""
    return re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message.strip().splitlines()[0]).strip()


def _int64(value: int) -> tf.Tensor:
    return tf.constant(value, tf.int64)


def _order_key(seed: int, epoch: tf.Tensor | int, reader: int) -> tf.Tensor:
    """Seed for the order of a reader's piece in an epoch."""
    # Augmentation's seeds begin with `seed`, which is not negative; these begin with a negative number.
    return tf.stack([_int64(-1 - seed), tf.cast(epoch * _EPOCH_STRIDE + reader, tf.int64)])


def _shuffled(count: int, key: tf.Tensor) -> tf.Tensor:
    return tf.random.experimental.stateless_shuffle(tf.range(count), key)


def _lookup_in(records: dict[str, tf.Tensor] | None) -> Callable:
    if records is None:
        return lambda record: record
    return lambda index: {key: values[index] for key, values in records.items()}


def _batched(elements: tf.data.Dataset, load: Callable, size: int) -> Iterator[dict[str, np.ndarray]]:
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False  # all parallelism is set explicitly here
    batches = elements.map(load, num_parallel_calls=_PARALLEL).batch(size)
    return batches.prefetch(_BATCHES_AHEAD).with_options(options).as_numpy_iterator()
