"""Checks a run against its data, devices and disk before the first second of training, the teacher's included."""

import math
import shutil
from pathlib import Path

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput
from dgkd_jax.runs import workdir as workdir_lib
from dgkd_jax.training.build import bytes_of_state


def check(config: ConfigDict, target: epath.Path, source: Source, mesh: Mesh) -> None:
    """Check all that a run would find out only after its teacher's training.

    Args:
        config: of one method.
        target: the run's work directory, which need not be there.

    Raises:
        BadInput: the batch does not fit the devices or the student the images; the work directory belongs to a run
            with another config, or there is no room for its checkpoints.
    """
    check_batch(config, mesh)
    workdir_lib.check(target, config)
    # The newest checkpoint stays until the next one is whole.
    check_space(target, 2 * bytes_of_state(config, source))


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises BadInput if the batch cannot be split over the devices."""
    if config.batch_size % mesh.size:
        fits = math.ceil(config.batch_size / mesh.size) * mesh.size
        raise BadInput(
            f"config.batch_size={config.batch_size} must be a multiple of the number of devices, {mesh.size}: "
            f"try --config.batch_size={fits}"
        )


def check_space(target: epath.Path, needed: int) -> None:
    """Raises BadInput if a folder's disk has fewer than `needed` bytes free, and the folder has no checkpoints yet."""
    if "://" in str(target) or (target / "checkpoints").exists():
        return  # buckets have no end; a run that has saved is asked to go on, and says so itself if it cannot
    place = next(folder for folder in (Path(target).absolute(), *Path(target).absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise BadInput(
            f"--workdir={target}: the checkpoints need {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are "
            "free there. Make room, or give another folder, --workdir=DIR"
        )
