"""Fills a cache of logits: runs the teacher over the training batches and stores its logits block by block."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax.data import device_augment
from dgkd_jax.data.source import Source
from dgkd_jax.errors import NumericFailure, Preempted
from dgkd_jax.models.host_network import HostNetwork
from dgkd_jax.models.network import Network
from dgkd_jax.runs import sharding
from dgkd_jax.runs import workdir as workdir_lib
from dgkd_jax.training.cached_logits import source as cached_logits
from dgkd_jax.training.cached_logits import store
from dgkd_jax.training.cached_logits.store import About, Block
from dgkd_jax.training.monitor.progress import ProgressLine

# Batches in flight: their logits are being computed while those of an earlier batch are fetched.
_AHEAD = 2


class Made(NamedTuple):
    """A finished cache: its folder, its number of epochs, its description, and how many blocks this call wrote."""

    folder: epath.Path
    epochs: int
    about: About
    written: int


def fill(
    target: epath.Path,
    about: About,
    config: ConfigDict,
    *,
    epochs: int,
    teacher: Network | HostNetwork,
    source: Source,
    mesh: Mesh,
    stop: Callable[[], bool],
) -> Made:
    """Write the blocks of a cache that are missing or damaged.

    Args:
        target: its folder.
        about: its description.
        config: of the run.
        epochs: to store.
        teacher: whose logits they are.
        source: the data set.
        mesh: all devices.
        stop: as for `loop.fit`.

    Raises:
        BadInput: the folder holds something else.
        NumericFailure: a logit is not finite, or too large for what is stored.
        StorageFailure, Preempted: the same call continues from there.
    """
    store.Writer(target, about, epochs=epochs)  # refuses a wrong folder before a lock file is written
    if jax.process_index() == 0:
        target.mkdir(parents=True, exist_ok=True)
    with workdir_lib.lock(target):
        writer = store.Writer(target, about, epochs=epochs)  # again under the lock: another job may have written blocks
        blocks = _agreed(writer, epochs)
        _fill(writer, blocks, config, epochs=epochs, teacher=teacher, source=source, mesh=mesh, stop=stop)
    return Made(target, epochs, about, len(blocks))


def _agreed(writer: store.Writer, epochs: int) -> list[Block]:
    """The blocks to write. The first process decides, since it does the writing."""
    every = writer.about.blocks(epochs)
    wanted = np.zeros(len(every), bool)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("every process has seen the cache as it was")
    if jax.process_index() == 0:
        found = set(writer.open())
        wanted = np.array([block in found for block in every])
    if jax.process_count() > 1:
        wanted = multihost_utils.broadcast_one_to_all(wanted)
    return [block for block, yes in zip(every, wanted, strict=True) if yes]


def _fill(
    writer: store.Writer,
    blocks: list[Block],
    config: ConfigDict,
    *,
    epochs: int,
    teacher: Network | HostNetwork,
    source: Source,
    mesh: Mesh,
    stop: Callable[[], bool],
) -> None:
    """Run the teacher over the steps of these blocks on all processes; the first process writes."""
    per_epoch = writer.about.steps_per_epoch
    total, left = epochs * per_epoch, sum(block.last - block.first for block in blocks)
    progress = ProgressLine(
        f"{config.teacher.model}'s logits",
        start=total - left,
        total=total,
        steps_per_epoch=per_epoch,
        batch_size=config.batch_size,
    )
    done = total - left
    ask = _question(teacher, device_augment.from_config(config.data, source, seed=config.seed), mesh)
    with progress:
        for run in _runs(blocks, per_epoch):
            first, last = _span(run, per_epoch)
            batches = source.train_batches(
                seed=config.seed,
                batch_size=config.batch_size,
                start_step=first,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            answers = _answers(ask, batches, range(first, last), mesh)
            for block in run:
                rows, stopping = [], False
                while not stopping and len(rows) < block.last - block.first:
                    rows.append(next(answers))
                    step = block.epoch * per_epoch + block.first + len(rows)
                    _check_finite(rows[-1]["logits"], writer.about, config, source, step)
                    done += 1
                    progress.advance(1)
                    stopping = stop()
                if jax.process_index() == 0 and len(rows) == block.last - block.first:
                    writer.write(block, _parts(rows, writer.about))
                if stopping and done < total:
                    raise Preempted(
                        f"stopped after {done} of {total} batches; whole blocks stay, and the same command goes on"
                    )
                progress.metrics(done, "written")
        if left:
            progress.line(total, "all written")


def _runs(blocks: Iterable[Block], per_epoch: int) -> list[list[Block]]:
    """Groups of consecutive blocks; the data set is opened once for each group."""
    runs: list[list[Block]] = []
    for block in blocks:
        if runs and _span(runs[-1], per_epoch)[1] == block.epoch * per_epoch + block.first:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _span(run: list[Block], per_epoch: int) -> tuple[int, int]:
    """First and past-the-last step of a group, counted over all epochs."""
    return run[0].epoch * per_epoch + run[0].first, run[-1].epoch * per_epoch + run[-1].last


def _question(
    teacher: Network | HostNetwork, augment: device_augment.DeviceAugment, mesh: Mesh
) -> Callable[[dict[str, jax.Array], np.int32], dict[str, jax.Array | np.ndarray]]:
    """A function: batch, its step -> the teacher's logits, labels and checksums of all its rows, on every process."""
    if isinstance(teacher, HostNetwork):
        seen = jax.jit(lambda batch, step: augment(batch, step)["image"], out_shardings=sharding.replicated(mesh))

        def ask_host(batch, step):
            logits = teacher.on_host(np.asarray(seen(batch, step)))
            return {"logits": logits, "label": batch["label"], "check": batch["check"]}

        return ask_host

    def ask(teacher, batch, step):
        logits = teacher.logits(augment(batch, step))
        return {"logits": logits, "label": batch["label"], "check": batch["check"]}

    asked = sharding.made_for(mesh, ask)
    return functools.partial(jax.jit(asked, out_shardings=sharding.replicated(mesh)), teacher)


def _answers(
    ask: Callable, batches: Iterator[dict[str, np.ndarray]], numbers: range, mesh: Mesh
) -> Iterator[dict[str, np.ndarray]]:
    ahead = 0 if sharding.calls_must_be_waited_for(mesh) else _AHEAD
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    for step in numbers:
        batch = next(batches)
        there = sharding.to_global(batch | {"check": cached_logits.row_checks(batch)}, mesh)
        queue.append(ask(there, np.int32(step)))
        if len(queue) > ahead:
            yield jax.device_get(queue.popleft())
    yield from map(jax.device_get, queue)


def _check_finite(logits: np.ndarray, about: About, config: ConfigDict, source: Source, step: int) -> None:
    """Raise NumericFailure where a logit does not fit what is stored; `step` counts from 1."""
    largest = np.finfo(np.float16 if about.top_k else about.dtype).max
    bad = np.flatnonzero(~(np.abs(logits) <= largest).all(axis=1))
    if bad.size:
        ids = source.train_ids(seed=config.seed, batch_size=config.batch_size, step=step - 1)
        raise NumericFailure(
            f"the teacher's logits of {bad.size} of {config.batch_size} images of step {step} are not finite, or too "
            f"large for {about.dtype} ({largest:g}): {', '.join(ids[row] for row in bad[:4])}. Train with the live "
            "teacher."
        )


def _parts(rows: list[dict[str, np.ndarray]], about: About) -> dict[str, np.ndarray]:
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return store.encode(stacked["logits"], stacked["label"], stacked["check"], about)
