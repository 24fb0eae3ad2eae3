"""The platform that a program is made for: it decides which form of a convolution it has, and what `dtype=auto` is.

It is that of the mesh on which the program will run (`runs.sharding.made_for`), which need not be in this machine.
Where nobody says, it is that of JAX's default devices.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_given: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def current() -> str:
    """`cpu`, `gpu` or `tpu`."""
    return _given.get() or jax.default_backend()


@contextlib.contextmanager
def on(platform: str) -> Iterator[None]:
    """Networks that are made or traced meanwhile are for this platform."""
    token = _given.set(platform)
    try:
        yield
    finally:
        _given.reset(token)
