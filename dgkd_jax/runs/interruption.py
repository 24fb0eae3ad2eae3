"""Handles SIGTERM and SIGINT: all processes stop at the same step with their work saved; a second one ends at once."""

import collections
import os
import signal
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dgkd_jax.runs import sharding

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Unanswered questions in flight: with 2, the host never waits for the step that it has just dispatched.
_IN_FLIGHT = 2


class Interruption:
    """Notes signals while its `with` block runs, and lets all processes agree on when to stop.

    A thread receives the signal through a pipe, so a second one is obeyed even while the main thread compiles or waits
    for a device. Only the main thread can enter the block.
    """

    def __init__(self):
        self._requested = threading.Event()
        self._stopped = False
        self._unanswered: collections.deque[jax.Array] = collections.deque()
        self._any = None

    def __enter__(self) -> "Interruption":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_pipe = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # Signals are written to the pipe only if there is a Python handler; it does nothing.
        self._previous = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        threading.Thread(target=self._watch, args=(self._read,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_pipe)
        os.close(self._write)  # ends the thread, which closes the other end

    def _watch(self, pipe: int) -> None:
        with os.fdopen(pipe, "rb", buffering=0) as signals:
            while byte := signals.read(1):
                if byte[0] not in _SIGNALS:
                    continue
                name = signal.Signals(byte[0]).name
                if self._requested.is_set():
                    print(
                        f"dgkd_jax: second {name}, ending at once; what was saved is intact",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(128 + byte[0])
                self._requested.set()
                print(
                    f"dgkd_jax: {name}: saving after this step, then stopping. Again: stop at once",
                    file=sys.stderr,
                    flush=True,
                )

    def agreed(self) -> bool:
        """Whether to stop now. Every process calls this at the same places: after each step and evaluated batch.

        With several processes the answer is computed on the devices from all of them, so it is the same on all. It
        answers the question asked two calls earlier, so nothing waits. Once true, it stays true.
        """
        if jax.process_count() == 1:
            return self._requested.is_set()
        if not self._stopped:
            self._unanswered.append(self._ask())
            in_flight = 0 if sharding.calls_must_be_waited_for(self._per_device.mesh) else _IN_FLIGHT
            while len(self._unanswered) > in_flight:
                self._stopped = self._stopped or bool(self._unanswered.popleft())
        return self._stopped

    def _ask(self) -> jax.Array:
        if self._any is None:
            mesh = jax.sharding.Mesh(np.array(jax.devices()), ("device",))
            self._per_device = NamedSharding(mesh, PartitionSpec("device"))
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        mine: Any = np.full(jax.local_device_count(), self._requested.is_set())
        return self._any(jax.make_array_from_process_local_data(self._per_device, mine))
