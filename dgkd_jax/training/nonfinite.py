"""Ends a run whose loss or gradient stays non-finite, and names the part of the loss and the examples."""

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax.data.source import Source
from dgkd_jax.errors import NumericFailure
from dgkd_jax.runs import sharding
from dgkd_jax.training.build import Program
from dgkd_jax.training.state import TrainState
from dgkd_jax.training.step import PARTS


def check(config: ConfigDict, program: Program, current: TrainState, source: Source, mesh: Mesh) -> None:
    """End the run if the last `config.nonfinite_limit` steps were all skipped.

    Skipped steps leave the state unchanged and a batch is a function of its step, so the first bad step can be redone.

    Raises:
        NumericFailure: names the first bad step, the part of the loss and the examples.
    """
    skipped = int(current.skipped_in_a_row)
    if skipped < config.nonfinite_limit:
        return
    bad = int(current.step) - skipped + 1  # the first bad step, counted from 1
    batches = source.train_batches(
        seed=config.seed,
        batch_size=config.batch_size,
        start_step=bad - 1,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    there = current.replace(step=current.step - skipped)  # the batch is augmented as at its own step
    finite = program.finite_rows(there, program.teacher, sharding.to_global(next(batches), mesh))
    rows = {name: np.flatnonzero(~np.asarray(finite[name])) for name in PARTS if name in finite}
    parts = [name for name, bad_rows in rows.items() if bad_rows.size]
    if parts:
        ids = source.train_ids(seed=config.seed, batch_size=config.batch_size, step=bad - 1)
        where = [ids[row] for row in rows[parts[0]]]
        what = (
            f"{', '.join(parts)} in {len(where)} of {config.batch_size} examples of step {bad}: "
            f"{', '.join(where[:4])}{', …' if len(where) > 4 else ''}"
        )
    else:
        what = "only the gradient with respect to the parameters"
    raise NumericFailure(
        f"{config.nonfinite_limit} steps in a row, from step {bad} on, had a loss or gradient that is not finite "
        f"({what}). Nothing of them was saved. "
        "Try a lower optimizer.learning_rate, optimizer.clip_norm=5, or a smaller dgkd.epsilon."
    )
