"""Silences what TensorFlow, TFDS, Orbax and libtpu tell of themselves; errors that a user must see are raised."""

import contextlib
import glob
import logging
import os
from collections.abc import Iterator

_LEVELS = {
    "tensorflow": logging.ERROR,  # TFDS warns about its own actions under this name
    "absl": logging.CRITICAL,  # Orbax warns about intended actions, and about errors that it raises anyway
    "asyncio": logging.CRITICAL,  # the same errors of Orbax once more, after our message
}
# The devices of TPUs: driver by driver, and through PCI pass-through.
_TPUS = ("/dev/accel*", "/dev/vfio/*")


def for_good() -> None:
    """In this process from now on, and best before TensorFlow is imported: it only reads data here."""
    for name, value in {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}.items():
        os.environ.setdefault(name, value)
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)
    if not tpu_is_here():
        absent_tpu()


def tpu_is_here() -> bool:
    """Whether this machine has the device of a TPU; starts nothing."""
    return any(map(glob.glob, _TPUS))


def absent_tpu() -> None:
    """Tell libtpu what it complains about where it is installed and there is no TPU; before JAX's first device."""
    for name, value in {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def meanwhile() -> Iterator[None]:
    """While the `with` block runs: for use within a program of someone else's. The loggers' levels come back."""
    before = {name: logging.getLogger(name).level for name in _LEVELS}
    for_good()
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
