"""Keeps freed memory for the next step, so that a step on a CPU meets no page faults (glibc only)."""

import ctypes
import importlib.util
import os

import jax

from dgkd_jax.data import quiet

# mallopt's parameters, from glibc's malloc.h. Its values are C ints, so 2 GiB less one byte is the largest.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed; returns whether it does.

    XLA allocates a step's temporaries anew at each step. Blocks of that size glibc maps and unmaps each time, and the
    system fills every page with zeros: 38,000 page faults in a step of resnet56 → resnet20. Call this before the first
    array is made, since threads keep the arenas that they have.

    Nothing is changed where JAX may compute on an accelerator (there the host's memory is many threads' that read data,
    and one arena would make them wait for each other), where the C library has no `mallopt`, and where the user has set
    the allocator by its own variables, MALLOC_… or GLIBC_TUNABLES.
    """
    if not _computes_on_cpu() or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # An old glibc takes no threshold above 32 MiB; then nothing is mapped at all.
    unmapped = mallopt(_MMAP_THRESHOLD, _LARGEST) or mallopt(_MMAP_MAX, 0)
    # Only the first arena can hold blocks above 64 MiB.
    return bool(unmapped and mallopt(_TRIM_THRESHOLD, _LARGEST) and mallopt(_ARENA_MAX, 1))


def _computes_on_cpu() -> bool:
    """Without starting a backend: that has to wait until the other processes have joined."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms.split(",")[0] == "cpu"
    return importlib.util.find_spec("jax_plugins") is None and not quiet.tpu_is_here()
