"""A run's folder: it belongs to one configuration, and to one job at a time."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dgkd_jax import config as config_rules
from dgkd_jax.data import Source
from dgkd_jax.errors import BadInput


@contextlib.contextmanager
def lock(folder: epath.Path) -> Iterator[None]:
    """Keep other jobs out of a folder while the `with` block runs.

    The operating system holds the lock and lets go of it when the process ends, however it ends. Object stores (gs://)
    know no such locks: there nothing keeps a second job out.

    Raises:
        BadInput: another job has it; on all processes alike.
    """
    owner = ""
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0 and "://" not in os.fspath(folder):
            file = held.enter_context(open(Path(folder) / "lock", "a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                file.seek(0)
                owner = file.read().strip() or "unknown"
            else:
                file.truncate(0)
                now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
                file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
                file.flush()
        refused = bool(owner)
        if jax.process_count() > 1:
            refused = bool(multihost_utils.broadcast_one_to_all(np.array(refused)))
        if refused:
            raise BadInput(
                f"{folder} is in use by another job ({owner or 'seen by the first process'}). "
                "Wait for its end or stop it, or give another folder."
            )
        yield


def check(folder: epath.Path, config: ConfigDict) -> bool:
    """Whether a folder is claimed for this configuration already.

    Raises:
        BadInput: it is claimed for another; the message names the keys that differ.
    """
    try:
        recorded = ConfigDict(json.loads((folder / "config.json").read_text()))
        json.loads((folder / "student.json").read_text())
    except (FileNotFoundError, ValueError):
        return False  # nothing there, or half of it; the checkpoints know their configuration too
    config_rules.check_same_run(config_rules.identity(recorded), config, workdir=folder)
    return True


def claim(folder: epath.Path, config: ConfigDict, source: Source) -> None:
    """Write the resolved configuration and what the network sees, from the first process.

    Raises:
        BadInput: as `check`.
    """
    check(folder, config)
    if jax.process_index() == 0:
        _write(folder / "config.json", config.to_json(indent=2))
        # What it takes besides to read the checkpoints where the data set is not.
        about = {key: getattr(source, key) for key in ("name", "num_classes", "image_shape", "mean", "std")}
        about["enable_x64"] = jax.config.jax_enable_x64
        _write(folder / "student.json", json.dumps(about))


def _write(path: epath.Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)
