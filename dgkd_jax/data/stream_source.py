"""A `Source` of a user's `tf.data.Dataset`s: elements come in the data set's own order, once each per epoch.

Continuing skips the elements that were used, so it reads them again. A data set that shuffles must do so in the same
order in every run, with a seed, or a run that is interrupted does not end as it would have.
"""

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from dgkd_jax import own_code
from dgkd_jax.data import order
from dgkd_jax.data.item_source import ItemSource, open_items
from dgkd_jax.data.items import Arrays, example
from dgkd_jax.errors import BadInput

_LOOKED_AT = 1024  # elements that the number of classes and the pixels' statistics are taken from


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Elements:
    """The elements of a `tf.data.Dataset`, unbatched, of the split `what`."""

    what: str
    dataset: Any
    number: int

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        for place, element in enumerate(self.dataset.as_numpy_iterator()):
            yield example(element, where=f"{self.what}[{place}]")

    def first(self, count: int) -> Arrays:
        images, labels = zip(*itertools.islice(self, count), strict=True)
        if len({image.shape for image in images}) > 1:
            raise BadInput(f"{self.what}: the images differ in size; resize them in the data set")
        return Arrays(self.what, np.stack(images), np.array(labels, np.int32))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StreamSource:
    """A `Source` (see `data/source.py`); `views` makes the images of a batch as it does for items."""

    name: str
    num_train: int
    num_eval: int
    views: ItemSource
    train: _Elements
    evaluate: _Elements
    on_device: bool = False
    eval_split: str = "evaluate"

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.views, attribute)

    def steps_per_epoch(self, batch_size: int) -> int:
        return order.steps_per_epoch(self.num_train, batch_size)

    def train_batches(
        self, *, seed: int, batch_size: int, start_step: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        steps = self.steps_per_epoch(batch_size)
        rows = order.rows_of_process(batch_size, process_index, process_count)

        def batches():
            first, skipped = divmod(start_step, steps)
            if skipped:
                print(f"reading {skipped * batch_size:,} images of {self.name} again to go on", file=sys.stderr)
            for epoch in itertools.count(first):
                elements = itertools.islice(self.train, (skipped if epoch == first else 0) * batch_size, None)
                for step in range(skipped if epoch == first else 0, steps):
                    taken = list(itertools.islice(elements, batch_size))
                    if len(taken) < batch_size:
                        raise BadInput(
                            f"train gave {step * batch_size + len(taken)} elements instead of {self.num_train}"
                        )
                    images, labels = zip(*taken[rows.start : rows.stop], strict=True)
                    mine = Arrays(self.train.what, np.stack(images), np.array(labels, np.int32))
                    places = self.views.places(epoch, step * batch_size + np.arange(rows.start, rows.stop))
                    yield dataclasses.replace(self.views, train=mine).seen(np.arange(len(mine)), seed, places)

        return batches()

    def train_ids(self, *, seed: int, batch_size: int, step: int) -> list[str]:
        first = step % self.steps_per_epoch(batch_size) * batch_size
        return [f"{self.train.what}[{place}]" for place in range(first, first + batch_size)]

    def eval_batches(
        self, *, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        start, stop = order.piece(self.num_eval, process_index, process_count)
        share = len(order.rows_of_process(batch_size, process_index, process_count))
        count = order.eval_batches(self.num_eval, batch_size, process_count)

        def batches():
            elements = itertools.islice(self.evaluate, start, stop)
            for _ in range(count):
                taken = list(itertools.islice(elements, share))
                batch = {
                    "image": np.zeros((share, *self.views.image_shape), np.uint8),
                    "label": np.zeros(share, np.int32),
                    "mask": np.arange(share) < len(taken),
                }
                for row, (image, label) in enumerate(taken):
                    batch["image"][row], batch["label"][row] = self.views.central(image), label
                yield batch

        return batches()


def open_streams(train: Any, evaluate: Any, data: Any) -> StreamSource:
    """A source of two `tf.data.Dataset`s of (image, label) or of dictionaries, batched or not.

    Args:
        train, evaluate: the data sets.
        data: the config's section `data`.

    Raises:
        BadInput: they cannot be used.
    """
    if data.label_noise or data.train_examples:
        raise BadInput("config.data.label_noise and train_examples are not for a tf.data.Dataset: change it yourself")
    if evaluate is None:
        raise BadInput("a tf.data.Dataset cannot be split: give evaluate=, a data set of its own")
    splits = [_elements(given, what=what) for given, what in ((train, "train"), (evaluate, "evaluate"))]
    looked_at = [each.first(_LOOKED_AT) for each in splits]
    views = open_items(*looked_at, data)
    content = hashlib.sha256(views.name.encode()).digest()
    return StreamSource(
        name=own_code.name_of_given("stream", f"{splits[0].number} {splits[1].number}", content),
        num_train=splits[0].number,
        num_eval=splits[1].number,
        views=views,
        train=splits[0],
        evaluate=splits[1],
    )


def _elements(dataset: Any, *, what: str) -> _Elements:
    if not hasattr(dataset, "element_spec"):
        raise BadInput(f"{what} is of type {type(dataset).__name__}, and the other split is a tf.data.Dataset")
    spec = dataset.element_spec
    image = next(iter(spec.values())) if hasattr(spec, "values") else spec[0]
    if image.shape.rank == 4:
        dataset = dataset.unbatch()
    number = int(dataset.cardinality().numpy())
    if number == -1:
        raise BadInput(f"{what} never ends: leave repeat() out of it")
    if number < 0:  # not known
        print(f"counting the elements of {what}", file=sys.stderr, flush=True)
        number = sum(1 for _ in dataset)
    if number == 0:
        raise BadInput(f"{what} holds no example")
    return _Elements(what=what, dataset=dataset, number=number)
