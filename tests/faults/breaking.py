"""Runs a module of the package as a command, and breaks it on demand: python tests/faults/breaking.py MODULE ARGUMENT…

DGKD_FAULT=ACTION@PLACE:NUMBER, several separated by commas: at the NUMBER-th time that a process comes by PLACE
(`step`: when that step was dispatched) it kills itself (`kill`), gets a signal (`sigterm`, `sigint`) or hangs (`hang`).
Only the process DGKD_FAULT_PROCESS (default 0) is hit. Places: step, eval (a batch of it), save (a checkpoint is being
written), compile. The program knows nothing of this: it is wrapped from outside.
"""

import functools
import os
import runpy
import signal
import sys
import time
from collections import Counter

_SIGNALS = {"kill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigint": signal.SIGINT}
_visits: Counter[str] = Counter()


def at(place: str, number: int | None = None) -> None:
    """Let a fault happen here, if one is due.

    Args:
        place: the name of this place in the program.
        number: which time this is; None: counted here, from 1.
    """
    wanted = os.environ.get("DGKD_FAULT")
    if not wanted or os.environ.get("JAX_PROCESS_ID", "0") != os.environ.get("DGKD_FAULT_PROCESS", "0"):
        return
    _visits[place] += 1
    here = f"{place}:{_visits[place] if number is None else number}"
    for fault in wanted.split(","):
        action, due = fault.split("@")
        if due != here:
            continue
        if action == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), _SIGNALS[action])
        time.sleep(2.0)  # the signal's thread takes it before the program goes on, also on a busy machine


def wrap() -> None:
    """Put the places into the program."""
    from dgkd_jax.evaluate.evaluator import Evaluator
    from dgkd_jax.runs.checkpoint import Checkpoints
    from dgkd_jax.training import loop
    from dgkd_jax.training.cached_logits import fill
    from dgkd_jax.training.monitor.progress import ProgressLine
    from dgkd_jax.training.monitor.recorder import Recorder

    def around(owner: type, name: str):
        """Replaces a method by a function of it and its arguments."""
        original = getattr(owner, name)

        def decorate(replacement):
            @functools.wraps(original)
            def method(self, *arguments, **options):
                return replacement(functools.partial(original, self), self, *arguments, **options)

            setattr(owner, name, method)

        return decorate

    @around(Recorder, "stepped")
    def _(stepped, recorder, step, **options):
        stepped(step, **options)
        at("step", step)

    @around(loop._Compiled, "__call__")
    def _(call, compiled, *arguments):
        if compiled._compiled is None:
            at("compile")
        return call(*arguments)

    @around(Evaluator, "__call__")
    def _(evaluate, evaluator, *arguments, **options):
        if "stop" in options:  # those of the training loop
            stop = options["stop"]
            options["stop"] = lambda: at("eval") or stop()
        return evaluate(*arguments, **options)

    @around(Checkpoints, "save")
    def _(save, checkpoints, *arguments, **options):
        save(*arguments, **options)
        at("save")

    class Counting(ProgressLine):
        """Of the command that stores the teacher's logits."""

        def __init__(self, *arguments, start: int, **options):
            super().__init__(*arguments, start=start, **options)
            self._done = start

        def advance(self, steps: int) -> None:
            super().advance(steps)
            self._done += steps
            at("step", self._done)

    fill.ProgressLine = Counting


if __name__ == "__main__":
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = os.getcwd()  # as python -m has it
    wrap()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
