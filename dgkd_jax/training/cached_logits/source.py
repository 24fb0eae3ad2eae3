"""Reads a cache of the teacher's logits, and adds the logits to the training batches.

A batch, augmentation included, is a pure function of (seed, step), so a fixed teacher gives the same logits for it in
every run. `python -m dgkd_jax.cache_teacher` stores them (`store`); `WithTeacher` adds them to the batches.
"""

import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dgkd_jax.data import on_device, order
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import METHODS, Method, sections_of
from dgkd_jax.methods.key import keys_of
from dgkd_jax.runs import config as config_rules
from dgkd_jax.training.cached_logits import store
from dgkd_jax.training.cached_logits.store import About, Block

_MAKE = (
    "Make one with python -m dgkd_jax.cache_teacher and this run's --config and overrides, or leave teacher.cache out"
)
_MEND = "The command that made it, given again, makes anew what is damaged: python -m dgkd_jax.cache_teacher"


def about(
    config: ConfigDict,
    *,
    teacher: str,
    source: Source,
    top_k: int = 0,
    temperature: float | None = None,
    dtype: str = "float16",
) -> About:
    """The description of the cache that a run with this config, data set and teacher needs."""
    return About(
        teacher=teacher,
        batches=config_rules.identity_of_batches(config),
        batch_size=config.batch_size,
        steps_per_epoch=source.steps_per_epoch(config.batch_size),
        num_classes=source.num_classes,
        top_k=top_k,
        temperature=temperature,
        dtype=dtype,
    )


def row_checks(batch: dict[str, np.ndarray], rows: list[int] | None = None) -> np.ndarray:
    """Uint32 `[rows]`: a CRC-32 of each row's pixels and label, to notice when the data have changed."""
    rows = range(len(batch["label"])) if rows is None else rows
    return np.array(
        [zlib.crc32(np.ascontiguousarray(batch["image"][row]), int(batch["label"][row])) for row in rows], np.uint32
    )


def missing(folder: epath.Path) -> str | None:
    """What to do if there is no cache in `folder`; None if there is one."""
    if (folder / store.MANIFEST).exists():
        return None
    return f"config.teacher.cache={folder}: no cache of a teacher's logits there. {_MAKE}"


