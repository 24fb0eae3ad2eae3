"""`dgkd_jax.distill`: a user's own network, images, teacher and objective, with the whole of a run behind it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from own_networks import (
    CLASSES,
    NNX,
    SHAPE,
    Linen,
    Plain,
    half_squared_distance,
    images_and_labels,
    knows_the_patterns,
    linear,
    parameters,
)
from small_runs import assert_bit_equal

import dgkd_jax
from configs import default
from dgkd_jax.errors import BadInput, Preempted
from dgkd_jax.evaluate import __main__ as evaluate_command
from dgkd_jax.methods import DIST, KD, RLD
from dgkd_jax.runs import config as rules
from dgkd_jax.runs.student import read
from dgkd_jax.torch_port import export
from dgkd_jax.training import distill as door
from dgkd_jax.training.run import run

TRAIN, EVALUATE = images_and_labels(96), images_and_labels(40, seed=1)
RECIPE = {
    "train": TRAIN,
    "evaluate": EVALUATE,
    "method": "kd",
    "epochs": 3,
    "batch_size": 16,
    "optimizer": {"learning_rate": 0.02},
    "log_every": 5,
}


def distill(student, teacher=knows_the_patterns, **changes):
    return dgkd_jax.distill(student, teacher, **RECIPE | changes)


class Counting:
    """A teacher that counts the images that it was asked for."""

    def __init__(self):
        self.images = 0

    def __call__(self, images):
        assert images.dtype == np.uint8
        self.images += len(images)
        return knows_the_patterns(images)


@pytest.mark.slow
def test_the_student_learns_and_its_variables_come_back_in_its_own_form(tmp_path):
    found = distill(Plain(), workdir=tmp_path / "run", epochs=12)
    assert found.accuracy > 0.9
    assert found.workdir == str(tmp_path / "run")
    (mean, std) = (np.array(json.loads((tmp_path / "run/student.json").read_text())[key]) for key in ("mean", "std"))
    images = ((EVALUATE[0] / 255 - mean) / std).astype(np.float32)
    logits = Plain().apply(found.variables, images)
    assert np.mean(np.argmax(logits, -1) == EVALUATE[1]) == found.accuracy
    np.testing.assert_allclose(found.network(jnp.asarray(EVALUATE[0])), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", "nnx", "function"])
def test_an_interrupted_run_ends_with_the_same_parameters(tmp_path, monkeypatch, kind):
    student = {"linen": Linen(), "nnx": NNX(rngs=nnx.Rngs(0)), "function": (linear, parameters())}[kind]
    whole = distill(student, workdir=tmp_path / "whole")
    asked = iter(range(100))
    with monkeypatch.context() as context:
        context.setattr(door, "_interruption", lambda: _stopping(lambda: next(asked) > 27))
        with pytest.raises(Preempted):
            distill(student, workdir=tmp_path / "stopped")
    assert 0 < read(tmp_path / "stopped").step < 18
    resumed = distill(student, workdir=tmp_path / "stopped")
    assert_bit_equal(resumed.variables, whole.variables)


class _stopping:
    def __init__(self, stop):
        self._stop = stop

    def __enter__(self):
        return self._stop

    def __exit__(self, *_):
        pass


@pytest.mark.slow
def test_a_teacher_outside_jax_is_asked_once_for_every_image_that_is_trained_on(tmp_path):
    teacher = Counting()
    first = distill((linear, parameters()), teacher, workdir=tmp_path)
    trained_on = 3 * 96
    # Besides: 16 by which it is recognised, a batch that is looked at, its accuracy twice, the examples' rows.
    assert trained_on <= teacher.images <= trained_on + 16 + 4 * 40
    teacher.images = 0
    again = distill((linear, parameters()), teacher, workdir=tmp_path)
    assert teacher.images <= 16
    assert_bit_equal(again.variables, first.variables)


def a_teacher_of_the_patterns():
    """`linear`'s parameters that tell the classes apart, for pixels that are about normal."""
    patterns = np.random.default_rng(99).integers(0, 128, (CLASSES, *SHAPE)) + 64
    centres = ((patterns / 255 - 0.5) / 0.2).reshape(CLASSES, -1)
    return [0.05 * centres.T.astype(np.float32), {"bias": np.float32(-0.025 * (centres**2).sum(1))}]


