"""Input of the train step: batches from the host, or row indices into a training set on the device.

Both classes give the arguments that their step function takes after the state and the teacher.
"""

import collections
import concurrent.futures
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax.data import on_device
from dgkd_jax.data.source import Description, Source
from dgkd_jax.runs import sharding
from dgkd_jax.training.build import Program

# Batches sent to the device ahead of the one being computed.
_AHEAD = 2


class Streamed:
    """Feeds one batch from the host per step.

    Attributes:
        program: the step function.
        steps_per_call: the largest `count` that a call can take.
        note: a line for the user, or None.
    """

    steps_per_call = 1

    def __init__(self, program: Program, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, *, note: str | None):
        self.program, self.note = program.train_step, note
        self._batches = ahead(batches, mesh)

    def __enter__(self) -> "Streamed":
        return self

    def __exit__(self, *_) -> None:
        pass

    def arguments(self, step: int, count: int) -> tuple[Any, ...]:
        """Arguments for the `count` steps after `step`. Call it in order, without gaps."""
        del step, count  # always the next batch
        return (next(self._batches),)


class OnDevice:
    """Keeps the whole training set on each device, and sends only the row indices of each epoch.

    The host prepares the next epoch while the device computes.

    Attributes:
        program, steps_per_call, note: as for `Streamed`.
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
        self.program, self.steps_per_call = program.steps_on_device, config.steps_per_call
        mebibytes = sum(array.nbytes for array in examples.values()) / 2**20
        self.note = f"training images in the memory of each device: {mebibytes:.3g} MiB"
        self._steps_per_epoch, self._mesh = program.steps_per_epoch, mesh
        self._last_epoch = program.total_steps // program.steps_per_epoch - 1
        self._examples = sharding.replicate(on_device.as_rows(examples), mesh)
        self._rows_of = functools.partial(
            source.epoch_rows,
            seed=config.seed,
            batch_size=config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        # Put on the device in advance: passing a Python number would copy it from the host in each call.
        self._counts = functools.cache(lambda count: sharding.replicate(np.int32(count), mesh))
        self._host = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._epoch, self._rows, self._next = -1, None, None

    def __enter__(self) -> "OnDevice":
        return self

    def __exit__(self, *_) -> None:
        self._host.shutdown(cancel_futures=True)

    def arguments(self, step: int, count: int) -> tuple[Any, ...]:
        """As `Streamed.arguments`; all `count` steps lie in one epoch."""
        epoch = step // self._steps_per_epoch
        if epoch != self._epoch:
            rows = self._next.result() if self._next else self._rows_of(epoch=epoch)
            self._epoch, self._rows = epoch, sharding.steps_to_global(rows, self._mesh)
            if epoch < self._last_epoch:
                self._next = self._host.submit(self._rows_of, epoch=epoch + 1)
        return self._examples, self._rows, self._counts(count)


def feed(config: ConfigDict, program: Program, *, source: Source, mesh: Mesh, start: int) -> Streamed | OnDevice:
    """The feed for the steps after `start`: from the device's memory where the source allows it, else from the host.

    Args:
        config: validated.
        program: the compiled functions of the run.
        source: the data set.
        mesh: all devices.
        start: steps done.
    """
    examples, note = None, None
    if source.on_device:
        examples = source.train_set()
        note = "an image cannot be decoded, so the host makes each batch"
    if examples is not None:
        return OnDevice(config, program, examples, source=source, mesh=mesh)
    batches = source.train_batches(
        seed=config.seed,
        batch_size=config.batch_size,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return Streamed(program, itertools.islice(batches, program.total_steps - start), mesh, note=note)


def described(
    config: ConfigDict, program: Program, *, source: Description, mesh: Mesh, cached: bool = False
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """The step function that `feed` would call, and its arguments after the state and the teacher, as shapes.

    Args:
        config, program, mesh: as for `feed`.
        source: the data set.
        cached: the batches hold the teacher's logits, from a cache of all classes.
    """
    size, (height, width, channels) = config.batch_size, source.image_shape
    logits = {"teacher_logits": ((source.num_classes,), jnp.float16)} if cached else {}
    images = {"image": ((height, width, channels), jnp.uint8), "label": ((), jnp.int32)}
    if not source.on_device:
        by_row = sharding.batch_sharding(mesh)
        return program.train_step, (_arrays(images | logits, (size,), by_row),)
    images["image"] = ((height * width * channels,), jnp.uint8)  # `on_device.as_rows`
    window = {} if config.data.augment == "none" else {"window": ((3,), jnp.int32)}
    rows = {"index": ((), jnp.int32)} | window | logits
    whole = sharding.replicated(mesh)
    return program.steps_on_device, (
        _arrays(images, (source.num_train,), whole),
        _arrays(rows, (program.steps_per_epoch, size), sharding.steps_sharding(mesh)),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )


def _arrays(
    named: dict[str, tuple[tuple[int, ...], Any]], leading: tuple[int, ...], sharding: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct((*leading, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in named.items()
    }


def ahead(batches: Iterable[dict[str, np.ndarray]], mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Batches as global arrays on the mesh; the next ones are already being sent."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in batches:
        queue.append(sharding.to_global(batch, mesh))
        if len(queue) > _AHEAD:
            yield queue.popleft()
    yield from queue
