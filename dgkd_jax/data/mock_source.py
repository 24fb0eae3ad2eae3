"""Generated images with a data set's shapes, to try a run without the data set."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from dgkd_jax.data import order

_TRAIN, _EVAL, _PATTERN = range(3)  # first words of the seeds: separate random streams
_CELLS = 4  # a class is a pattern of 4x4 cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class MockSource:
    """A `Source` (see `data/source.py`) of noise added to a pattern per class, so that a model can learn them."""

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    num_eval: int
    eval_split: str
    on_device: ClassVar[bool] = False  # images are generated for each batch

    def steps_per_epoch(self, batch_size: int) -> int:
        return order.steps_per_epoch(self.num_train, batch_size)

    def train_batches(
        self, *, seed: int, batch_size: int, start_step: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        self.steps_per_epoch(batch_size)
        rows = order.rows_of_process(batch_size, process_index, process_count)

        def batches():
            step = start_step
            while True:
                yield self._examples([(_TRAIN, seed, step, row) for row in rows])
                step += 1

        return batches()

    def train_ids(self, *, seed: int, batch_size: int, step: int) -> list[str]:
        return [f"generated {step}/{row}" for row in range(batch_size)]

    def eval_batches(
        self, *, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        share = len(order.rows_of_process(batch_size, process_index, process_count))
        start, stop = order.piece(self.num_eval, process_index, process_count)
        count = order.eval_batches(self.num_eval, batch_size, process_count)

        def batches():
            for first in range(start, start + count * share, share):
                mask = np.arange(first, first + share) < stop
                yield {
                    **self._examples([(_EVAL, index) for index in range(first, first + share)]),
                    "mask": mask,
                }

        return batches()

    def _examples(self, seeds: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
        height, width, channels = self.image_shape
        shape = (self.num_classes, _CELLS, _CELLS, channels)
        patterns = np.random.default_rng(_PATTERN).integers(0, 128, shape, np.uint8)
        cell_rows, cell_columns = np.arange(height) * _CELLS // height, np.arange(width) * _CELLS // width
        images = np.empty((len(seeds), *self.image_shape), np.uint8)
        labels = np.empty(len(seeds), np.int32)
        for i, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            labels[i] = rng.integers(self.num_classes)
            pattern = patterns[labels[i]][cell_rows[:, None], cell_columns[None, :]]
            images[i] = pattern + rng.integers(0, 128, self.image_shape, np.uint8)
        return {"image": images, "label": labels}