@pytest.mark.slow
def test_a_teacher_outside_jax_teaches_as_the_same_one_in_jax(tmp_path):
    """With pixels normalised as the run does, to float32's rounding of the logits."""
    begin = a_teacher_of_the_patterns()
    inside = distill((linear, parameters()), (linear, begin), workdir=tmp_path / "inside")
    about = json.loads((tmp_path / "inside/student.json").read_text())

    def outside(images):
        normal = (images.astype(np.float32) / 255 - np.float32(about["mean"])) / np.float32(about["std"])
        return np.asarray(linear(begin, normal))

    found = distill((linear, parameters()), outside, workdir=tmp_path / "outside")
    for a, b in zip(jax.tree.leaves(found.variables), jax.tree.leaves(inside.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_function_is_the_whole_objective(tmp_path):
    """Half the squared distance is logit_mse's mean times half the classes, without cross-entropy."""
    own = distill((linear, parameters()), method=half_squared_distance, workdir=tmp_path / "own")
    known = distill(
        (linear, parameters()),
        method="logit_mse",
        logit_mse={"weight": CLASSES / 2, "ce_weight": 0.0},
        workdir=tmp_path / "known",
    )
    for a, b in zip(own.variables, known.variables, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


@pytest.mark.slow
def test_an_object_of_a_methods_shape_is_a_method(tmp_path):
    own = distill((linear, parameters()), method=KD(temperature=2.0), workdir=tmp_path / "own")
    known = distill((linear, parameters()), method="kd", kd={"temperature": 2.0}, workdir=tmp_path / "known")
    assert_bit_equal(own.variables, known.variables)


@pytest.mark.slow
def test_names_in_a_configuration_give_what_the_objects_give(tmp_path):
    objects = distill(Plain(), None, method="ce", workdir=tmp_path / "objects")
    config = rules_of(tmp_path)
    (result,) = run(config, str(tmp_path / "names"))
    assert result["student"]["last_accuracy"] == objects.accuracy
    by_name = read(tmp_path / "names").variables
    assert_bit_equal(by_name["params"], objects.variables["params"])


def rules_of(tmp_path):
    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "name": "names",
            "method": "ce",
            "student.model": "own_networks:Plain",
            "data.name": "own_networks:splits",
            "epochs": 3,
            "batch_size": 16,
            "optimizer.learning_rate": 0.02,
            "schedule.milestones": tuple(3 / 240 * epoch for epoch in (150, 180, 210)),
            "log_every": 5,
        }
    )
    rules.validate(config)
    return config


@pytest.mark.slow
def test_the_work_directory_can_be_evaluated_and_exported_without_the_code(tmp_path, capsys):
    found = distill(Linen(), workdir=tmp_path / "run")
    assert evaluate_command.main([f"--workdir={tmp_path}/run", "--data=clean"]) == 0
    summary = json.loads((tmp_path / "run/evaluations/clean.json").read_text())
    assert summary["student"]["accuracy"] == pytest.approx(found.accuracy)
    assert export.main(["export", f"--workdir={tmp_path}/run", f"--output={tmp_path}/student.npz"]) == 0
    with np.load(tmp_path / "student.npz") as file:
        np.testing.assert_array_equal(file["params/Dense_0/kernel"], found.variables["params"]["Dense_0"]["kernel"])
    capsys.readouterr()


@pytest.mark.slow
def test_a_finished_run_is_a_teacher(tmp_path):
    teacher = distill(Plain(), None, method="ce", workdir=tmp_path / "teacher")  # with the student's own recipe
    student = distill((linear, parameters()), str(tmp_path / "teacher"), workdir=tmp_path / "student")
    row = student.record["teacher"]
    assert row["weights"] == str(tmp_path / "teacher")
    assert row["last_accuracy"] == pytest.approx(teacher.accuracy)


def test_lengths_in_epochs_keep_their_share_of_the_recipe():
    settings = door._settings({"dkd": {"warmup_epochs": 5.0}}, epochs=24, method="dkd", folder="x")
    assert settings.schedule.milestones == pytest.approx((15, 18, 21))
    assert settings.rld.warmup_epochs == pytest.approx(2.0)
    assert settings.dkd.warmup_epochs == 5.0


@pytest.mark.slow
@pytest.mark.wrong_input
def test_a_run_that_has_not_ended_is_no_teacher(tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        asked = iter(range(100))
        context.setattr(door, "_interruption", lambda: _stopping(lambda: next(asked) > 9))
        with pytest.raises(Preempted):
            distill(Plain(), None, method="ce", workdir=tmp_path / "teacher")
    with pytest.raises(BadInput, match=r"teacher holds a run that has not ended; let it end first"):
        distill((linear, parameters()), str(tmp_path / "teacher"), workdir=tmp_path / "student")


CASES = {
    "no such key": ({"batchsize": 3}, "batchsize: no such key; did you mean 'batch_size'"),
    "a key of the method": (
        {"temperature": 3.0},
        r"temperature: no such key; did you mean \*\*{\"kd.temperature\": …}",
    ),
    "a value": ({"batch_size": "many"}, "batch_size='many' is not allowed: a whole number"),
    "not read": ({"dkd": {"beta": 3.0}}, "config.dkd.beta would change nothing"),
    "no teacher": ({"teacher": None}, "method kd needs a teacher"),
    "all": ({"method": "all"}, "method='all' is for the command"),
    "several": ({"method": "kd,dkd"}, "method='kd,dkd' is for the command"),
    "mixing": ({"method": RLD(), "data": {"mixup": 0.2}}, "give every image two labels, and method rld needs one"),
    "parts": ({"method": DIST(), "accumulate": 2}, "the loss of method dist needs the whole batch at once"),
    "groups": ({"batch_norm_groups": 2}, "config.batch_norm_groups=2 is for the networks of dgkd_jax.models.NAMES"),
    "teacher without variables": ({"teacher": Plain()}, r"holds no variables: give \(module, variables\)"),
    "teacher of another kind": ({"teacher": 3}, "the teacher is of type int; it must be"),
    "a folder that is none": (
        {"teacher": "runs/nothing"},
        "teacher='runs/nothing' is neither the folder of a finished",
    ),
    "probabilities": (
        {"teacher": lambda images: np.asarray(jax.nn.softmax(knows_the_patterns(images)))},
        "gives probabilities, each row sums to 1",
    ),
    "other classes": (
        {"teacher": lambda images: np.zeros((len(images), 4))},
        r"returns shape \(16, 4\) for 16 images of 3 classes",
    ),
    "a failing teacher": (
        {"teacher": lambda images: 1 / 0},
        "the teacher <lambda> fails on uint8 images of shape .*Zero",
    ),
    "no better than chance": ({"teacher": lambda images: np.zeros((len(images), 3))}, "is right on .* of 40 images"),
    "an objective of another shape": (
        {"method": lambda student, teacher, labels: jnp.mean(student)},
        r"returns an array of shape \(\) for a batch of 3; it must return one number for each",
    ),
    "a failing objective": (
        {"method": lambda student, teacher: student},
        "fails on .student_logits, teacher_logits, lab",
    ),
    "no method": ({"method": 3}, "method is of type int"),
    "an unknown method": ({"method": "dkdd"}, "config.method='dkdd' is not allowed"),
    "another student": ({"student": "resnet21"}, "config.student.model='resnet21' is not allowed"),
    "epochs": ({"epochs": 0}, "config.epochs=0 is not allowed"),
}


@pytest.mark.wrong_input
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_used_is_named_before_training(tmp_path, case):
    changes, message = CASES[case]
    with pytest.raises(BadInput, match=message):
        distill(**{"student": (linear, parameters()), "workdir": tmp_path / "run"} | changes)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
@pytest.mark.wrong_input
def test_a_method_of_other_values_is_not_continued(tmp_path):
    distill((linear, parameters()), method=KD(temperature=2.0), workdir=tmp_path, epochs=1)
    with pytest.raises(BadInput, match=r"holds a run with another configuration \(method='kd#"):
        distill((linear, parameters()), method=KD(temperature=3.0), workdir=tmp_path, epochs=1)


@pytest.mark.slow
@pytest.mark.wrong_input
def test_another_network_is_not_continued(tmp_path):
    distill((linear, parameters()), workdir=tmp_path, epochs=1)
    with pytest.raises(BadInput, match=r"holds a run with another configuration \(student.model='linear#"):
        distill((linear, parameters(1)), workdir=tmp_path, epochs=1)


@pytest.mark.slow
def test_the_callers_process_stays_as_it_was(tmp_path):
    before = (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision, jax.config.jax_compilation_cache_dir)
    distill((linear, parameters()), workdir=tmp_path, epochs=1, matmul_precision="highest")
    assert before == (
        jax.config.jax_enable_x64,
        jax.config.jax_default_matmul_precision,
        jax.config.jax_compilation_cache_dir,
    )
