"""Compiles a run's program for a slice and says what it costs; on request looks for the largest batch that fits."""

import math

from ml_collections import ConfigDict

from dgkd_jax.errors import BadInput
from dgkd_jax.plan import estimate, program
from dgkd_jax.plan.compiler import Compiled, TooLarge, compile_it, devices_of
from dgkd_jax.plan.estimate import Plan
from dgkd_jax.plan.slices import Slice
from dgkd_jax.runs import config as config_rules
from dgkd_jax.runs import sharding

_MOST_TRIES = 5  # compilations that look for the largest batch


def plan(config: ConfigDict, on: Slice, *, target: str, per_chip: int | None = None, largest: bool = False) -> Plan:
    """A program of a run on a slice.

    Args:
        config: validated.
        on: the slice.
        target: one of `program.TARGETS`.
        per_chip: images on each chip; None: as the config's batch has it.
        largest: compile more programs to find the largest batch, instead of estimating it from this one.

    Raises:
        BadInput: as `program.lower`; or the mesh does not fit the slice, or another key does not go with the batch.
    """
    if per_chip is not None:
        config_rules.validate(config := _with_per_chip(config, on, target, per_chip))
    found = _compiled(config, on, target)
    source = program.described(config)
    cost = None if isinstance(found, TooLarge) else estimate.cost_of(found, on, of_step=target == "train")
    rows = program.rows_of(config, target, devices=on.chips)
    constant = 0.0
    if cost is not None:
        image_mib = (math.prod(source.image_shape) + 4) / 2**20
        constant = max(cost.memory.arguments - image_mib * rows / on.chips, 0.0)
    most = estimate.largest_estimated(cost or found, on, per_chip=rows / on.chips, constant_mib=constant)
    ceiling = (source.num_train if target == "train" else source.num_eval) // on.chips  # a batch is not more than all
    if most is not None:
        most = min(most, ceiling)
    how = "estimated" if most is not None else ""
    if largest:
        fits, guess = rows // on.chips if cost else 0, most or rows // on.chips
        most, how = _largest(config, on, target, fits=fits, guess=guess, ceiling=ceiling), "compiled"
    steps_per_epoch = source.steps_per_epoch(config.batch_size) if target == "train" else None
    return Plan(
        topology=on,
        target=target,
        batch_size=rows,
        cost=cost,
        needed_gib=found.needed_gib if isinstance(found, TooLarge) else None,
        largest=most,
        largest_is=how,
        accumulate=config.accumulate,
        steps=steps_per_epoch and config.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        streamed=target == "train" and not source.on_device,
        compile_s=found.seconds,
    )


def _with_per_chip(config: ConfigDict, on: Slice, target: str, per_chip: int) -> ConfigDict:
    """A copy in which the target's batch has this many images on each chip."""
    with (config := config.copy_and_resolve_references()).unlocked():
        config["batch_size" if target == "train" else "eval_batch_size"] = per_chip * on.chips
    return config


def _compiled(config: ConfigDict, on: Slice, target: str) -> Compiled | TooLarge:
    try:
        mesh = sharding.make_mesh(fsdp=config.mesh.fsdp, devices=devices_of(on))
    except ValueError as error:
        raise BadInput(f"config.{error}") from error
    return compile_it(program.lower(config, mesh, target=target))


def _largest(config: ConfigDict, on: Slice, target: str, *, fits: int, guess: int, ceiling: int) -> int | None:
    """Images a chip: the most that were compiled and fit; None where none did.

    Args:
        fits: that are known to fit; 0: none.
        guess: that may fit.
        ceiling: the most that there can be.
    """
    too_many = None
    for _ in range(_MOST_TRIES):
        guess = estimate.whole(min(guess, ceiling))
        if guess <= fits or guess == too_many:
            break
        found = _compiled(_with_per_chip(config, on, target, guess), on, target)
        if isinstance(found, TooLarge):
            too_many = guess
            guess = (fits + guess) // 2
        else:
            fits = guess
            guess = (fits + too_many) // 2 if too_many else 2 * fits
    return fits or None
