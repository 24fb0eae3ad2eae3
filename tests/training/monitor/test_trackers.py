"""Trackers get each metric once, in the same record after an interruption, and cannot stop a run."""

import json
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
from commands import in_a_folder_of_its_own, run  # noqa: F401
from etils import epath
from in_memory import InMemory, tiny
from small_runs import Asked

from dgkd_jax.errors import BadInput, Preempted, StorageFailure
from dgkd_jax.training import loop
from dgkd_jax.training.monitor import trackers
from dgkd_jax.training.monitor.metric_files import MetricWriter

ROOT = Path(__file__).parents[3]


class Fake:
    """A tracker that remembers."""

    def __init__(self, *, resumed=False):
        self.resumed, self.written, self.results = resumed, [], "not closed"

    def write(self, step, scalars):
        self.written.append((step, scalars))

    def close(self, results):
        self.results = results


def test_a_tracker_that_goes_on_does_not_get_again_what_was_written_before(tmp_path):
    with MetricWriter(tmp_path, step=0) as out:
        for step in (1, 2, 3):
            out.write(step, "train", {"loss": step})
        out.write(2, "eval", {"accuracy": 0.5})
    old, new = Fake(resumed=True), Fake()
    with MetricWriter(tmp_path, step=2, evaluation_due=True, trackers=[old, new]) as out:
        out.write(2, "eval", {"accuracy": 0.5})
        for step in (3, 4):
            out.write(step, "train", {"loss": step})
        out.ended({"last_accuracy": 0.5})
    assert old.written == [(4, {"train/loss": 4})]
    assert new.written == [(2, {"eval/accuracy": 0.5}), (3, {"train/loss": 3}), (4, {"train/loss": 4})]
    assert old.results == new.results == {"last_accuracy": 0.5}


def test_a_tracker_that_fails_is_told_once_and_metrics_go_on(tmp_path, capsys):
    class Broken(Fake):
        def write(self, step, scalars):
            raise ConnectionError("no route\nto host")

    with MetricWriter(tmp_path, step=0, trackers=[trackers.Background("wandb", Broken())]) as out:
        for step in range(5):
            out.write(step, "train", {"loss": 1.0})
    assert capsys.readouterr().err == (
        "wandb takes no more metrics (no route to host), and training goes on. metrics.jsonl has all of them\n"
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_tracker_that_hangs_holds_up_neither_training_nor_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.05)
    forever = threading.Event()

    class Hanging(Fake):
        def write(self, step, scalars):
            forever.wait()

    with MetricWriter(tmp_path, step=0, trackers=[trackers.Background("mlflow", Hanging())]) as out:
        out.write(1, "train", {"loss": 1.0})
    assert "mlflow did not take everything within 0.05 seconds of the run's end" in capsys.readouterr().err
    forever.set()


@pytest.fixture
def server(monkeypatch):
    """A stand-in for wandb's module, with the records that it keeps by their identifiers."""
    records, begun = {}, []

    class Record(Fake):
        def __init__(self, run):
            super().__init__(resumed=run.identifier is not None)
            self.lines = records.setdefault(run.identifier or "one", [])

        def write(self, step, scalars):
            self.lines.append((step, scalars))

        def close(self, results):
            self.lines.append(("closed", results))

    def begin(run):
        begun.append(run)
        return Record(run), run.identifier or "one"

    monkeypatch.setitem(sys.modules, "dgkd_jax.training.monitor.to_wandb", types.SimpleNamespace(begin=begin))
    return records, begun


