"""Batches of a data set, for its tests."""

from itertools import islice


def take(source, count, *, batch_size, start_step=0, seed=0, **process):
    batches = source.train_batches(seed=seed, batch_size=batch_size, start_step=start_step, **process)
    return list(islice(batches, count))
