"""The command as a user gives it: mistakes in one line, and everything that a run leaves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from commands import in_a_folder_of_its_own, run  # noqa: F401
from ml_collections import ConfigDict

from dgkd_jax import models, torch_port
from dgkd_jax.methods import METHODS
from dgkd_jax.runs import launch
from dgkd_jax.torch_port import files as weight_files
from dgkd_jax.training.teacher import missing_weights

ROOT = Path(__file__).parents[1]


TINY = (
    "--config.data.mock=true",
    "--config.data.image_size=32",
    "--config.data.mock_train_examples=16",
    "--config.data.mock_eval_examples=9",
    "--config.batch_size=8",
    "--config.teacher.batch_size=8",
    "--config.eval_batch_size=8",
    "--config.epochs=1",
    "--config.compilation_cache=",
)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --config=FILE given; try: python -m dgkd_jax.main --config=configs/mnist5k.py"),
        (
            ["--config=configs/mnist5.py"],
            "--config=configs/mnist5.py: no such file; did you mean 'configs/mnist5k.py'?",
        ),
        (
            ["--config=configs/mnist5k.py", "--config.dkd.alhpa=2"],
            "config.dkd.alhpa: no such key; did you mean 'dkd.alpha'?",
        ),
        (["--config=configs/mnist5k.py", "--config.metod=kd"], "config.metod: no such key; did you mean 'method'?"),
        (
            ["--config=configs/mnist5k.py", "--wrokdir=x"],
            "Unknown command line flag 'wrokdir'. Did you mean: workdir ?",
        ),
        (
            ["--config=configs/mnist5k.py", "--config.epochs=many"],
            "config.epochs=many is not allowed: a whole number in [1, inf)",
        ),
        (
            ["--config=configs/mnist5k.py", "--config.data.mock=perhaps"],
            "config.data.mock=perhaps is not allowed: True or False",
        ),
        (
            ["--config=configs/mnist5k.py", "--config.method=dkg"],
            "config.method='dkg' is not allowed: 'all', or one or several of 'ce', 'kd', .*; did you mean 'dkd'?",
        ),
        (
            ["--config=configs/mnist5k.py", "--config.data.name=minst5k"],
            "config.data.name='minst5k' is not allowed: .* did you mean 'mnist5k'?",
        ),
        (
            ["--config=configs/mnist5k.py", "epochs=3"],
            "unexpected argument 'epochs=3'; overrides are written --config.KEY=",
        ),
        (
            ["--config=configs/cifar100.py:resnt56,resnet20"],
            "configs/cifar100.py:resnt56,resnet20: no network 'resnt56'; did you mean 'resnet56' or .*",
        ),
        (["--config=configs/imagenet.py:resnet50"], "configs/imagenet.py:resnet50: a pair is TEACHER,STUDENT, such as"),
        (
            [
                "--config=configs/mnist5k.py",
                "--config.data.mock=true",
                "--config.student.model=vit_tiny_patch16_224",
                "--config.method=ce",
            ],
            "model vit_tiny_patch16_224 cannot take the images of mnist5k, 28x28x1: .* config.data.image_size",
        ),
        (
            ["--config=configs/mnist5k.py", "--config.mesh.fsdp=3"],
            "config.mesh.fsdp=3 must divide the number of devices, 8",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), captured.err), captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.wrong_input
def test_a_configuration_that_is_broken_is_named_with_its_line(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from configs import default\n\ndef get_config():\n    return defualt.get_config()\n"
    )
    assert run("--config=mine.py") == 2
    error = capsys.readouterr().err
    assert re.search(r"mine\.py, line 4: NameError: name 'defualt' is not defined", error)
    assert "Traceback" not in error


def test_help_lists_the_configurations_and_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "configs/mnist5k.py" in shown
    assert "--config.dgkd.epsilon=0.1\n" in shown


@pytest.mark.slow
@pytest.mark.wrong_input
def test_without_imagenet_and_weights_one_message_says_what_to_do(tmp_path):
    """As a user starts it: a process of its own, exit code 2, no traceback, nothing left behind."""
    done = subprocess.run(
        [sys.executable, "-m", "dgkd_jax.main", "--config=configs/imagenet_r50_r18.py"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("dgkd_jax: ")
    for part in (
        "imagenet2012",
        str(tmp_path / "data"),
        "ILSVRC2012_img_train.tar",
        "python -m dgkd_jax.data.prepare imagenet2012",
        str(tmp_path / "weights" / "resnet50-0676ba61.pth"),
        "curl -fLo",
    ):
        assert part in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs"]


def test_weights_on_the_hub_are_not_looked_for_on_disk():
    teacher = ConfigDict({"model": "resnet50", "weights": "hf:timm/resnet50.tv_in1k"})
    assert missing_weights(teacher) is None
    teacher.weights = "timm/resnet50.tv_in1k"
    assert "resnet50, looked for at" in missing_weights(teacher)


def _teacher_file(path, *, name="small_cnn_w24", classes=10, broken=None):
    model = models.create(name, num_classes=classes)
    entries = torch_port.to_torch(models.initialise(model, (28, 28, 1), 0), model, name)
    if broken is not None:
        entries["bn3.weight"][7] = broken
    path.write_bytes(weight_files.encode(entries, {}, suffix=path.suffix))


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"broken": float("nan")}, "entry bn3.weight: 1 of 72 values are NaN or infinite"),
        ({"broken": float("-inf")}, "entry bn3.weight: 1 of 72 values are NaN or infinite"),
        ({"name": "small_cnn_w8"}, "are not those of small_cnn_w24: .* They fit small_cnn_w8 with 10 classes."),
        ({"classes": 100}, "fc.bias is (100,), not (10,), .* They fit small_cnn_w24 with 100 classes."),
    ],
)
def test_a_teacher_that_cannot_be_used_is_one_line_and_exit_code_2(settings, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "NAMES", ("small_cnn_w8", "small_cnn_w24"))  # tracing all of them takes seconds
    path = tmp_path / "teacher.safetensors"
    _teacher_file(path, **settings)
    arguments = ["--config=configs/mnist5k.py", "--config.data.mock=true", f"--config.teacher.weights={path}"]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dgkd_jax: config.teacher.weights={path}: ")
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), error), error
    assert error.count("\n") == 1


@pytest.mark.wrong_input
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_teachers_file_that_is_cut_off_is_one_line_and_exit_code_2(suffix, tmp_path, capsys):
    path = tmp_path / f"teacher{suffix}"
    _teacher_file(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert run("--config=configs/mnist5k.py", "--config.data.mock=true", f"--config.teacher.weights={path}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dgkd_jax: weights {path}: not a whole {suffix} file")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_cards_command_runs_on_generated_images(tmp_path, capsys):
    assert run("--config=configs/imagenet_r50_r18.py", *TINY) == 0
    captured = capsys.readouterr()
    assert "the teacher has random weights" in captured.err
    assert "mock data: the accuracies mean nothing" in captured.out
    workdir = tmp_path / "runs" / "imagenet-resnet50-resnet18-mock" / "dgkd-seed0"
    result = json.loads((workdir / "result.json").read_text())
    assert result["mock"] is True
    assert (result["teacher"]["model"], result["student"]["model"]) == ("resnet50", "resnet18")
    # torchvision's documented parameter counts
    assert (result["teacher"]["parameters"], result["student"]["parameters"]) == (25_557_032, 11_689_512)
    assert result["evaluation"] | {"note": ""} == {"split": "validation", "examples": 9, "note": ""}


def test_a_pair_without_a_published_recipe_says_once_whose_recipe_it_took(capsys):
    assert run("--config=configs/imagenet.py:resnet50,resnet8") == 2  # there is no ImageNet
    line = "configs/imagenet.py: no published recipe for resnet50,resnet8; takes that of resnet50,resnet18\n"
    assert capsys.readouterr().err.count(line) == 1


def test_a_note_is_printed_by_one_process_of_several(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    launch._print_note(ConfigDict({"note": "taken from there"}))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    launch._print_note(ConfigDict({"note": "taken from there"}))
    assert capsys.readouterr().err == "taken from there\n"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The demo's set, built once for this file."""
    return tmp_path_factory.mktemp("digits")


