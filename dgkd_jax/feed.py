"""What a call of the compiled steps is fed with: a batch from the host, or rows of a set that lies on the device.

Both give the arguments of their program that stand after the state and the teacher's variables.
"""

import collections
import concurrent.futures
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax import sharding
from dgkd_jax.data import Source
from dgkd_jax.program import Program

# Batches on their way to the device while one is computed.
_AHEAD = 2


class Streamed:
    """A batch from the host for each step.

    Attributes:
        program: the compiled steps' function.
        steps_per_call: the largest `count`.
        note: for the user, or None.
    """

    steps_per_call = 1

    def __init__(self, program: Program, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, *, note: str | None):
        self.program, self.note = program.train_step, note
        self._batches = on_device(batches, mesh)

    def __enter__(self) -> "Streamed":
        return self

    def __exit__(self, *_) -> None:
        pass

    def arguments(self, step: int, count: int) -> tuple[Any, ...]:
        """For the `count` steps after `step`; asked for in order, without a gap."""
        del step, count  # the next one
        return (next(self._batches),)


class Resident:
    """The whole set lies on each device; what the rows of its batches are follows once in an epoch.

    The host works on the next epoch while the device computes.

    Attributes:
        program, steps_per_call, note: as `Streamed`.
    """

    def __init__(
        self,
        config: ConfigDict,
        program: Program,
        examples: dict[str, np.ndarray],
        *,
        source: Source,
        mesh: Mesh,
    ):
        self.program, self.steps_per_call = program.resident_steps, config.steps_per_call
        mebibytes = sum(array.nbytes for array in examples.values()) / 2**20
        self.note = f"training images in the memory of each device: {mebibytes:.3g} MiB"
        self._steps_per_epoch, self._mesh = program.steps_per_epoch, mesh
        self._last_epoch = program.total_steps // program.steps_per_epoch - 1
        self._examples = sharding.replicate(examples, mesh)
        self._rows_of = functools.partial(
            source.epoch_rows,
            seed=config.seed,
            batch_size=config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        # Made beforehand: a number that is handed over with a call would be a copy from the host.
        self._counts = functools.cache(lambda count: sharding.replicate(np.int32(count), mesh))
        self._host = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._epoch, self._rows, self._next = -1, None, None

    def __enter__(self) -> "Resident":
        return self

    def __exit__(self, *_) -> None:
        self._host.shutdown(cancel_futures=True)

    def arguments(self, step: int, count: int) -> tuple[Any, ...]:
        """As `Streamed.arguments`; all `count` steps are of one epoch."""
        epoch = step // self._steps_per_epoch
        if epoch != self._epoch:
            rows = self._next.result() if self._next else self._rows_of(epoch=epoch)
            self._epoch, self._rows = epoch, sharding.steps_to_global(rows, self._mesh)
            if epoch < self._last_epoch:
                self._next = self._host.submit(self._rows_of, epoch=epoch + 1)
        return self._examples, self._rows, self._counts(count)


def of(config: ConfigDict, program: Program, *, source: Source, mesh: Mesh, start: int) -> Streamed | Resident:
    """What the steps after `start` are fed with: from the device's memory where the source allows it.

    Args:
        config: validated.
        program: of the run.
        source: the data set.
        mesh: all devices.
        start: steps done.
    """
    examples, note = None, None
    if source.on_device:
        examples = source.train_set()
        note = "an image cannot be decoded, so the host makes each batch"
    if examples is not None:
        return Resident(config, program, examples, source=source, mesh=mesh)
    batches = source.train_batches(
        seed=config.seed,
        batch_size=config.batch_size,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return Streamed(program, itertools.islice(batches, program.total_steps - start), mesh, note=note)


def on_device(batches: Iterable[dict[str, np.ndarray]], mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Batches as global arrays, the next ones already on their way."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        queue.append(sharding.to_global(batch, mesh))
        if len(queue) > _AHEAD:
            yield queue.popleft()
    yield from queue
