"""The export command: a student out of its work directory in PyTorch's names. No torch here."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import mnist5k
from dgkd_jax import models, torch_port
from dgkd_jax.data.open import open_source
from dgkd_jax.runs import checkpoint
from dgkd_jax.runs import config as rules
from dgkd_jax.runs.record import History, Record
from dgkd_jax.runs.student import read
from dgkd_jax.torch_port import export as torch_export
from dgkd_jax.torch_port import files as weight_files
from dgkd_jax.training import loop, state

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "method": "ce",
    "student.model": "small_cnn_w8",
    "teacher.model": "small_cnn_w8",
    "data.mock": True,
    "data.image_size": 16,
    "data.mock_train_examples": 32,
    "data.mock_eval_examples": 16,
    "batch_size": 16,
    "eval_batch_size": 16,
    "epochs": 2,  # of two steps
    "checkpoint_every": 1,
    "keep_checkpoints": 2,
    "optimizer.ema_decay": 0.5,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run that keeps an average, and its work directory."""
    config = mnist5k.get_config()
    config.update_from_flattened_dict(SETTINGS)
    rules.validate(config)
    workdir = tmp_path_factory.mktemp("run")
    source = open_source(config.data)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    return loop.fit(config, workdir=workdir, source=source, mesh=mesh), workdir


def command(capsys, *arguments):
    code = torch_export.main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def full_of(value, **changes):
    """A state of the run above, every number of which is `value`."""
    variables = models.shapes(models.create("small_cnn_w8", num_classes=10), (16, 16, 1))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    created = state.create(variables, optax.sgd(0.1), ema=True, metric_names=("loss",))
    filled = jax.tree.map(lambda leaf: jnp.full(leaf.shape, value, leaf.dtype), created)
    return filled.replace(**changes)


def record(accuracy=None, **history):
    """What a checkpoint holds besides the state."""
    whole = Record({}, {}, None, History(**history), {}, accuracy, evaluation_due=False)
    return whole.to_json()


def files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def metadata_of(path):
    """By hand: 8 bytes of length, then JSON; or the comment of the archive."""
    if path.suffix == ".npz":
        return json.loads(zipfile.ZipFile(path).comment)
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_the_exported_student_is_the_one_that_was_evaluated(run, tmp_path, capsys, suffix):
    trained, workdir = run
    before = files(workdir)
    output = tmp_path / f"student{suffix}"
    code, out, err = command(capsys, f"--workdir={workdir}", f"--output={output}")
    assert (code, err) == (0, "")
    assert out.startswith(f"{output}: small_cnn_w8 by ce at step 4 (accuracy {100 * trained.history.last_accuracy:.2f}")
    assert out.count("\n") == 1
    assert files(workdir) == before
    assert [path.name for path in tmp_path.iterdir()] == [output.name]

    arrays = torch_port.load(output)
    assert arrays["conv1.weight"].shape == (8, 1, 3, 3)  # OIHW
    assert arrays["bn1.num_batches_tracked"].dtype == np.int64
    model = models.create("small_cnn_w8", num_classes=10)
    variables = torch_port.from_torch(arrays, model, "small_cnn_w8")
    jax.tree.map(np.testing.assert_array_equal, variables, jax.device_get(trained.variables))

    metadata = metadata_of(output)
    assert (metadata["model"], metadata["step"], metadata["num_classes"]) == ("small_cnn_w8", "4", "10")
    assert float(metadata["accuracy"]) == pytest.approx(trained.history.last_accuracy, abs=1e-6)  # six decimals
    assert json.loads(metadata["image_shape"]) == [16, 16, 1]


def test_arrays_lie_aligned_and_without_gaps():
    """As the format asks: the data are covered once, and each array begins at a multiple of its own width."""
    arrays = {"odd": np.ones(3, np.float32), "count": np.array(5), "none": np.zeros((0, 2), np.float64)}
    for length in range(8):
        content = weight_files.encode(arrays, {"note": "x" * length}, suffix=".safetensors")
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        assert header.pop("__metadata__") == {"note": "x" * length}
        assert start % 8 == 0
        end = 0
        for fields in header.values():
            assert fields["data_offsets"][0] == end
            assert end % {"F32": 4, "I64": 8, "F64": 8}[fields["dtype"]] == 0
            end = fields["data_offsets"][1]
        assert start + end == len(content)


@pytest.mark.slow
def test_steps_are_chosen(run, tmp_path, capsys):
    trained, workdir = run
    steps = {"last": 4, "4": 4, "3": 3, "best": trained.history.best_step}
    exported = {}
    for step, expected in steps.items():
        output = tmp_path / f"{step}.safetensors"
        assert command(capsys, f"--workdir={workdir}", f"--output={output}", f"--step={step}")[0] == 0
        assert metadata_of(output)["step"] == str(expected)
        exported[step] = torch_port.load(output)["fc.weight"]
    assert not np.array_equal(exported["3"], exported["4"])
    assert metadata_of(tmp_path / "3.safetensors")["accuracy"] == "not evaluated at this step"
    best = float(metadata_of(tmp_path / "best.safetensors")["accuracy"])
    assert best == pytest.approx(trained.history.best_accuracy, abs=1e-6)


@pytest.mark.slow
def test_best_is_the_most_accurate_and_not_the_newest(run, tmp_path):
    for file in ("config.json", "student.json"):
        shutil.copy(run[1] / file, tmp_path)
    with checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        for step, accuracy in ((2, 0.9), (4, 0.5)):
            about = record(accuracy, last_accuracy=accuracy, best_accuracy=0.9, best_step=2)
            checkpoints.save(full_of(step), record=about, score=accuracy)
    for which, step, accuracy in (("best", 2, 0.9), ("last", 4, 0.5)):
        student = read(tmp_path, step=which)
        assert (student.step, student.accuracy) == (step, accuracy)
        assert {float(value) for leaf in jax.tree.leaves(student.variables) for value in leaf.ravel()} == {float(step)}


