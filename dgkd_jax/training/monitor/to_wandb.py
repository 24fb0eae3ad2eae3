"""Metrics to Weights & Biases. Where to, and whether online: its own variables, such as WANDB_MODE=offline."""

import os
import uuid
from typing import Any

import wandb

from dgkd_jax.errors import BadInput

_START_S, _END_S = 60, 60  # seconds to wait for the server


class ToWandb:
    """A `trackers.Tracker`."""

    def __init__(self, run: Any, *, resumed: bool):
        self.resumed = resumed
        self._run = run
        # Its own counter of steps never goes back and would drop the evaluation of a step that was logged before.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars | {"step": step})

    def close(self, results: dict[str, float] | None) -> None:
        self._run.summary.update(results or {})
        self._run.finish(exit_code=0 if results is not None else 1)


def begin(run: Any) -> tuple[ToWandb, str]:
    """The tracker of a `trackers.Run`, and its identifier.

    Raises:
        BadInput: nobody is logged in, and it is to be online.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # its lines would be between ours
    online = os.environ.get("WANDB_MODE", "online") == "online"
    if online and not wandb.login(prompt=False, verify=False):
        raise BadInput("config.writers: wandb has no login here: wandb login, or WANDB_MODE=offline before the command")
    identifier = run.identifier or uuid.uuid4().hex
    record = wandb.init(
        project=os.environ.get("WANDB_PROJECT", run.project),
        name=run.name,
        id=identifier,
        resume="allow",
        dir=None if "://" in str(run.workdir) else str(run.workdir),
        settings=wandb.Settings(silent=True, console="off", init_timeout=_START_S, finish_timeout=_END_S),
    )
    record.config.update(run.config, allow_val_change=True)
    return ToWandb(record, resumed=run.identifier is not None), identifier