SHORT = (
    "--config=configs/mnist5k.py",
    "--config.epochs=1",
    "--config.teacher.epochs=1",
    "--config.compilation_cache=",
)


@pytest.mark.slow
def test_the_demo_leaves_everything_and_reuses_the_teacher(tmp_path, digits, capsys):
    arguments = (*SHORT, f"--config.data.dir={digits}")
    assert run(*arguments) == 0
    capsys.readouterr()
    teacher, workdir = (tmp_path / "runs" / "mnist5k" / name for name in ("teacher", "dgkd-seed0"))
    for folder in (teacher, workdir):
        assert (folder / "checkpoints").is_dir()
        assert (folder / "metrics.jsonl").is_file()
        assert (folder / "config.json").is_file()
        assert list(folder.glob("events.out.tfevents.*"))
    result = json.loads((workdir / "result.json").read_text())
    assert result["evaluation"]["examples"] == 1000
    assert 0.1 < result["student"]["last_accuracy"] <= result["student"]["best_accuracy"] <= 1
    assert result["teacher"]["last_accuracy"] > 0.5
    # The split serves to choose the best epoch, so no accuracy may be called a test accuracy.
    assert not [key for part in ("teacher", "student") for key in result[part] if "test" in key]

    before = {path: path.stat().st_mtime_ns for path in (teacher / "checkpoints").rglob("*")}
    few = ("ce", "dkd", "dgkd")
    assert run(*arguments, f"--config.method={','.join(few)}") == 0
    assert {path: path.stat().st_mtime_ns for path in (teacher / "checkpoints").rglob("*")} == before
    table = capsys.readouterr().out
    first_words = [line.split()[0] for line in table.splitlines() if line.split()]
    assert [word for word in first_words if word in ("teacher", *METHODS)] == ["teacher", *few]
    assert f"{100 * result['student']['last_accuracy']:.2f} %" in table


@pytest.mark.slow
def test_workdir_is_where_everything_goes(tmp_path, digits):
    assert run(*SHORT, f"--config.data.dir={digits}", "--config.method=ce", f"--workdir={tmp_path / 'here'}") == 0
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    assert result["teacher"] is None
    assert result["workdir"] == str(tmp_path / "here")
    assert not (tmp_path / "runs").exists()