@pytest.mark.slow
def test_a_run_with_64_bits_is_read_without_the_flag(tmp_path, run):
    """As the teacher of a float64 student: its own configuration does not say so."""
    config = ConfigDict(json.loads((run[1] / "config.json").read_text()))
    (tmp_path / "config.json").write_text(config.to_json())
    about = json.loads((run[1] / "student.json").read_text())
    (tmp_path / "student.json").write_text(json.dumps(about | {"enable_x64": True}))
    with jax.enable_x64(True), checkpoint.Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        # A sum that float32 cannot hold: restored as such it would not be what was saved.
        loss = (jnp.asarray(1 + 2.0**-40), jnp.asarray(1))
        checkpoints.save(full_of(1, totals={"loss": loss}), record=record())
    assert read(tmp_path).step == 1


def test_a_damaged_newest_checkpoint_is_passed_over_and_left_where_it_is(run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(run[1], workdir)
    for path in (workdir / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[::-1])
    before = files(workdir)
    code, out, _ = command(capsys, f"--workdir={workdir}", f"--output={tmp_path / 's.npz'}")
    assert code == 0
    assert "at step 3 (not evaluated" in out
    assert files(workdir) == before


def test_a_save_in_progress_is_left_alone(run, tmp_path, capsys):
    """A run that goes on writes its next checkpoint under a temporary name."""
    workdir = tmp_path / "run"
    shutil.copytree(run[1], workdir)
    unfinished = workdir / "checkpoints" / "5.orbax-checkpoint-tmp-0"
    unfinished.mkdir()
    assert command(capsys, f"--workdir={workdir}", f"--output={tmp_path / 's.npz'}")[0] == 0
    assert unfinished.is_dir()


def test_a_mistake_is_one_line_and_exit_code_2(run, tmp_path, capsys):
    _, workdir = run
    (tmp_path / "there.npz").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    for file in ("config.json", "student.json"):
        shutil.copy(workdir / file, tmp_path / "young")
    shutil.copytree(tmp_path / "young", tmp_path / "broken")
    (tmp_path / "broken" / "student.json").write_text("{")
    shutil.copytree(tmp_path / "young", tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "vit"}')
    good = f"--output={tmp_path / 's.npz'}"
    for arguments, message in [
        ([], "--workdir, --output"),
        ([f"--workdir={tmp_path / 'absent'}", good], "no work directory of a run, config.json is not there"),
        ([f"--workdir={tmp_path / 'empty'}", good], "no work directory of a run"),
        ([f"--workdir={tmp_path / 'young'}", good], "no checkpoint yet"),
        ([f"--workdir={tmp_path / 'broken'}", good], "student.json is damaged"),
        ([f"--workdir={tmp_path / 'foreign'}", good], "its config.json is another program's"),
        ([f"--workdir={workdir}", good, "--step=1"], "no checkpoint of step 1 in"),
        ([f"--workdir={workdir}", good, "--step=worst"], "'worst' is neither a number of steps nor best nor last"),
        ([f"--workdir={workdir}", f"--output={tmp_path / 's.h5'}"], "must end in .safetensors or .npz"),
        ([f"--workdir={workdir}", f"--output={tmp_path / 'there.npz'}"], "exists already"),
        ([f"--workdir={workdir}", f"--output={tmp_path / 'no' / 's.npz'}"], "there is no folder"),
        ([f"--workdir={workdir}", good, "--ovrwrite"], "unrecognized arguments: --ovrwrite"),
    ]:
        code, out, err = command(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert message in err
    assert not (tmp_path / "s.npz").exists()
    assert (tmp_path / "there.npz").stat().st_size == 0
    assert command(capsys, f"--workdir={workdir}", f"--output={tmp_path / 'there.npz'}", "--overwrite")[0] == 0
    assert (tmp_path / "there.npz").stat().st_size > 0


@pytest.mark.wrong_input
def test_weights_that_are_not_finite_are_named_and_not_written(run, tmp_path, monkeypatch, capsys):
    student = read(run[1])
    statistics = student.variables["batch_stats"]["bn2"]
    monkeypatch.setitem(statistics, "var", np.where(np.arange(statistics["var"].size) == 5, np.nan, statistics["var"]))
    monkeypatch.setattr(torch_export, "read", lambda *_, **__: student)
    code, _, err = command(capsys, f"--workdir={run[1]}", f"--output={tmp_path / 's.npz'}")
    assert code == 2
    assert "the student of step 4 is unusable: bn2.running_var holds NaN or infinite values" in err
    assert err.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.wrong_input
def test_a_network_that_does_not_exist_is_said_with_the_nearest_names(run, tmp_path, capsys):
    for file in ("config.json", "student.json"):
        content = (run[1] / file).read_text().replace("small_cnn_w8", "small_cnn_w9")
        (tmp_path / file).write_text(content)
    shutil.copytree(run[1] / "checkpoints", tmp_path / "checkpoints")
    code, _, err = command(capsys, f"--workdir={tmp_path}", f"--output={tmp_path / 's.npz'}")
    assert code == 2
    assert "unknown model 'small_cnn_w9'; did you mean 'small_cnn_w8'" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_documented_command_needs_no_torch_and_prints_one_line(run, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    output = tmp_path / "student.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "dgkd_jax.torch_port", "export", f"--workdir={run[1]}", f"--output={output}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert output.is_file()
