"""Where metrics go besides metrics.jsonl: the trackers that `config.writers` names, one file each."""

import functools
import importlib
import importlib.util
import json
import queue
import sys
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import jax
from etils import epath

from dgkd_jax.errors import BadInput, StorageFailure
from dgkd_jax.runs.files import write_whole

# Seconds that the end of a run waits for a tracker to take what is left.
PATIENCE_S = 60.0


class Tracker(Protocol):
    """Takes the metrics of one run.

    Attributes:
        resumed: it goes on with the record that an earlier process of the same run began.
    """

    resumed: bool

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Take scalars by name, such as `train/loss`, of the state after `step` steps."""

    def close(self, results: dict[str, float] | None) -> None:
        """Take the final results, None where the run did not come to its end; nothing is written after that."""


class Run(NamedTuple):
    """What a tracker is told of a run.

    Attributes:
        project: the name of the config.
        name: of the run within it, such as dgkd-seed0.
        config: dotted key -> value.
        workdir: of the run.
        identifier: of the tracker's record that the run goes on with; None: a new one.
    """

    project: str
    name: str
    config: dict[str, Any]
    workdir: epath.Path
    identifier: str | None


class _Kind(NamedTuple):
    """The module whose `begin` makes a tracker, the package that it needs, and the extra of ours that brings it."""

    module: str
    package: str
    extra: str


_KINDS = {
    "tensorboard": _Kind("to_tensorboard", "clu", "tfds"),
    "wandb": _Kind("to_wandb", "wandb", "wandb"),
    "mlflow": _Kind("to_mlflow", "mlflow", "mlflow"),
}


def check(names: Iterable[str]) -> None:
    """Refuse trackers whose package is not installed, before anything slow begins.

    Raises:
        BadInput: names the package and the command that installs it.
    """
    for name in names:
        kind = _KINDS[name]
        if importlib.util.find_spec(kind.package) is None:
            raise BadInput(
                f"config.writers: {name} needs the package {kind.package}, which is not installed: "
                f"pip install -e '.[{kind.extra}]'. Or name others; --config.writers=() is none"
            )


def begin(names: Iterable[str], workdir: epath.Path, *, project: str, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of a run, on the first process; none on others.

    Their identifiers are kept in `workdir/trackers.json`, so that a run that is started again goes on in the same
    record.

    Args:
        names: from `config.writers`.
        workdir: an existing folder; its name is the run's.
        project, config: as of `Run`.

    Raises:
        BadInput: a tracker needs a login.
        StorageFailure: a tracker cannot be reached.
    """
    if jax.process_index() != 0:
        return []
    path, found = workdir / "trackers.json", []
    known = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        run = Run(project, workdir.name, config, workdir, known.get(name))
        try:
            module = importlib.import_module(f"{__package__}.{_KINDS[name].module}")
            tracker, identifier = module.begin(run)
        except BadInput:
            raise
        except Exception as failure:  # each package has errors of its own
            raise StorageFailure(
                f"config.writers: {name} cannot begin: {_one_line(failure)}. Mend that and give the same command "
                f"again, or leave {name} out"
            ) from failure
        if identifier is not None:
            known[name] = identifier
            write_whole(path, json.dumps(known) + "\n")
            tracker = Background(name, tracker)
        found.append(tracker)
    return found


class Background:
    """A tracker in a thread of its own, so that training neither waits for it nor ends with it.

    After its first failure it is left alone; the user is told once, and that metrics.jsonl has everything.

    Args:
        name: for messages.
        tracker: used by the thread only.
    """

    def __init__(self, name: str, tracker: Tracker):
        self.resumed = tracker.resumed
        self._name, self._tracker = name, tracker
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._calls.put(functools.partial(self._tracker.write, step, scalars))

    def close(self, results: dict[str, float] | None) -> None:
        """As `Tracker.close`; waits `PATIENCE_S` seconds at most."""
        self._calls.put(functools.partial(self._tracker.close, results))
        self._calls.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._tell(f"did not take everything within {PATIENCE_S:g} seconds of the run's end")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as failure:  # each package has errors of its own
                self._tell(f"takes no more metrics ({_one_line(failure)}), and training goes on")
                return

    def _tell(self, what: str) -> None:
        print(f"{self._name} {what}. metrics.jsonl has all of them", file=sys.stderr, flush=True)


def _one_line(failure: Exception) -> str:
    return " ".join(str(failure).split())[:300] or type(failure).__name__
