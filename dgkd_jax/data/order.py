"""Which example is in which row of which batch: pure arithmetic, shared by real and generated data.

An epoch is read by R readers. The training split is cut into R even pieces; reader v reads piece v and supplies rows
[v·B/R, (v+1)·B/R) of every global batch of B rows. Process p of P supplies rows [p·B/P, (p+1)·B/P), so it opens readers
[p·R/P, (p+1)·R/P) only: the batches do not depend on P, and no process reads another's share. The exception is R = 1
with several processes: each of them reads everything and drops the others' rows before decoding.
"""

from dgkd_jax.errors import BadInput


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Whole batches in a split. The rest of an epoch is dropped; it is a different rest in each epoch.

    Raises:
        BadInput: the split is smaller than one batch.
    """
    if batch_size > num_examples:
        raise BadInput(f"config.batch_size={batch_size} is larger than the training split, {num_examples} images")
    return num_examples // batch_size


def piece(num_examples: int, index: int, count: int) -> tuple[int, int]:
    """First and past-the-last example of piece `index` of `count`; sizes differ by at most one."""
    return num_examples * index // count, num_examples * (index + 1) // count


def rows_of_process(batch_size: int, process_index: int, process_count: int) -> range:
    """Rows of the global batch that a process supplies.

    Raises:
        BadInput: the batch is not divisible by the number of processes.
    """
    if batch_size % process_count:
        raise BadInput(f"a batch of {batch_size} cannot be divided evenly over {process_count} processes")
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def readers_of_process(readers: int, batch_size: int, process_index: int, process_count: int) -> range:
    """The readers that a process opens.

    Raises:
        BadInput: readers, batch and processes do not divide each other.
    """
    if batch_size % readers:
        raise BadInput(f"config.data.readers={readers} must divide config.batch_size={batch_size}")
    if readers == 1:
        return range(1)
    if readers % process_count:
        raise BadInput(f"config.data.readers={readers} must be 1 or a multiple of the {process_count} processes")
    share = readers // process_count
    return range(process_index * share, (process_index + 1) * share)


def eval_batches(num_examples: int, batch_size: int, process_count: int) -> int:
    """Batches that every process yields: enough for the largest process's piece."""
    largest_piece = -(-num_examples // process_count)
    return -(-largest_piece // (batch_size // process_count))
