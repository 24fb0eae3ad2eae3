"""A run's work directory: it belongs to one config, and one run at a time may use it."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dgkd_jax import own_code
from dgkd_jax.data import item_source
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput, Preempted
from dgkd_jax.models import stored_program
from dgkd_jax.models.architecture import Architecture
from dgkd_jax.models.network import Network
from dgkd_jax.runs import config as config_rules
from dgkd_jax.runs.files import write_whole


def check_writable(folder: epath.Path) -> None:
    """Check that a folder can be created and written, before anything slow starts. Leaves nothing behind.

    The first process checks.

    Raises:
        BadInput: it cannot; raised on all processes.
    """
    reason = _problem_with(folder) if jax.process_index() == 0 else ""
    if _on_the_first_process(bool(reason)):
        raise BadInput(
            f"--workdir={folder}: cannot be made or written: {reason or 'seen by the first process'}. "
            "Give another folder, --workdir=DIR"
        )


def _problem_with(folder: epath.Path) -> str:
    made: list[epath.Path] = []
    try:
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                place.mkdir()
                made.append(place)
        probe = folder / f".can-be-written-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # a bucket's client raises errors of its own
        return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
    finally:
        for place in reversed(made):
            with contextlib.suppress(Exception):
                place.rmdir()
    return ""


def _on_the_first_process(mine: bool) -> bool:
    """The first process's value of `mine`, on all processes."""
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.broadcast_one_to_all(np.array(mine)))


@contextlib.contextmanager
def lock(folder: epath.Path, *, wait: Callable[[], bool] | None = None) -> Iterator[None]:
    """Keep other runs out of a folder while the `with` block runs.

    The operating system holds the lock and releases it when the process ends, even by a kill. Object stores (gs://)
    have no such locks: there, nothing keeps a second run out.

    Args:
        wait: None: refuse a folder in use. Else wait until it is free, and call this every second; true means stop.

    Raises:
        BadInput: another run has the folder; raised on all processes.
        Preempted: `wait` returned true.
    """
    owner = ""
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0 and "://" not in os.fspath(folder):
            file = held.enter_context(open(Path(folder) / "lock", "a+"))
            owner = _take(file)
            if owner and wait is not None:
                print(f"waiting for {folder}, in use by another run ({owner})", file=sys.stderr, flush=True)
                while owner:
                    if wait():
                        raise Preempted(f"stopped while waiting for {folder}; the same command goes on from there")
                    time.sleep(1.0)
                    owner = _take(file)
        if _on_the_first_process(bool(owner)):
            raise BadInput(
                f"{folder} is in use by another job ({owner or 'seen by the first process'}). "
                "Wait for its end or stop it, or give another folder."
            )
        yield


def _take(file: IO[str]) -> str:
    """Lock a file and write its owner into it; returns "", or the other owner if it is already locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        file.seek(0)
        return file.read().strip() or "unknown"
    file.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
    file.flush()
    return ""


def check(folder: epath.Path, config: ConfigDict) -> bool:
    """Whether a folder already belongs to a run with this config.

    Raises:
        BadInput: it belongs to a run with another config; the message names the keys that differ.
    """
    recorded = identity_of(folder)
    if recorded is None:
        return False
    config_rules.check_same_run(recorded, config, workdir=folder)
    return True


def identity_of(folder: epath.Path) -> dict[str, Any] | None:
    """`config.identity` of the run that a folder belongs to; None: it belongs to none yet."""
    try:
        recorded = ConfigDict(json.loads((folder / "config.json").read_text()))
        json.loads((folder / "student.json").read_text())
    except (FileNotFoundError, ValueError):
        return None  # missing or half-written; checkpoints record their config too
    return config_rules.identity(recorded)


def claim(
    folder: epath.Path,
    config: ConfigDict,
    source: Source,
    student: Network,
    *,
    total_steps: int,
    architecture: Architecture | None = None,
) -> None:
    """Write what is needed to rebuild the student, from the first process: config.json, student.json, the program of a
    network that is not one of `models.NAMES`, and the evaluation split of images that only Python could give.

    Args:
        student: for its pixel mean and std.
        total_steps: of the run.
        architecture: of the student; read if it is not one of `models.NAMES`.

    Raises:
        BadInput: as `check`.
    """
    check(folder, config)
    if jax.process_index() == 0:
        write_whole(folder / "config.json", config.to_json(indent=2) + "\n")
        # Needed to use the checkpoints on a machine without the data set.
        about = {key: getattr(source, key) for key in ("name", "num_classes", "image_shape")}
        about |= {"mean": student.mean, "std": student.std, "enable_x64": jax.config.jax_enable_x64}
        about["total_steps"] = total_steps
        write_whole(folder / "student.json", json.dumps(about) + "\n")
        if own_code.is_given(config.data.name) and not (folder / item_source.KEPT_FILE).exists():
            kept = item_source.kept_evaluation(source)
            if kept is not None:
                write_whole(folder / item_source.KEPT_FILE, kept)
        if own_code.is_own(config.student.model):
            write_whole(folder / stored_program.FILE, stored_program.to_bytes(architecture, source.image_shape))
