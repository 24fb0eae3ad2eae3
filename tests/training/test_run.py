"""A teacher brought from elsewhere, with its own classes and its own pixels, through the whole job."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import mnist5k, photographs
from dgkd_jax import models, torch_port
from dgkd_jax.errors import BadInput
from dgkd_jax.runs import config as rules
from dgkd_jax.training.run import run

CLASSES = 40
# Far from ImageNet's figures, so that another mean gives other predictions.
MEAN, STD = (0.9, 0.1, 0.5), (0.1, 0.2, 0.3)


@pytest.fixture
def brought(tmp_path):
    """configs/photographs.py with small networks; each image lies in the folder of the class the teacher takes it for.

    So the teacher's accuracy is 1 where classes, pixels and resizing are right.
    """
    model = models.create("small_cnn_w8", num_classes=CLASSES)
    variables = jax.tree.map(np.asarray, models.initialise(model, (32, 32, 3), 0))
    np.savez(tmp_path / "teacher.npz", **torch_port.to_torch(variables, model, "small_cnn_w8", image_shape=(32, 32, 3)))
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for number in range(16):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        image = coarse.resize((64, 48), Image.Resampling.NEAREST)
        view = np.asarray(image.resize((48, 36), Image.Resampling.BICUBIC))[2:34, 8:40]
        seen = ((view / 255 - MEAN) / STD).astype(np.float32)
        label = int(np.argmax(model.apply(variables, seen[None])))
        for split in ("train", "val"):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number}.png")
    (root / "classes.txt").write_text("".join(f"c{label}\n" for label in range(CLASSES)))
    config = photographs.get_config()
    config.update_from_flattened_dict(
        {
            "student.model": "small_cnn_w8",
            "teacher.model": "small_cnn_w8",
            "teacher.weights": str(tmp_path / "teacher.npz"),
            "teacher.mean": MEAN,
            "teacher.std": STD,
            "data.dir": str(tmp_path / "tfds"),
            "data.manual_dir": str(root),
            "data.image_size": 32,
            "data.eval_resize": 36,
            "batch_size": 8,
            "epochs": 2,
        }
    )
    rules.validate(config)
    return config


@pytest.mark.slow
def test_a_teacher_with_its_own_classes_and_pixels(brought, tmp_path, capsys):
    (result,) = run(brought, str(tmp_path / "run"))
    assert result["teacher"]["last_accuracy"] == 1.0
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert "val accuracy" not in capsys.readouterr().out
    student = json.loads((tmp_path / "run" / "student.json").read_text())
    assert (student["num_classes"], student["mean"]) == (CLASSES, [0.485, 0.456, 0.406])


@pytest.mark.slow
def test_a_teacher_that_sees_wrong_pixels_is_refused_before_the_first_step(brought, tmp_path, capsys):
    brought.teacher.mean = brought.teacher.std = ()
    with pytest.raises(BadInput, match=r"is right on \d of 16 images .* guessing is right on 0.*normalised otherwise"):
        run(brought, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert "pixel mean 0.485 0.456 0.406" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_begins_with_what_its_teacher_knows(brought, tmp_path, capsys):
    run(brought, str(tmp_path / "run"))
    first = capsys.readouterr().err.splitlines()[3]  # after the lines on building the data set
    assert "teacher.npz: 100.00 % of the first 16 images of validation; pixel mean 0.9 0.1 0.5, std" in first


def test_weights_with_more_classes_than_folders_point_to_classes_txt(brought, tmp_path):
    (tmp_path / "images" / "classes.txt").unlink()
    with pytest.raises(BadInput, match=r"only the number of classes differs \(\d+ here\): .*images/classes.txt"):
        run(brought, str(tmp_path / "run"))


def test_one_mean_for_three_channels_is_refused(brought, tmp_path):
    brought.teacher.mean = brought.teacher.std = (0.5,)
    with pytest.raises(BadInput, match=r"teacher.mean=\(0.5,\) is not allowed: one number for each of the 3 channels"):
        run(brought, str(tmp_path / "run"))


@pytest.mark.slow
def test_a_teacher_trained_here_is_trained_on_its_own_pixels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = mnist5k.get_config()
    config.update_from_flattened_dict(
        {
            "method": "kd",
            "student.model": "small_cnn_w8",
            "teacher.model": "small_cnn_w8",
            "teacher.mean": (0.5,),
            "teacher.std": (0.25,),
            "teacher.epochs": 1,
            "epochs": 1,
            "batch_size": 16,
            "data.mock": True,
            "data.image_size": 16,
            "data.mock_train_examples": 16,
            "data.mock_eval_examples": 8,
        }
    )
    run(config)
    seen = {
        run: json.loads((tmp_path / "runs" / "mnist5k-mock" / run / "student.json").read_text())["mean"]
        for run in ("teacher", "kd-seed0")
    }
    assert seen == {"teacher": [0.5], "kd-seed0": [0.1311]}
    recorded = json.loads((tmp_path / "runs" / "mnist5k-mock" / "teacher" / "config.json").read_text())
    assert recorded["data"]["mean"] == [0.5]
