"""Eight virtual CPU devices for every test, and compiled programs kept between runs."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # every program: many are compiled twice
# Commands leave an allocator alone that its user has set (runs/allocator.py): a process of tests lives for thousands of
# programs, and gives their memory back. This is glibc's own value.
os.environ.setdefault("MALLOC_TOP_PAD_", str(128 * 1024))

import jax
import numpy as np
import pytest
from counts import count


@pytest.hookimpl(tryfirst=True)  # before the faults are left out
def pytest_collection_modifyitems(config, items):
    count(config, items)


@pytest.fixture(scope="session")
def one_device():
    """A mesh of the first device, for what is the same bit for bit on one device only."""
    return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
