"""Store what the teacher says of every training batch, so that students of the same seed need not run it.

    python -m dgkd_jax.cache_teacher --config=FILE [--config.KEY=VALUE …] [--epochs=E] [--output=DIR] [--top-k=K]

--epochs  how many to store (default: config.epochs); more can be added later, by the same command with a larger number
--output  where (default: runs/NAME/teacher-logits-seedSEED)
--top-k   store K classes of each image, the label's among them, and the sum of the others at the temperature of
          --config.method; 0 (default): all classes. Smaller with hundreds of classes

The teacher is the one that `python -m dgkd_jax.main` with the same arguments uses, trained first if need be. A command
that was interrupted goes on where it was, and makes anew what is damaged. Then train with --config.teacher.cache=DIR.
"""

import collections
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax import faults, job, logit_files, ownership, sharding, steps, teacher_cache
from dgkd_jax import main as main_command
from dgkd_jax.data import Source
from dgkd_jax.errors import BadInput, NumericFailure, Preempted
from dgkd_jax.logit_files import About, Block
from dgkd_jax.program import Teacher
from dgkd_jax.progress import Progress

_EPOCHS = flags.DEFINE_integer("epochs", None, "epochs to store; default config.epochs", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "folder of the cache; default runs/NAME/teacher-logits-seedSEED")
_TOP_K = flags.DEFINE_integer("top-k", 0, "classes to store of each image; 0 = all", lower_bound=0)

# Batches whose logits are being computed while those of an earlier one are fetched.
_AHEAD = 2


class Made(NamedTuple):
    """A finished cache: where, of how many epochs, what it holds, and the blocks that this call wrote."""

    folder: epath.Path
    epochs: int
    about: About
    written: int


def main(argv: list[str]) -> int:
    """The command; returns the exit code."""

    def work(settings: ConfigDict, stop: Callable[[], bool]) -> None:
        if flags.FLAGS.workdir is not None:
            raise BadInput("--workdir is of dgkd_jax.main; here the folder is --output=DIR")
        made = make(settings, _OUTPUT.value, epochs=_EPOCHS.value, top_k=_TOP_K.value, stop=stop)
        if jax.process_index() == 0:
            print(summary(made, argv, settings))

    return main_command.command(argv, usage=__doc__.strip(), work=work)


def make(
    config: ConfigDict,
    folder: str | None = None,
    *,
    epochs: int | None = None,
    top_k: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Made:
    """Store the logits of a configuration's teacher, as far as they are not there.

    Args:
        config: validated.
        folder: None: runs/NAME/teacher-logits-seedSEED.
        epochs: None: config.epochs.
        top_k: classes of each image; 0: all.
        stop: as `train.fit`.

    Raises:
        BadInput: there is no teacher, or it, the data or the folder cannot be used.
        NumericFailure: a logit is not finite, or too large for float16.
        StorageFailure, Preempted: the same call goes on from there.
    """
    epochs = epochs or config.epochs
    temperature = _temperature(config) if top_k else None
    if config.method == "ce":
        raise BadInput("config.method=ce has no teacher; leave --config.method out")
    config = config.copy_and_resolve_references()
    config.teacher.cache = ""  # where one is named it may be this one, which need not be there yet
    source, mesh, taught = job.prepare(config, ("kd",), stop=stop)
    if top_k >= source.num_classes:
        raise BadInput(f"--top-k={top_k}: {source.name} has {source.num_classes} classes; leave --top-k out for all")
    root = job.root_of(config)
    target = epath.Path(folder) if folder else root / f"teacher-logits-seed{config.seed}"
    about = teacher_cache.about(
        config, teacher=taught.teacher.fingerprint, source=source, top_k=top_k, temperature=temperature
    )
    logit_files.Writer(target, about, epochs=epochs)  # a folder that is refused is left as it is, without a lock
    if jax.process_index() == 0:
        target.mkdir(parents=True, exist_ok=True)
    with ownership.lock(target):
        writer = logit_files.Writer(target, about, epochs=epochs)  # what another job wrote meanwhile counts
        blocks = _agreed(writer, epochs)
        _fill(writer, blocks, config, epochs=epochs, teacher=taught.teacher, source=source, mesh=mesh, stop=stop)
    return Made(target, epochs, about, len(blocks))


def _temperature(config: ConfigDict) -> float:
    if config.method not in ("kd", "dkd", "dgkd"):
        raise BadInput(
            f"--top-k stores the sum of the other classes at one temperature, and config.method={config.method} has "
            "none: give --config.method=kd, dkd or dgkd, or leave --top-k out"
        )
    return steps.objective_of(config).temperature


def _agreed(writer: logit_files.Writer, epochs: int) -> list[Block]:
    """The blocks to write, as the first process, which writes them, finds them."""
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
    writer: logit_files.Writer,
    blocks: list[Block],
    config: ConfigDict,
    *,
    epochs: int,
    teacher: Teacher,
    source: Source,
    mesh: Mesh,
    stop: Callable[[], bool],
) -> None:
    """Run the teacher over the steps of these blocks, all processes together; the first one writes."""
    per_epoch = writer.about.steps_per_epoch
    total, left = epochs * per_epoch, sum(block.last - block.first for block in blocks)
    progress = Progress(
        f"{config.teacher.model}'s logits",
        start=total - left,
        total=total,
        steps_per_epoch=per_epoch,
        batch_size=config.batch_size,
    )
    done = total - left
    ask = _question(teacher, mesh)
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
                    _check_finite(rows[-1]["logits"], config, source, block.epoch * per_epoch + block.first + len(rows))
                    done += 1
                    faults.at("step", done)
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
    """Blocks that follow each other, together: the data are opened once for each such run."""
    runs: list[list[Block]] = []
    for block in blocks:
        if runs and _span(runs[-1], per_epoch)[1] == block.epoch * per_epoch + block.first:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _span(run: list[Block], per_epoch: int) -> tuple[int, int]:
    """First and past-the-last step, counted over all epochs."""
    return run[0].epoch * per_epoch + run[0].first, run[-1].epoch * per_epoch + run[-1].last


