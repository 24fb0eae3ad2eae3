"""The loop: where a run is interrupted does not show in what it leaves."""

import csv
import json
import os
import shutil
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_runs import Asked, a_teacher, assert_bit_equal, lines, small

from configs import mnist5k
from dgkd_jax.data.open import open_source
from dgkd_jax.errors import BadInput, NumericFailure, Preempted
from dgkd_jax.methods import from_config
from dgkd_jax.models.onednn import library as onednn
from dgkd_jax.runs import sharding
from dgkd_jax.runs import workdir as workdir_lib
from dgkd_jax.runs.record import History
from dgkd_jax.training import build, feed, loop
from dgkd_jax.training.monitor import timing
from dgkd_jax.training.step import metric_names

EPOCH = 4  # steps


def tiny(**changes):
    """Two epochs of four steps on generated images."""
    own = {
        "method": "ce",
        "data.mock_train_examples": 64,
        "data.mock_eval_examples": 21,
        "eval_batch_size": 7,
        "epochs": 2,
        "log_every": 3,
        "eval_every": 1.0,
    }
    return small(**own | changes)


class Interrupted(Exception):
    pass


class Stopping:
    """A source whose batches end with an exception after `steps` of them, as if the process had died there."""

    def __init__(self, source, steps):
        self._source, self._steps = source, steps

    def __getattr__(self, name):
        return getattr(self._source, name)

    def train_batches(self, **arguments):
        for index, batch in enumerate(self._source.train_batches(**arguments)):
            if index == self._steps:
                raise Interrupted
            yield batch


