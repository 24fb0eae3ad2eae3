"""The folder for huggingface.co: its card says what the run's files say, and its weights load as the card says."""

import json
import re
import shlex
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
import student_runs
import yaml
from commands import in_a_folder_of_its_own  # noqa: F401
from huggingface_hub import ModelCard

from dgkd_jax.errors import BadInput
from dgkd_jax.export import __main__ as command
from dgkd_jax.export import card
from dgkd_jax.runs import config as rules
from dgkd_jax.runs.student import read

REAL = {"data.mock": False}


def export(workdir, *arguments):
    """The folder, after the command."""
    output = workdir.parent / "folder"
    assert command.main([f"--workdir={workdir}", "--format=huggingface", f"--output={output}", *arguments]) == 0
    return output


@pytest.mark.slow
def test_the_card_has_the_figures_of_the_run(tmp_path, capsys):
    student_runs.write(tmp_path / "run", "resnet8", (32, 32, 3), **REAL)
    folder = export(tmp_path / "run")
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert f"{folder}: resnet8 by dkd at step 200 (accuracy 62.50 % on mnist5k)" in capsys.readouterr().out
    text = (folder / "README.md").read_text()
    for row in (
        "| data set | mnist5k, 10 classes, 32x32x3 |",
        "| method | dkd |",
        "| teacher | resnet56, 81.25 % |",
        "| accuracy of these weights | 62.50 %, step 200 |",
        "| last accuracy | 62.50 % |",
        "| best accuracy | 75.00 % |",
        "| epochs | 2 |",
    ):
        assert row in text.splitlines()
    assert "1,000 images" in text

    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("dgkd_jax", "image-classification")
    assert [(result.metric_type, result.metric_value) for result in data.eval_results] == [("accuracy", 0.625)]
    assert yaml.safe_load(text.split("---")[1])["model-index"][0]["results"][0]["dataset"]["type"] == "mnist5k"


def test_an_unfinished_run_and_generated_images_are_said(tmp_path):
    student_runs.write(tmp_path / "run", "resnet8", (32, 32, 3), finished=False, method="ce")
    text = (export(tmp_path / "run") / "README.md").read_text()
    assert "| epochs | 2, not finished |" in text
    assert "| teacher | none |" in text
    assert "| best accuracy | 75.00 % |" in text
    assert "Trained on generated images: the accuracies mean nothing." in text
    assert "model-index" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "dkd", "dkd.alpha": 0.5, "kd.temperature": 9.0, **REAL},  # kd's key is not read by dkd
        {"method": "ce", "schedule.name": "step", "schedule.milestones": (1,), "data.mean": (0.5,), "data.std": (0.1,)},
        {"method": "dkd", "optimizer.name": "deepkd", "optimizer.momentum_tckd": 0.5, "data.train_examples": 7, **REAL},
        {"method": "kd", "teacher.weights": "a teacher's.pth", "teacher.mean": (0.1,), "teacher.std": (0.5,)},
    ],
)
def test_the_command_of_the_card_is_that_of_the_same_run(changes, tmp_path, monkeypatch):
    student_runs.write(tmp_path / "run", "resnet8", (32, 32, 3), **changes)
    student = read(tmp_path / "run")
    words = shlex.split(card.command(student.config))
    assert words[:3] == ["python", "-m", "dgkd_jax.main"]
    given = configuration_by(words[3:], monkeypatch)
    assert rules.identity(given) == rules.identity(student.config)
    assert given.name == student.config.name
    if changes["method"] != "ce":
        assert rules.identity(rules.of_teacher(given)) == rules.identity(rules.of_teacher(student.config))
        for key in ("model", "dtype", "weights", "mean", "std", "epochs", "learning_rate", "seed"):
            assert tuple(np.atleast_1d(given.teacher[key])) == tuple(np.atleast_1d(student.config.teacher[key]))


def configuration_by(arguments, monkeypatch):
    """The configuration that main makes of its arguments, in a clone."""
    made = []

    def not_run(config, *_, **__):
        made.append(config.copy_and_resolve_references())
        raise BadInput("not run")

    monkeypatch.setattr(commands.main_module, "run", not_run)
    Path("dgkd_jax").symlink_to(commands.ROOT / "dgkd_jax")
    assert commands.run(*arguments, "--config.compilation_cache=") == 2
    return made[0]


@pytest.mark.slow
def test_the_weights_load_as_the_card_says(tmp_path, monkeypatch):
    name, image_shape = "resnet8", (32, 32, 3)
    variables = student_runs.write(tmp_path / "run", name, image_shape)
    folder = export(tmp_path / "run")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    network = student_runs.network_of(name, variables)
    images = student_runs.images(2, image_shape)
    normalised = (images / 255.0 - np.float32(student_runs.MEAN)) / np.float32(student_runs.STD)
    names = {"images": normalised.astype(np.float32)}
    monkeypatch.chdir(folder)
    exec(code, names)
    expected = np.asarray(jax.jit(network.__call__)(images))
    np.testing.assert_allclose(names["logits"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("dgkd_jax/resnet8", 10)
    np.testing.assert_allclose(config["pretrained_cfg"]["mean"], student_runs.MEAN)
