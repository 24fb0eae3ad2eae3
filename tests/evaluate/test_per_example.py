"""What an evaluation leaves in a work directory."""

import json

import numpy as np
import pytest
from etils import epath

from dgkd_jax.evaluate import per_example

ROWS = {
    "label": np.array([0, 1, 2, 1], np.int32),
    "student_prediction": np.array([0, 1, 1, 0], np.int32),
    "student_confidence": np.array([0.5, 0.5, 0.5, 0.5], np.float32),
    "student_nll": np.array([0.25, 0.5, 1.0, 2.0], np.float32),
}
TAUGHT = {
    "teacher_prediction": np.array([0, 1, 2, 0], np.int32),
    "teacher_confidence": np.array([1.0, 1.0, 1.0, 1.0], np.float32),
    "teacher_nll": np.array([0.0, 0.0, 0.0, 4.0], np.float32),
    "logit_distance": np.array([1.0, 2.0, 3.0, 4.0], np.float32),
}


def test_the_figures_follow_from_the_rows():
    alone = per_example.summary(ROWS, data="clean", step=7)
    assert alone == {
        "data": "clean", "examples": 4, "checkpoint_step": 7,
        "student": {"accuracy": 0.5, "ce": 0.9375, "ece": 0.0},
        "teacher": None, "agreement": None, "logit_msd": None, "restricted_to_classes": None,
    }  # fmt: skip
    taught = per_example.summary(ROWS | TAUGHT, data="clean", step=7, classes=(0, 1, 2))
    assert taught == alone | {
        "teacher": {"accuracy": 0.75, "ce": 1.0, "ece": 0.25},
        "agreement": 0.75, "logit_msd": 7.5, "restricted_to_classes": 3,
    }  # fmt: skip


@pytest.mark.parametrize(("rows", "taught"), [(ROWS, False), (ROWS | TAUGHT, True)])
def test_an_evaluation_is_there_once_it_is_whole_and_of_this_step(tmp_path, rows, taught):
    folder = epath.Path(tmp_path) / "evaluations"
    assert not per_example.is_there(folder, step=7, taught=taught)
    per_example.write(folder, per_example.summary(rows, data="clean", step=7), rows)
    assert sorted(path.name for path in folder.iterdir()) == ["clean.json", "clean.npz"]
    assert per_example.is_there(folder, step=7, taught=taught)
    assert not per_example.is_there(folder, step=8, taught=taught)
    assert not per_example.is_there(folder, step=7, taught=not taught)
    with np.load(folder / "clean.npz") as arrays:
        assert arrays.keys() == rows.keys()
        for name, array in rows.items():
            np.testing.assert_array_equal(arrays[name], array)
    text = (folder / "clean.json").read_text()
    assert json.loads(text) == per_example.summary(rows, data="clean", step=7)
    (folder / "clean.json").write_text(text[:50])
    assert not per_example.is_there(folder, step=7, taught=taught)


def test_file_names_are_safe():
    assert per_example.file_name("tfds:cifar10_corrupted/fog_1:test") == "tfds_cifar10_corrupted_fog_1_test"
    assert per_example.file_name("gaussian_noise-3") == "gaussian_noise-3"
    assert epath.Path(per_example.file_name("image_folder:../a b/ü")).name == "image_folder_.._a_b_ü"
