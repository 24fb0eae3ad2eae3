"""The system counts page faults (getrusage), in processes of their own: the settings last for a process's life."""

import ctypes
import os
import subprocess
import sys

import own_networks
import pytest

import dgkd_jax
from dgkd_jax.runs import allocator, default, launch

_COUNT_FAULTS = """
import resource, statistics
import jax, jax.numpy as jnp
from dgkd_jax.runs.allocator import keep_freed_memory

kept = {kept}
step = jax.jit(lambda x: (x @ x.T) @ x)  # its temporary: 64 MiB, 16,384 pages
x = jnp.ones((4096, 32))
counts = []
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, statistics.median(counts))  # now and then the heap still grows by a block
"""


def _printed(program: str, **environment: str) -> str:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_a_step_meets_no_page_faults_once_freed_memory_is_kept():
    kept, faults = _printed(_COUNT_FAULTS.format(kept="keep_freed_memory()")).split()
    assert kept == "True"
    assert float(faults) < 100
    _, without = _printed(_COUNT_FAULTS.format(kept="False")).split()
    assert float(without) > 16_000  # else the step had no temporaries, and nothing was shown


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, {"JAX_PLATFORMS": "cuda,cpu"}],
    ids=["malloc's variables", "glibc's tunables", "an accelerator"],
)
def test_the_allocator_is_left_alone(environment):
    program = "from dgkd_jax.runs.allocator import keep_freed_memory; print(keep_freed_memory())"
    assert _printed(program, **environment).strip() == "False"


@pytest.mark.slow
def test_distilling_in_a_users_own_process_does_not_touch_its_allocator(monkeypatch):
    """`launch.set_up`, which every command and every worker of a study calls, does."""
    called = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: called.append(True))
    images = own_networks.images_and_labels(8)
    dgkd_jax.distill(own_networks.Plain(), None, train=images, evaluate=images, method="ce", epochs=1, batch_size=8)
    assert not called
    launch.set_up(default.get_config())
    assert called