@pytest.mark.slow
def test_an_interrupted_run_is_one_record_with_each_metric_once_and_its_results(tmp_path, one_device, server):
    config = tiny(method="ce", diagnose=False, writers=("wandb",), log_every=2, checkpoint_every=0)

    def fit(**more):
        return loop.fit(
            config, workdir=epath.Path(tmp_path / "ce-seed0"), source=InMemory(config, on_device=False),
            mesh=one_device, **more,
        )  # fmt: skip

    records, begun = server
    with pytest.raises(Preempted):
        fit(stop=Asked(6))
    assert records["one"][-1] == ("closed", None)
    trained = fit()
    assert list(records) == ["one"]
    first, second = begun
    assert (first.project, first.name, first.identifier) == ("mnist5k", "ce-seed0", None)
    assert second.identifier == "one"
    assert first.config["optimizer.learning_rate"] == config.optimizer.learning_rate
    lines = [line for line in records["one"] if line[0] != "closed"]
    seen = [(step, name) for step, scalars in lines for name in scalars if name in ("train/loss", "eval/accuracy")]
    assert sorted(seen) == sorted(
        [*((step, "train/loss") for step in (2, 4, 6, 8, 10, 12)), (8, "eval/accuracy"), (12, "eval/accuracy")]
    )
    history = trained.history
    assert records["one"][-1] == (
        "closed",
        {
            "last_accuracy": history.last_accuracy,
            "best_accuracy": history.best_accuracy,
            "best_step": history.best_step,
        },
    )


def test_a_tracker_that_cannot_begin_ends_the_run_with_one_line(tmp_path, monkeypatch):
    def begin(run):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "dgkd_jax.training.monitor.to_mlflow", types.SimpleNamespace(begin=begin))
    with pytest.raises(StorageFailure, match="config.writers: mlflow cannot begin: no route to host. Mend that"):
        trackers.begin(("mlflow",), epath.Path(tmp_path), project="p", config={})


@pytest.mark.wrong_input
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_one_line_with_the_command_before_anything_begins(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers._KINDS, name, trackers._KINDS[name]._replace(package="not_installed"))
    assert run("--config=configs/mnist5k.py", "--config.data.mock=true", f"--config.writers=('{name}',)") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dgkd_jax: config.writers: {name} needs the package not_installed")
    assert f"pip install -e '.[{'tfds' if name == 'tensorboard' else name}]'" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_without_tensorboard_nothing_of_tensorflow_is_imported(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    program = f"""
import sys
for name in ("clu", "tensorflow", "tensorboard", "wandb", "mlflow"):
    sys.modules[name] = None
from etils import epath
from dgkd_jax.training.monitor import recorder, trackers
from dgkd_jax.training.monitor.metric_files import MetricWriter
folder = epath.Path({str(folder)!r})
with MetricWriter(folder, step=0, trackers=trackers.begin((), folder, project="p", config={{}})) as out:
    out.write(1, "train", {{"loss": 1.0}})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def two_sittings(folder, name):
    """Metrics of steps 1 and 2, an interruption after the checkpoint of step 1, steps 2 and 3; then the end."""
    for start, steps in ((0, (1, 2)), (1, (2, 3))):
        found = trackers.begin((name,), folder, project="digits", config={"epochs": 3, "schedule.milestones": (1, 2)})
        with MetricWriter(folder, step=start, trackers=found) as out:
            for step in steps:
                out.write(step, "train", {"loss": 1 / step})
            if start:
                out.ended({"last_accuracy": 0.5})
    return json.loads((folder / "trackers.json").read_text())[name]


@pytest.mark.slow
def test_wandb_offline_keeps_one_record(tmp_path, monkeypatch, capfd):
    """Needs the package; the stand-in above is tested without it."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    identifier = two_sittings(epath.Path(tmp_path), "wandb")
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""
    left = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert left
    assert all(path.name.endswith(identifier) for path in left)


@pytest.mark.wrong_input
def test_wandb_without_a_login_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(BadInput, match="wandb has no login here: wandb login, or WANDB_MODE=offline"):
        trackers.begin(("wandb",), epath.Path(tmp_path), project="digits", config={})


@pytest.mark.slow
def test_mlflow_keeps_one_record_in_a_database(tmp_path, monkeypatch, capfd):
    """Needs the package; the stand-in above is tested without it."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    identifier = two_sittings(epath.Path(tmp_path), "mlflow")
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""
    client = mlflow.MlflowClient()
    found = client.get_run(identifier)
    assert (found.info.run_name, found.info.status) == (tmp_path.name, "FINISHED")
    assert found.data.params == {"epochs": "3", "schedule.milestones": "(1, 2)"}
    history = [(metric.step, metric.value) for metric in client.get_metric_history(identifier, "train/loss")]
    assert history == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert found.data.metrics["last_accuracy"] == 0.5
    assert len(client.search_runs([found.info.experiment_id])) == 1
