"""Checks a run against its data, devices and disk before the first second of training, the teacher's included."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput
from dgkd_jax.runs import config as config_rules
from dgkd_jax.runs import workdir as workdir_lib
from dgkd_jax.training.build import bytes_of_state
from dgkd_jax.training.given import NOTHING, Given
from dgkd_jax.training.monitor import trackers


def check(
    config: ConfigDict,
    targets: Mapping[str, epath.Path],
    source: Source,
    mesh: Mesh,
    *,
    given: Given = NOTHING,
) -> None:
    """Check all that a run would find out only after its teacher's training.

    Args:
        targets: method -> its work directory, which need not be there.
        given: objects in place of the config's names.

    Raises:
        BadInput: the batch does not fit the devices or the student the images; a work directory belongs to a run
            with another config, or there is no room for the checkpoints; a tracker's package is missing.
    """
    trackers.check(config.writers)
    check_batch(config, mesh)
    for name, target in targets.items():
        workdir_lib.check(target, config_rules.with_method(config, name))
    # Buckets have no end; a run that has saved goes on, and says itself if it cannot.
    fresh = {
        name: target
        for name, target in targets.items()
        if "://" not in str(target) and not (target / "checkpoints").exists()
    }
    if fresh:
        name, target = next(iter(fresh.items()))  # the states of all methods are equally large, but for a few numbers
        # The newest checkpoint stays until the next one is whole.
        state = bytes_of_state(config_rules.with_method(config, name), source, given=given)
        check_space(target, 2 * len(fresh) * state)


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises BadInput if the batch, or a part of it, cannot be split over the devices."""
    step = mesh.size * config.accumulate
    if config.batch_size % step:
        fits = math.ceil(config.batch_size / step) * step
        times = f", times config.accumulate={config.accumulate}" if config.accumulate > 1 else ""
        raise BadInput(
            f"config.batch_size={config.batch_size} must be a multiple of the number of devices, {mesh.size}{times}: "
            f"try --config.batch_size={fits}"
        )


def check_space(target: epath.Path, needed: int, *, what: str = "the checkpoints need") -> None:
    """Raises BadInput if the disk of a folder, which need not be there, has fewer than `needed` bytes free."""
    place = next(folder for folder in (Path(target).absolute(), *Path(target).absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BadInput(
            f"--workdir={target}: {what} {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are "
            "free there. Make room, or give another folder, --workdir=DIR"
        )
