"""Metrics to MLflow. Where to: its own variables, such as MLFLOW_TRACKING_URI=http://HOST:5000 or sqlite:///FILE."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

# Their lines would be between ours; a request that fails for good is told by us.
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

_AT_ONCE = 100  # parameters in one request, at most


class ToMlflow:
    """A `trackers.Tracker`."""

    def __init__(self, client: MlflowClient, identifier: str, *, resumed: bool):
        self.resumed = resumed
        self._client, self._identifier = client, identifier

    def write(self, step: int, scalars: dict[str, float]) -> None:
        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, float(value), now, step) for name, value in scalars.items()]
        self._client.log_batch(self._identifier, metrics=metrics)

    def close(self, results: dict[str, float] | None) -> None:
        for name, value in (results or {}).items():
            self._client.log_metric(self._identifier, name, value)
        self._client.set_terminated(self._identifier, "KILLED" if results is None else "FINISHED")


def begin(run: Any) -> tuple[ToMlflow, str]:
    """The tracker of a `trackers.Run`, and its identifier."""
    client = MlflowClient()
    with _few_retries():
        if run.identifier is not None:
            client.update_run(run.identifier, status="RUNNING")
            return ToMlflow(client, run.identifier, resumed=True), run.identifier
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)
        experiment = client.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment else client.create_experiment(title)
        identifier = client.create_run(number, run_name=run.name).info.run_id
        params = [Param(key, str(value)) for key, value in run.config.items()]
        for first in range(0, len(params), _AT_ONCE):
            client.log_batch(identifier, params=params[first : first + _AT_ONCE])
    return ToMlflow(client, identifier, resumed=False), identifier


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """At the start a user waits; each retry takes twice as long as the one before, by default minutes in all."""
    with contextlib.ExitStack() as stack:
        if (name := "MLFLOW_HTTP_REQUEST_MAX_RETRIES") not in os.environ:
            os.environ[name] = "2"
            stack.callback(os.environ.pop, name, None)
        yield
