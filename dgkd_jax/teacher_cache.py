"""A run's teacher from a cache: its logits, and a data set whose training batches bring them along.

A batch is a pure function of (seed, step), augmentation included, so a teacher that never changes says the same of it
in every run. `python -m dgkd_jax.cache_teacher` stores what it says (`logit_files`); `WithTeacher` adds it to batches.
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

from dgkd_jax import config as config_rules
from dgkd_jax import logit_files, steps
from dgkd_jax.data import Source, order, resident
from dgkd_jax.errors import BadInput
from dgkd_jax.logit_files import About, Block

_MAKE = (
    "Make one with python -m dgkd_jax.cache_teacher and this run's --config and overrides, or leave teacher.cache out"
)
_MEND = "The command that made it, given again, makes anew what is damaged: python -m dgkd_jax.cache_teacher"


def about(
    config: ConfigDict, *, teacher: str, source: Source, top_k: int = 0, temperature: float | None = None
) -> About:
    """What a run with this configuration, data set and teacher needs."""
    return About(
        teacher=teacher,
        batches=config_rules.of_batches(config),
        batch_size=config.batch_size,
        steps_per_epoch=source.steps_per_epoch(config.batch_size),
        num_classes=source.num_classes,
        top_k=top_k,
        temperature=temperature,
    )


def row_checks(batch: dict[str, np.ndarray], rows: list[int] | None = None) -> np.ndarray:
    """Uint32 `[rows]`: a checksum of each row's pixels and label, to notice data that are not those of the cache."""
    rows = range(len(batch["label"])) if rows is None else rows
    return np.array(
        [zlib.crc32(np.ascontiguousarray(batch["image"][row]), int(batch["label"][row])) for row in rows], np.uint32
    )


def missing(folder: epath.Path) -> str | None:
    """What to do where a run's cache is not there at all; None where it is."""
    if (folder / logit_files.MANIFEST).exists():
        return None
    return f"config.teacher.cache={folder}: no cache of a teacher's logits there. {_MAKE}"


class Cache:
    """A cache that fits a run, to be read.

    Args:
        folder: `config.teacher.cache`.
        config: of the run.
        teacher: fingerprint of the run's teacher.
        source: the run's data set.

    Raises:
        BadInput: there is none, it is not finished, or it is of another teacher, other batches or fewer epochs.
    """

    def __init__(self, folder: epath.Path, config: ConfigDict, *, teacher: str, source: Source):
        self.folder = folder
        if problem := missing(folder):
            raise BadInput(problem)
        manifest = logit_files.read_manifest(folder)
        wanted = about(
            config, teacher=teacher, source=source, top_k=manifest["top_k"], temperature=manifest["temperature"]
        )
        if other := logit_files.differences(manifest, wanted):
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
            self._stores = logit_files.open_arrays(folder, wanted)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise BadInput(f"config.teacher.cache={folder} is damaged: {why}. {_MEND}") from error

    def check_objective(self, objective: steps.Objective) -> None:
        """Refuse an objective that what is stored is wrong for.

        Raises:
            BadInput: only some classes are stored, and it is a squared error or at another temperature.
        """
        if not self.about.top_k or not objective.needs_teacher:
            return
        if objective.method == "logit_mse":
            raise BadInput(
                f"config.method=logit_mse needs every logit, and config.teacher.cache={self.folder} holds the top "
                f"{self.about.top_k} of {self.about.num_classes}: make a cache without --top-k."
            )
        if objective.temperature != self.about.temperature:
            raise BadInput(
                f"config.{'kd' if objective.method == 'kd' else 'dkd'}.temperature={objective.temperature:g}, and "
                f"config.teacher.cache={self.folder} holds what is right at {self.about.temperature:g} only: make a "
                "cache at this temperature, or one without --top-k, which serves every temperature."
            )

    def batches(self, start_step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """From `start_step` on, over all epochs to the last one stored: logits float16 `[B, C]`, checks uint32 `[B]`.

        The next block is on its way while one is used.

        Raises:
            BadInput: while iterating, that a block is not what was written.
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
        """All of an epoch, counted from 0: logits float16 `[steps, B, C]`, checks uint32 `[steps, B]`.

        Raises:
            BadInput: as `batches`.
        """
        blocks = [block for block in self.about.blocks(epoch + 1) if block.epoch == epoch]
        logits, checks = zip(*(self._received(block, self._request(block)) for block in blocks), strict=True)
        return np.concatenate(logits), np.concatenate(checks)

    def _request(self, block: Block) -> logit_files.Requested:
        return logit_files.requested(self._stores, block)

    def _received(self, block: Block, requested: logit_files.Requested) -> tuple[np.ndarray, np.ndarray]:
        try:
            parts = logit_files.received(requested)
            damage = "" if logit_files.digest(parts) == self._digests[block.key] else "they are not what was written"
        except (OSError, ValueError) as error:  # TensorStore raises ValueError for whatever the storage answers
            damage = " ".join(str(error).split())[:200]
        if damage:
            raise BadInput(
                f"config.teacher.cache={self.folder} is damaged, steps {block.first + 1} to {block.last} of epoch "
                f"{block.epoch + 1}: {damage}. {_MEND}"
            )
        return logit_files.decode(parts, self.about), parts["check"]


class WithTeacher:
    """A `Source` whose training batches bring the teacher's logits: "teacher_logits", float16 `[B/P, classes]`.

    They end with the last step that the cache holds. One row of each batch, another one in each step, is compared with
    what the teacher saw (one row of each epoch, where the images lie on the device): data that changed since are an
    error and not a wrong answer.
    """

    def __init__(self, source: Source, cache: Cache):
        self._source, self.cache = source, cache
        self._examples: dict[str, np.ndarray] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def train_batches(
        self, *, seed: int, batch_size: int, start_step: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """As `Source.train_batches`, and the logits; `seed` and `batch_size` are those that the cache was opened for.

        Raises:
            BadInput: while iterating: the cache is damaged, or a row is not the one that the teacher saw.
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
        both = zip(batches, self.cache.batches(start_step), strict=False)  # the former never end
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
        """As `Source.epoch_rows`, after `train_set`; and "teacher_logits", float16 `[steps, B/P, classes]`.

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
            jax.device_get(resident.batch(its_example, its_rows | {"index": np.zeros(1, np.int32)})),
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