class Cache:
    """A cache opened for reading, after a check that it fits the run.

    Args:
        folder: `config.teacher.cache`.
        config: of the run.
        teacher: fingerprint of the run's teacher.
        source: the run's data set.

    Raises:
        BadInput: no cache, an unfinished one, or one of another teacher, other batches or fewer epochs.
    """

    def __init__(self, folder: epath.Path, config: ConfigDict, *, teacher: str, source: Source):
        self.folder = folder
        if problem := missing(folder):
            raise BadInput(problem)
        manifest = store.read_manifest(folder)
        wanted = about(
            config,
            teacher=teacher,
            source=source,
            **{name: manifest[name] for name in ("top_k", "temperature", "dtype")},
        )
        if other := store.differences(manifest, wanted):
            raise BadInput(f"config.teacher.cache={folder} does not fit this run: {other}. {_MAKE}")
        left = [block for block in wanted.blocks(config.epochs) if block.key not in manifest["blocks"]]
        if left:
            raise BadInput(
                f"config.teacher.cache={folder} holds less than config.epochs={config.epochs}: the first step that is "
                f"not there is {left[0].first + 1} of epoch {left[0].epoch + 1}. "
                f"The command that makes it goes on from there: python -m dgkd_jax.cache_teacher --output={folder} "
                f"--epochs={config.epochs}, with its other arguments."
            )
        self.about, self.epochs = wanted, config.epochs
        self._digests: dict[str, str] = manifest["blocks"]
        try:
            self._stores = store.open_arrays(folder, wanted)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise BadInput(f"config.teacher.cache={folder} is damaged: {why}. {_MEND}") from error

    def check_method(self, method: Method) -> None:
        """Refuse a method for which the stored logits would be wrong.

        Raises:
            BadInput: the cache holds only the top K classes, and the method needs all of them or another temperature.
        """
        if not self.about.top_k or not method.needs_teacher:
            return
        if method.teacher_temperature is None:
            raise BadInput(
                f"config.method={method.name} needs every logit, and config.teacher.cache={self.folder} holds the top "
                f"{self.about.top_k} of {self.about.num_classes}: make a cache without --top-k."
            )
        if method.teacher_temperature != self.about.temperature:
            section = next(name for name in sections_of(type(method)) if "temperature" in keys_of(METHODS[name]))
            raise BadInput(
                f"config.{section}.temperature={method.teacher_temperature:g}, and "
                f"config.teacher.cache={self.folder} holds what is right at {self.about.temperature:g} only: make a "
                "cache at this temperature, or one without --top-k, which serves every temperature."
            )

    def batches(self, start_step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each step from `start_step` to the last one stored: logits float16 `[B, C]`, checks uint32 `[B]`.

        The next block is read in the background.

        Raises:
            BadInput: while iterating: a block is damaged.
        """
        epoch, step = divmod(start_step, self.about.steps_per_epoch)
        blocks = [block for block in self.about.blocks(self.epochs) if (block.epoch, block.last) > (epoch, step)]
        coming = self._request(blocks[0]) if blocks else {}
        for block, later in itertools.zip_longest(blocks, blocks[1:]):
            now, coming = coming, self._request(later) if later else {}
            logits, checks = self._received(block, now)
            skipped = max(step - block.first, 0) if block.epoch == epoch else 0
            yield from zip(logits[skipped:], checks[skipped:], strict=True)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """One whole epoch, counted from 0: logits float16 `[steps, B, C]`, checks uint32 `[steps, B]`.

        Raises:
            BadInput: as `batches`.
        """
        blocks = [block for block in self.about.blocks(epoch + 1) if block.epoch == epoch]
        logits, checks = zip(*(self._received(block, self._request(block)) for block in blocks), strict=True)
        return np.concatenate(logits), np.concatenate(checks)

    def _request(self, block: Block) -> store.Requested:
        return store.requested(self._stores, block)

    def _received(self, block: Block, requested: store.Requested) -> tuple[np.ndarray, np.ndarray]:
        try:
            parts = store.received(requested)
            damage = "" if store.digest(parts) == self._digests[block.key] else "they are not what was written"
        except (OSError, ValueError) as error:  # TensorStore raises ValueError for storage errors
            damage = " ".join(str(error).split())[:200]
        if damage:
            raise BadInput(
                f"config.teacher.cache={self.folder} is damaged, steps {block.first + 1} to {block.last} of epoch "
                f"{block.epoch + 1}: {damage}. {_MEND}"
            )
        return store.decode(parts, self.about), parts["check"]


class WithTeacher:
    """A `Source` whose training batches also hold "teacher_logits", float16 `[B/P, classes]`, read from a cache.

    The batches end with the last step in the cache. One row per batch (per epoch where the images are on the device) is
    compared with the checksum of the row that the teacher saw; the row's place changes from step to step. So a data set
    that has changed gives an error instead of wrong logits.
    """

    def __init__(self, source: Source, cache: Cache):
        self._source, self.cache = source, cache
        self._examples: dict[str, np.ndarray] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train_batches(
        self, *, seed: int, batch_size: int, start_step: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """As `Source.train_batches`, with "teacher_logits". Give the `seed` and `batch_size` that the cache has.

        Raises:
            BadInput: while iterating: the cache is damaged, or a row differs from the one that the teacher saw.
        """
        batches = self._source.train_batches(
            seed=seed,
            batch_size=batch_size,
            start_step=start_step,
            process_index=process_index,
            process_count=process_count,
        )
        mine = order.rows_of_process(batch_size, process_index, process_count)
        rows = slice(mine.start, mine.stop)
        both = zip(batches, self.cache.batches(start_step), strict=False)  # `batches` never ends
        for step, (batch, (logits, checks)) in enumerate(both, start_step):
            row = step % len(mine)
            self._check(batch, row, checks[rows][row], name=f"row {rows.start + row} of step {step + 1}")
            yield batch | {"teacher_logits": logits[rows]}

    def train_set(self) -> dict[str, np.ndarray] | None:
        """As `Source.train_set`."""
        self._examples = self._source.train_set()
        return self._examples

    def epoch_rows(
        self, *, seed: int, batch_size: int, epoch: int, process_index: int = 0, process_count: int = 1
    ) -> dict[str, np.ndarray]:
        """As `Source.epoch_rows`, with "teacher_logits", float16 `[steps, B/P, classes]`. Call `train_set` first.

        Raises:
            BadInput: as `train_batches`.
        """
        described = self._source.epoch_rows(
            seed=seed, batch_size=batch_size, epoch=epoch, process_index=process_index, process_count=process_count
        )
        logits, checks = self.cache.epoch(epoch)
        mine = order.rows_of_process(batch_size, process_index, process_count)
        step, row = epoch % len(checks), epoch % len(mine)
        its_rows = {name: values[step, row : row + 1] for name, values in described.items()}
        (place,) = its_rows["index"]
        its_example = {name: jnp.asarray(values[place : place + 1]) for name, values in self._examples.items()}
        self._check(
            jax.device_get(on_device.batch(its_example, its_rows | {"index": np.zeros(1, np.int32)})),
            0,
            checks[step, mine.start + row],
            name=f"row {mine.start + row} of step {step + 1} of epoch {epoch + 1}",
        )
        return described | {"teacher_logits": logits[:, mine.start : mine.stop]}

    def _check(self, batch: dict[str, np.ndarray], row: int, check: np.uint32, *, name: str) -> None:
        if row_checks(batch, [row])[0] != check:
            raise BadInput(
                f"config.teacher.cache={self.cache.folder}: {name} is not the image that the teacher saw: the data set "
                "or TensorFlow's augmentation changed since. Make the cache again with python -m "
                "dgkd_jax.cache_teacher, or train without config.teacher.cache."
            )
