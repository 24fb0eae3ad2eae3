"""Wrong command lines, as a user gives them: one line that says what, where and what to do, and exit code 2."""

import errno
import importlib
import json
import os
import re
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
from commands import ROOT, in_a_folder_of_its_own, run  # noqa: F401

from configs import mnist5k
from dgkd_jax import errors
from dgkd_jax.runs.config import of_teacher

MNIST = "--config=configs/mnist5k.py"
MOCK = "--config.data.mock=true"


def refused(arguments, capsys) -> str:
    """The one line of a command that ends with exit code 2 and nothing on stdout."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config():\n    return None\n", "get_config() returned NoneType; it has to return the configuration"),
        (
            "def get_confg():\n    return 1\n",
            "mine.py: no configuration, it defines no get_config(); see configs/mnist5k",
        ),
        ("def get_config(:\n    return 1\n", "mine.py, line 1: invalid syntax: def get_config(:"),
        (b"\x80\x81\xfe\x00", "mine.py: no Python file, it holds bytes that are no text"),
        ("", "mine.py: no configuration, it defines no get_config()"),
    ],
)
def test_a_file_that_is_no_configuration_is_named_with_the_reason(content, message, tmp_path, capsys):
    write = (tmp_path / "mine.py").write_bytes if isinstance(content, bytes) else (tmp_path / "mine.py").write_text
    write(content)
    assert message in refused(["--config=mine.py"], capsys)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs"], "--config=configs is a folder; name one of its files"),
        (["--config=configs/pairs.py"], "configs/pairs.py: no configuration, it defines no get_config()"),
        (["--config=configs/mnist5k.py:a,b"], "configs/mnist5k.py takes no argument; leave out :a,b"),
        (["--config=configs/mnist5.py"], "no such file; did you mean 'configs/mnist5k.py'?"),
        ([MNIST, "--epochs=3"], "unknown flag --epochs=3: it is a key, so write --config.epochs=3"),
        ([MNIST, "--config.epochs=1.5"], "config.epochs=1.5 is not allowed: a whole number in [1, inf)"),
        ([MNIST, "--config.temperature=0"], "config.temperature: no such key; did you mean 'dkd.temperature'?"),
        (
            [MNIST, "--config.method=kd", "--config.temperature=0"],
            "config.temperature: no such key; did you mean 'kd.temperature'?",
        ),
        (
            [MNIST, "--config.kd.temperature=2"],
            "config.kd.temperature would change nothing: method dgkd reads config.dkd.temperature. "
            "Or give --config.method=kd",
        ),
        ([MNIST, "--config.method=dkd", "--config.dgkd.epsilon=2"], "method dkd does not read it"),
        ([MNIST, "--config.method=ce,kd", "--config.dgkd.epsilon=2"], "method ce,kd does not read it"),
        (
            [MNIST, "--config.method=ce,kd", "--config.dkd.temperature=2"],
            "config.dkd.temperature would change nothing: method ce,kd reads config.kd.temperature",
        ),
        (
            [MNIST, "--config.optimizer.momentum_delta=0.05"],
            "config.optimizer.momentum_delta would change nothing: config.optimizer.name=sgd does not read it, dot",
        ),
        (
            [MNIST, "--config.method=ce", "--config.optimizer.name=dot"],
            "config.optimizer.name=dot needs a distillation loss, and method ce has none; take sgd",
        ),
        (
            [MNIST, "--config.optimizer.name=deepkd"],
            "config.optimizer.name=deepkd needs a method whose terms are nckd and tckd, such as dkd; method dgkd has",
        ),
        (
            [MNIST, "--config.optimizer.name=dot", "--config.optimizer.clip_norm=1.0"],
            "config.optimizer.name=dot goes with config.optimizer.nesterov=False and config.optimizer.clip_norm=0 only",
        ),
        (
            [MNIST, "--config.data.image_size=1"],
            "config.data.image_size=1 is not allowed: 0 or a whole number of pixels",
        ),
        ([MNIST, "--config.data.mixup=-0.1"], "config.data.mixup=-0.1 is not allowed: a number in [0, inf)"),
        ([MNIST, "--config.data.cutmix=nan"], "config.data.cutmix=nan is not allowed: a number in [0, inf)"),
        (
            [MNIST, "--config.data.random_erasing=1.5"],
            "config.data.random_erasing=1.5 is not allowed: a number in [0, 1]",
        ),
        ([MNIST, "--config.data.trivial_augment=wide"], "config.data.trivial_augment"),
        (
            [MNIST, "--config.data.mixup=0.2", "--config.method=rld"],
            "config.data.mixup and cutmix give every image two labels, and method rld needs one",
        ),
        (
            [MNIST, "--config.method=dgkd", "--config.dgkd.wrt=own_logits", "--config.dgkd.distance=kl"],
            "with config.dgkd.wrt=own_logits they have none in common; take config.dgkd.distance=mse",
        ),
        (
            [MNIST, "--config.data.cutmix=1", "--config.method=dgkd", "--config.dgkd.distance=cosine"],
            "only config.dgkd.distance=mse with config.dgkd.wrt=logits or own_logits takes two",
        ),
        (
            [MNIST, "--config.data.mixup=0.2", "--config.batch_size=1"],
            "config.batch_size=1 leaves config.data.mixup and cutmix no second image to mix with",
        ),
        (
            [MNIST, MOCK, "--config.teacher.weights=https://x.org/a.pth"],
            "download it first: curl -fLO https://x.org/a.pth",
        ),
        (
            [MNIST, MOCK, "--config.teacher.weights=configs"],
            "config.teacher.weights=configs is a folder; name a file in it",
        ),
        ([MNIST, MOCK, "--workdir=configs/mnist5k.py/run"], "--workdir=configs/mnist5k.py/run: cannot be made"),
        ([MNIST, MOCK, "--workdir=/proc/run"], "--workdir=/proc/run: cannot be made"),
        ([MNIST, MOCK, "--workdir=/sys/run"], "--workdir=/sys/run: cannot be made"),
        ([MNIST, MOCK, "--workdir=s3://bucket/run"], "--workdir=s3://bucket/run: cannot be"),
    ],
)
def test_a_wrong_argument_is_named_with_what_to_do(arguments, message, tmp_path, capsys):
    assert message in refused(arguments, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs"]  # nothing slow began, nothing is left


@pytest.mark.wrong_input
def test_a_name_that_is_near_nothing_is_given_no_suggestion(capsys):
    error = refused(["--config=configs/nosuch.py"], capsys)
    assert "did you mean" not in error
    assert "--help lists those there" in error


@pytest.mark.parametrize("spelling", [["--config", "configs/mnist5k.py"], ["-config", "configs/mnist5k.py"]])
def test_a_space_in_place_of_the_equals_sign_is_understood(spelling, capsys):
    assert "config.method='x'" in refused([*spelling, "--config.method=x"], capsys)


def test_a_whole_number_may_be_written_with_an_exponent(capsys):
    """Taken as 10, so that only the next mistake is told."""
    assert "config.method='x'" in refused([MNIST, "--config.epochs=1e1", "--config.method=x"], capsys)


def test_help_shows_defaults_meanings_and_ranges_and_those_of_one_section(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help", "dgkd")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"--config\.dgkd\.epsilon=0\.1\n +weight ε of G.*\(a number in", shown)
    assert "--config.kd." not in shown


def no_teacher_is_trained(tmp_path) -> bool:
    return not list(tmp_path.glob("runs/*/teacher"))


@pytest.mark.wrong_input
def test_a_student_that_cannot_take_the_images_is_refused_before_the_teacher_is_trained(tmp_path, capsys):
    error = refused([MNIST, MOCK, "--config.student.model=vit_small_patch16_224"], capsys)
    assert "model vit_small_patch16_224 cannot take the images of mnist5k, 28x28x1" in error
    assert no_teacher_is_trained(tmp_path)


@pytest.mark.wrong_input
def test_a_folder_of_another_run_is_refused_before_the_teacher_is_trained(tmp_path, capsys):
    """Also where only a later method of `all` would use it."""
    folder = tmp_path / "runs" / "mnist5k-mock" / "logit_mse-seed0"
    folder.mkdir(parents=True)
    other = mnist5k.get_config()
    other.method, other.data.mock, other.epochs = "logit_mse", True, 7
    (folder / "config.json").write_text(other.to_json())
    (folder / "student.json").write_text(json.dumps({}))
    error = refused([MNIST, MOCK, "--config.method=all"], capsys)
    assert "logit_mse-seed0 holds a run with another configuration (epochs=7 there, 40 here)" in error
    assert no_teacher_is_trained(tmp_path)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.seed": 1}, "(teacher.seed=0 there, 1 here)"),
        ({"teacher.batch_size": 64}, "(teacher.batch_size=128 there, 64 here)"),
        ({"teacher.optimizer.momentum": 0.5}, "(teacher.optimizer.momentum=0.9 there, 0.5 here)"),
        ({"teacher.epochs": 3, "dkd.beta": 2.0}, "(teacher.epochs=20 there, 3 here)"),  # of no meaning to a teacher
    ],
)
def test_a_teacher_that_was_trained_otherwise_is_refused_in_the_users_words_with_the_ways_out(
    changes, message, tmp_path, capsys
):
    folder = tmp_path / "runs" / "mnist5k-mock" / "teacher"
    folder.mkdir(parents=True)
    config = mnist5k.get_config()
    config.data.mock = True
    (folder / "config.json").write_text(of_teacher(config).to_json())
    (folder / "student.json").write_text(json.dumps({}))
    error = refused([MNIST, MOCK, *(f"--config.{key}={value}" for key, value in changes.items())], capsys)
    assert f"teacher holds a teacher that was trained with other settings {message}" in error
    assert "--config.teacher.workdir=DIR" in error
    assert "take it as it is: --config.teacher.workdir=runs/mnist5k-mock/teacher" in error


@pytest.mark.wrong_input
def test_a_disk_without_room_for_the_checkpoints_is_named_before_the_teacher_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=30_000))
    error = refused([MNIST, MOCK, "--workdir=here"], capsys)
    assert re.search(r"--workdir=here: the checkpoints need 0\.\d MB, and 0\.0 MB are free there", error)
    assert no_teacher_is_trained(tmp_path)


def commands_in_the_documents() -> list[str]:
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    return sorted({name for text in texts for name in re.findall(r"python -m (dgkd_jax\.[\w.]*\w)", text)})


def start(command: str) -> None:
    if command in ("dgkd_jax.main", "dgkd_jax.cache_teacher"):  # absl would refuse their flags a second time
        importlib.import_module(command).main(sys.argv)
    else:
        runpy.run_module(command, run_name="__main__")


@pytest.mark.parametrize("command", commands_in_the_documents())
def test_each_command_has_help_that_ends_with_an_example_of_it(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as stop:
        start(command)
    assert stop.value.code == 0
    assert re.search(rf"Example:\s+python -m {re.escape(command)} .*[\w/]", capsys.readouterr().out)


@pytest.mark.wrong_input
def test_a_place_without_permission_is_bad_input_and_named(capsys):
    """By an error as the system raises it: nothing is forbidden to the superuser, who may run this."""

    def work():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/locked/student.safetensors")

    assert errors.exit_code_of(work) == 2
    assert capsys.readouterr().err == (
        "dgkd_jax: /locked/student.safetensors: Permission denied. Give this user the right to it, or name another "
        "place\n"
    )