def fit(config, workdir, *, stop_after=None, teacher=None, mesh=None, source=None, **more):
    source = source or open_source(config.data)
    mesh = mesh or sharding.make_mesh()
    if config.method != "ce" and teacher is None:
        teacher = a_teacher(source, mesh)
    if stop_after is not None:
        source = Stopping(source, stop_after)
    return loop.fit(config, workdir=workdir, source=source, mesh=mesh, teacher=teacher, **more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, one_device):
    """Of DGKD with everything that carries state: momentum, BatchNorm, an average, a warm-up and a moving ε."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    trained = fit(carrying_state(), workdir, mesh=one_device)
    return trained, workdir


def carrying_state():
    return tiny(
        **{
            "method": "dgkd",
            "optimizer.ema_decay": 0.9,
            "dgkd.epsilon_schedule": "linear",
            "checkpoint_every": 1,
            "keep_checkpoints": 3,
        }
    )


# Batches run two ahead of the steps, so ending the batches after k interrupts about two steps earlier.
@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [4, 5, 7])
def test_an_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(tmp_path, uninterrupted, one_device, stop_after):
    expected, folder = uninterrupted
    with pytest.raises(Interrupted):
        fit(carrying_state(), tmp_path, stop_after=stop_after, mesh=one_device)
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert 0 < max(saved) < 2 * EPOCH
    found = fit(carrying_state(), tmp_path, mesh=one_device)
    assert_bit_equal(found.variables, expected.variables)
    assert lines(tmp_path) == lines(folder)
    assert (tmp_path / "log.csv").read_bytes() == (folder / "log.csv").read_bytes()
    assert found.history._replace(seconds=0) == expected.history._replace(seconds=0)


# A question follows each step and each batch of an evaluation, which has 3: 0–3 steps 1–4, 4–6 the first evaluation, …
@pytest.mark.slow
@pytest.mark.parametrize(("question", "saved"), [(0, 1), (2, 3), (4, 4), (6, 4), (8, 6), (10, 8), (13, 8)])
def test_a_run_that_is_told_to_stop_saves_there_and_ends_bit_equal(
    tmp_path, one_device, uninterrupted, question, saved
):
    expected, folder = uninterrupted
    with pytest.raises(Preempted, match=f"stopped after step {saved} of 8"):
        fit(carrying_state(), tmp_path, mesh=one_device, stop=Asked(question))
    assert (tmp_path / "checkpoints" / str(saved)).exists()
    found = fit(carrying_state(), tmp_path, mesh=one_device)
    assert_bit_equal(found.variables, expected.variables)
    assert lines(tmp_path) == lines(folder)
    assert (tmp_path / "log.csv").read_bytes() == (folder / "log.csv").read_bytes()
    assert found.history._replace(seconds=0) == expected.history._replace(seconds=0)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "optimizer"), [("kd", "dot"), ("dkd", "deepkd")])
def test_each_of_several_momenta_is_kept_over_an_interruption(tmp_path, one_device, method, optimizer):
    config = tiny(**{"method": method, "optimizer.name": optimizer, "epochs": 1, "checkpoint_every": 1})
    expected = fit(config, tmp_path / "whole", mesh=one_device)
    with pytest.raises(Preempted, match="stopped after step 2 of 4"):
        fit(config, tmp_path / "parts", mesh=one_device, stop=Asked(1))
    found = fit(config, tmp_path / "parts", mesh=one_device)
    assert_bit_equal(found.variables, expected.variables)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


@pytest.mark.slow
def test_the_best_so_far_and_the_time_spent_are_kept_over_an_interruption(tmp_path, one_device, monkeypatch):
    """The first evaluation, at step 4, is made the best; the first session is made to take 5000 seconds."""
    seen = []

    def score(self, evaluation):
        if not any(each is evaluation for each in seen):
            seen.append(evaluation)
        return -len(seen)

    monkeypatch.setattr(loop._Run, "_score", score)
    with monkeypatch.context() as first_session:
        first_session.setattr(loop, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 5000))
        with pytest.raises(Preempted, match="stopped after step 6 of 8"):
            fit(carrying_state(), tmp_path, mesh=one_device, stop=Asked(8))
    found = fit(carrying_state(), tmp_path, mesh=one_device)
    assert len(seen) == 2
    assert found.history.best_step == 4
    assert 5000 < found.history.seconds < 6000


def test_a_finished_run_is_read_not_repeated(uninterrupted, one_device):
    expected, workdir = uninterrupted
    again = fit(carrying_state(), workdir, stop_after=0, mesh=one_device)
    jax.tree.map(np.testing.assert_array_equal, again.variables, expected.variables)
    assert again.history == expected.history


def test_metrics_are_logged_every_log_every_steps_and_at_the_end(uninterrupted):
    _, workdir = uninterrupted
    found = lines(workdir)
    assert [line["step"] for line in found if line["kind"] == "train"] == [3, 6, 8]
    assert [line["step"] for line in found if line["kind"] == "eval"] == [4, 8]
    assert set(metric_names(from_config(carrying_state()))) <= set(found[0])
    assert all(np.isfinite(value) for value in found[0].values() if not isinstance(value, str))


@pytest.mark.slow
def test_metrics_leave_the_device_only_when_they_are_logged(tmp_path, monkeypatch):
    fetched = []
    compute = loop.metrics.compute
    monkeypatch.setattr(loop.metrics, "compute", lambda totals: fetched.append(1) or compute(totals))
    fit(tiny(log_every=4, eval_every=2.0), tmp_path)
    # Steps 4 and 8, the two epochs, and the one evaluation, which goes through the same function.
    assert len(fetched) == 5


def rows_of(workdir):
    with (workdir / "log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_rows_of_the_epoch_log_are_means_over_the_steps_of_the_epoch(tmp_path, one_device):
    """Against the lines of single steps; not moved by how often metrics are logged or evaluated."""
    each = tiny(method="dkd", log_every=1)
    fit(each, tmp_path / "each", mesh=one_device)
    fit(tiny(method="dkd", log_every=7, eval_every=2.0), tmp_path / "seldom", mesh=one_device)
    found, seldom = rows_of(tmp_path / "each"), rows_of(tmp_path / "seldom")
    logged = lines(tmp_path / "each")
    trained = [line for line in logged if line["kind"] == "train"]
    accuracies = [line["accuracy"] for line in logged if line["kind"] == "eval"]
    assert [row["epochs"] for row in found] == ["1", "2"]
    for epoch, row in enumerate(found):
        of_epoch = trained[epoch * EPOCH : (epoch + 1) * EPOCH]
        for column, name in {
            "train_loss": "loss", "avg_grad_similarity": "grad_similarity", "target_norm": "target_norm",
            "nontarget_norm": "nontarget_norm", "target_gradmag": "target_gradmag",
            "nontarget_gradmag": "nontarget_gradmag", "covariance": "covariance",
        }.items():  # fmt: skip
            expected = np.mean([line[name] for line in of_epoch])
            np.testing.assert_allclose(float(row[column]), expected, rtol=1e-6)  # float32 sums, nine digits
        np.testing.assert_allclose(float(row["train_acc"]), 100 * np.mean([line["accuracy"] for line in of_epoch]))
        np.testing.assert_allclose(float(row["test_acc"]), 100 * accuracies[epoch])
    assert [row.pop("test_acc") for row in seldom] == ["", found[1]["test_acc"]]
    assert seldom == [{name: value for name, value in row.items() if name != "test_acc"} for row in found]


@pytest.mark.slow
def test_evaluations_diagnose_unless_told_not_to(tmp_path, uninterrupted):
    _, workdir = uninterrupted
    names = {"ece", "kl", "agreement", "logit_msd", "nc1", "nc2_norms", "nc2_angles", "nc3", "nc4"}
    for line in (line for line in lines(workdir) if line["kind"] == "eval"):
        assert set(line) == {"step", "kind", "accuracy", "ce", "class_accuracy", *names}
        assert all(np.isfinite(line[name]) for name in names)
    trained = fit(tiny(epochs=1), tmp_path / "with")
    without = fit(tiny(epochs=1, diagnose=False), tmp_path / "without")
    jax.tree.map(np.testing.assert_array_equal, trained.variables, without.variables)
    (line,) = (line for line in lines(tmp_path / "without") if line["kind"] == "eval")
    assert set(line) == {"step", "kind", "accuracy", "ce"}


@pytest.mark.slow
def test_a_step_that_copies_from_the_host_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "ahead", lambda batches, mesh: iter(batches))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        fit(tiny(), tmp_path)


@pytest.mark.slow
def test_one_trace_per_run(tmp_path, monkeypatch):
    traces = []
    step = build.train_step

    def counted(*arguments, **keywords):
        traces.append(1)
        return step(*arguments, **keywords)

    monkeypatch.setattr(build, "train_step", counted)
    fit(tiny(), tmp_path)
    assert len(traces) == 1


@pytest.mark.slow
def test_training_on_eight_devices_follows_one_device(tmp_path, one_device):
    config = tiny(method="dgkd")
    one = fit(config, tmp_path / "one", mesh=one_device)
    eight = fit(config, tmp_path / "eight")
    for a, b in zip(jax.tree.leaves(one.variables), jax.tree.leaves(eight.variables), strict=True):
        # float32 sums in another order, amplified over eight steps at rate 0.1
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    assert one.history.last_accuracy == eight.history.last_accuracy


@pytest.mark.slow
def test_training_learns(tmp_path):
    """Generated classes differ, so a few steps beat chance by far."""
    trained = fit(tiny(epochs=10), tmp_path)
    assert trained.history.best_accuracy > 0.5


@pytest.mark.slow
def test_another_configuration_or_teacher_in_the_folder_is_refused(tmp_path):
    config = tiny(method="kd", epochs=1)
    source, mesh = open_source(config.data), sharding.make_mesh()
    fit(config, tmp_path)
    with pytest.raises(BadInput, match="holds a run with another configuration .kd.temperature=4.0 there, 2.0 here"):
        fit(tiny(**{"method": "kd", "epochs": 1, "kd.temperature": 2.0}), tmp_path)
    teacher = a_teacher(source, mesh).replace(fingerprint="00000000")
    with pytest.raises(BadInput, match="was trained with another teacher"):
        fit(config, tmp_path, teacher=teacher)


def test_a_batch_that_does_not_fit_the_devices_is_refused_with_one_that_does(tmp_path):
    with pytest.raises(BadInput, match=r"config.batch_size=12 must be a multiple .* 8: try --config.batch_size=16"):
        fit(tiny(batch_size=12), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_loss_that_stays_not_finite_ends_the_run_and_is_never_saved(tmp_path):
    with pytest.raises(
        NumericFailure, match=r"3 steps in a row, from step 2 on, .*student logits, CE in 16 of 16 .*1/0"
    ):
        fit(tiny(**{"optimizer.learning_rate": 1e30, "nonfinite_limit": 3, "eval_every": 2.0}), tmp_path)
    saved = [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved == []


class WithBadPixels:
    """A source of float images in which those of the examples `bad`, (step, row) counted from 0, are NaN."""

    def __init__(self, source, bad):
        self._source, self._bad = source, bad

    def __getattr__(self, name):
        return getattr(self._source, name)

    def train_batches(self, *, start_step, **arguments):
        for step, batch in enumerate(self._source.train_batches(start_step=start_step, **arguments), start_step):
            image = batch["image"].astype(np.float32) / 64 - 2
            for bad_step, row in self._bad:
                if bad_step == step:
                    image[row] = np.nan
            yield batch | {"image": image}


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_counted_and_leave_nothing(tmp_path, one_device):
    config = tiny(nonfinite_limit=3, log_every=1)
    bad = WithBadPixels(open_source(config.data), [(2, 5), (3, 0), (6, 1)])
    trained = fit(config, tmp_path, source=bad, mesh=one_device)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained.variables))
    training = [line for line in lines(tmp_path) if line["kind"] == "train"]
    assert [line["skipped_steps"] for line in training] == [0, 0, 1, 2, 2, 2, 3, 3]
    assert [line["loss"] is None for line in training] == [False, False, True, True, False, False, True, False]


@pytest.mark.slow
def test_too_many_bad_steps_in_a_row_name_step_part_and_example(tmp_path):
    config = tiny(nonfinite_limit=3, log_every=8, eval_every=2.0, method="dgkd")
    bad = WithBadPixels(open_source(config.data), [(step, row) for step in (3, 4, 5) for row in (5, 9)])
    with pytest.raises(
        NumericFailure, match=r"3 steps in a row, from step 4 on, .*\(teacher logits, .* of step 4: generated 3/"
    ) as failure:
        fit(config, tmp_path, source=bad)
    assert "NCKD" in str(failure.value)
    assert "coupling" in str(failure.value)


def test_a_run_in_use_is_refused(tmp_path):
    with workdir_lib.lock(tmp_path), pytest.raises(BadInput, match=f"in use by another job .process {os.getpid()} on"):
        fit(tiny(), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_another_configuration_is_refused_and_not_taken_for_damaged(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted[1], tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    config = carrying_state()
    config.update_from_flattened_dict({"student.model": "small_cnn_w24"})
    with pytest.raises(BadInput, match="student.model='small_cnn_w8' there, 'small_cnn_w24' here"):
        fit(config, tmp_path / "copy")
    assert not (tmp_path / "copy" / "damaged_checkpoints").exists()


def test_time_is_accounted_for_in_parts(uninterrupted):
    _, workdir = uninterrupted
    parsed = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    times = [line for line in parsed if line["kind"] == "goodput"]
    assert [line["step"] for line in times] == [0, 4, 8]
    assert set(times[1]) == set(times[2]) == {"step", "kind", *timing.PARTS}
    cost = set(times[0]) - set(times[1])  # of the compiled step, told once
    counted = set() if onednn.find() else {"step_gflops"}  # XLA counts nothing of what oneDNN computes
    assert cost == counted | {"temporary_mib", "arguments_mib", "output_mib", "donated_mib"}
    assert all(times[0][name] > 0 for name in cost)
    assert times[0]["donated_mib"] <= times[0]["output_mib"] < 1.5 * times[0]["donated_mib"]  # the state is donated
    assert all(line[part] >= 0 for line in times for part in timing.PARTS)


@pytest.mark.slow
def test_statistics_within_groups_differ_from_those_of_the_whole_batch(tmp_path):
    whole = fit(tiny(epochs=1), tmp_path / "whole")
    groups = fit(tiny(epochs=1, batch_norm_groups=4), tmp_path / "groups")
    assert not np.allclose(whole.variables["batch_stats"]["bn1"]["var"], groups.variables["batch_stats"]["bn1"]["var"])


@pytest.mark.slow
def test_bfloat16_compute_leaves_the_parameters_in_float32(tmp_path):
    half = fit(tiny(**{"student.dtype": "bfloat16", "epochs": 1}), tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.variables)} == {np.dtype(np.float32)}
    full = fit(tiny(epochs=1), tmp_path / "full")
    kernels = [trained.variables["params"]["conv1"]["kernel"] for trained in (half, full)]
    assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.1  # the knob does something, and not much


def test_resolved_configuration_is_left_as_json(uninterrupted):
    _, workdir = uninterrupted
    written = json.loads((workdir / "config.json").read_text())
    assert written["optimizer"]["ema_decay"] == 0.9
    assert set(written) == set(mnist5k.get_config().to_dict())
    about = json.loads((workdir / "student.json").read_text())
    assert (about["num_classes"], about["image_shape"], about["enable_x64"]) == (10, [16, 16, 1], False)
    assert list(workdir.glob("events.out.tfevents.*"))


def test_history_keeps_the_first_of_the_best():
    history = History()
    for step, accuracy in ((1, 0.5), (2, 0.7), (3, 0.7), (4, 0.6)):
        history = history.after(step=step, accuracy=accuracy, score=accuracy)
    assert history[:4] == (0.6, 0.7, 0.7, 2)


@pytest.mark.slow
def test_the_best_evaluation_is_that_of_the_metric_asked_for(tmp_path):
    trained = fit(tiny(best_metric="ce", epochs=3), tmp_path)
    evaluations = [line for line in lines(tmp_path) if line["kind"] == "eval"]
    best = min(evaluations, key=lambda line: line["ce"])
    assert (trained.history.best_step, trained.history.best_accuracy) == (best["step"], best["accuracy"])