def _question(teacher: Teacher, mesh: Mesh) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """A batch -> the teacher's logits of all of its rows, with labels and checksums, on every process."""

    def ask(variables, batch):
        seen = steps.normalize(batch["image"], mean=teacher.mean, std=teacher.std)
        return {"logits": teacher.apply(variables, seen), "label": batch["label"], "check": batch["check"]}

    compiled = jax.jit(ask, out_shardings=sharding.replicated(mesh))
    return lambda batch: compiled(teacher.variables, batch)


def _answers(
    ask: Callable, batches: Iterator[dict[str, np.ndarray]], numbers: range, mesh: Mesh
) -> Iterator[dict[str, np.ndarray]]:
    # On CPUs, steps of several processes that are in flight together can wait for each other for ever.
    ahead = 0 if jax.process_count() > 1 and jax.default_backend() == "cpu" else _AHEAD
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    for _ in numbers:
        batch = next(batches)
        queue.append(ask(sharding.to_global(batch | {"check": teacher_cache.row_checks(batch)}, mesh)))
        if len(queue) > ahead:
            yield jax.device_get(queue.popleft())
    yield from map(jax.device_get, queue)


def _check_finite(logits: np.ndarray, config: ConfigDict, source: Source, step: int) -> None:
    """`step`, counted from 1."""
    bad = np.flatnonzero(~(np.abs(logits) <= np.finfo(np.float16).max).all(axis=1))
    if bad.size:
        ids = source.train_ids(seed=config.seed, batch_size=config.batch_size, step=step - 1)
        raise NumericFailure(
            f"the teacher's logits of {bad.size} of {config.batch_size} images of step {step} are not finite, or "
            f"too large for float16 (65504): {', '.join(ids[row] for row in bad[:4])}. Train with the live teacher."
        )


def _parts(rows: list[dict[str, np.ndarray]], about: About) -> dict[str, np.ndarray]:
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return logit_files.encode(stacked["logits"], stacked["label"], stacked["check"], about)


def summary(made: Made, argv: list[str], config: ConfigDict) -> str:
    """What was made, how large it is, and the command that trains from it."""
    size = logit_files.size_on_disk(made.folder)
    images = made.epochs * made.about.steps_per_epoch * made.about.batch_size
    given = [argument for argument in argv[1:] if re.match("--?config(?!.teacher.cache=)", argument)]
    if made.epochs < config.epochs:
        given.append(f"--config.epochs={made.epochs}")
    command = shlex.join(["python", "-m", "dgkd_jax.main", *given, f"--config.teacher.cache={os.fspath(made.folder)}"])
    return (
        f"{made.folder}: the logits of {config.teacher.model} (weights {made.about.teacher}) for "
        f"{_counted(made.epochs, 'epoch')}, {made.about.description}: {size / 1e6:,.1f} MB, "
        f"{size / images:.0f} bytes an image; {_counted(made.written, 'block')} written now\n"
        f"Train from it:  {command}"
    )


def _counted(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
