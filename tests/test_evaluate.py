"""Evaluation: every number is that of the whole split, on any number of devices, whatever the padding."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_collapse import by_definition

from dgkd_jax import evaluate, losses, models, program, sharding, steps
from dgkd_jax.analysis import collapse
from dgkd_jax.writer import MetricWriter

SHAPE, CLASSES, EXAMPLES, BATCH = (16, 16, 1), 5, 43, 16
MEAN, STD = (0.4,), (0.3,)
DIAGNOSED = {"accuracy", "ce", "ece", "class_accuracy", "kl", "agreement", "logit_msd", *collapse.NAMES}


@pytest.fixture(scope="module")
def networks():
    student, teacher = (
        models.create(name, num_classes=CLASSES, dtype=jnp.float64) for name in ("small_cnn_w8", "small_cnn_w24")
    )
    return (student, models.initialise(student, SHAPE, 0)), (teacher, models.initialise(teacher, SHAPE, 1))


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)
    images = rng.integers(0, 256, (EXAMPLES, *SHAPE), np.uint8) // 2 + (20 * labels[:, None, None, None]).astype(
        np.uint8
    )
    return images, labels


def batches(split, *, size=BATCH):
    """Padded with images that would show if they were counted."""
    images, labels = split
    for start in range(0, EXAMPLES, size):
        count = min(size, EXAMPLES - start)
        image, label = np.full((size, *SHAPE), 255, np.uint8), np.full(size, CLASSES - 1, np.int32)
        image[:count], label[:count] = images[start : start + count], labels[start : start + count]
        yield {"image": image, "label": label, "mask": np.arange(size) < count}


def evaluated(networks, split, mesh, *, size=BATCH, pixels=(None, None), **options):
    """In float64, so that nothing but a mistake tells device counts apart."""
    (student, variables), (teacher, teacher_variables) = networks
    with jax.enable_x64(True):
        place = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float64))
        taught = program.Teacher(teacher.apply, sharding.place(place(teacher_variables), mesh), "", *pixels)
        evaluator = evaluate.Evaluator(student.apply, mesh=mesh, mean=MEAN, std=STD, teacher=taught, **options)
        return evaluator(sharding.place(place(variables), mesh), batches(split, size=size), num_examples=EXAMPLES)


@pytest.fixture(scope="module")
def on_one_device(networks, split, one_device):
    return evaluated(networks, split, one_device, diagnose=True)


def test_every_number_is_that_of_the_whole_split(networks, split, on_one_device):
    (student, variables), (teacher, teacher_variables) = networks
    images, labels = split
    with jax.enable_x64(True):
        inputs = steps.normalize(jnp.asarray(images), mean=MEAN, std=STD)
        logits, features = (np.asarray(a) for a in student.apply(variables, inputs, features=True))
        teacher_logits = np.asarray(teacher.apply(teacher_variables, inputs))
        expected = {
            "accuracy": np.mean(logits.argmax(-1) == labels),
            "ce": np.mean(losses.cross_entropy(logits, labels)),
            "kl": np.mean(losses.kd(logits, teacher_logits, temperature=1.0)),
            "agreement": np.mean(logits.argmax(-1) == teacher_logits.argmax(-1)),
            "logit_msd": np.mean(np.sum((logits - teacher_logits) ** 2, -1)),
        }
    expected |= by_definition(features, labels, logits.argmax(-1), models.classifier(variables))
    assert set(on_one_device) == DIAGNOSED
    for name, value in expected.items():
        # The images are normalised in float32, in another order than in the evaluation's own program.
        np.testing.assert_allclose(on_one_device[name], value, rtol=1e-5, err_msg=name)
    by_class = [np.mean(logits[labels == c].argmax(-1) == c) for c in range(CLASSES)]
    np.testing.assert_allclose(on_one_device["class_accuracy"], by_class, rtol=1e-15)


def test_a_teacher_is_compared_on_its_own_pixels(networks, split, one_device):
    (student, variables), (teacher, teacher_variables) = networks
    found = evaluated(networks, split, one_device, diagnose=True, pixels=((0.2,), (0.7,)))
    with jax.enable_x64(True):
        images = jnp.asarray(split[0])
        logits = student.apply(variables, steps.normalize(images, mean=MEAN, std=STD))
        teacher_logits = teacher.apply(teacher_variables, steps.normalize(images, mean=(0.2,), std=(0.7,)))
        expected = np.mean(np.sum((logits - teacher_logits) ** 2, -1))
    np.testing.assert_allclose(found["logit_msd"], expected, rtol=1e-5)  # as above


def test_eight_devices_and_other_batches_give_the_same_numbers(networks, split, on_one_device):
    for size in (BATCH, 8):
        eight = evaluated(networks, split, sharding.make_mesh(fsdp=2), size=size, diagnose=True)
        for name in ("accuracy", "agreement", "nc4", "class_accuracy"):  # counts
            assert eight[name] == on_one_device[name]
        for name in DIAGNOSED - {"class_accuracy"}:
            np.testing.assert_allclose(eight[name], on_one_device[name], rtol=1e-5, err_msg=name)  # as above


def test_diagnosing_changes_neither_accuracy_nor_cross_entropy(networks, split, one_device, on_one_device):
    plain = evaluated(networks, split, one_device)
    assert set(plain) == {"accuracy", "ce"}
    assert plain["accuracy"] == on_one_device["accuracy"]
    np.testing.assert_allclose(plain["ce"], on_one_device["ce"], rtol=1e-6)


@pytest.mark.parametrize("diagnose", [False, True])
def test_a_split_that_is_not_counted_once_is_an_error(networks, split, diagnose):
    (student, variables), _ = networks
    mesh = sharding.make_mesh()
    with jax.enable_x64(True):
        evaluator = evaluate.Evaluator(student.apply, mesh=mesh, mean=MEAN, std=STD, diagnose=diagnose)
        variables = sharding.place(variables, mesh)
        with pytest.raises(RuntimeError, match="counted 43 examples where the split has 44"):
            evaluator(variables, batches(split), num_examples=EXAMPLES + 1)
        with pytest.raises(RuntimeError, match="counted 0 examples where the split has 43"):
            evaluator(variables, [], num_examples=EXAMPLES)


def test_class_accuracies_are_left_out_where_there_are_too_many(networks, split, monkeypatch):
    monkeypatch.setattr(evaluate, "MOST_CLASSES_LISTED", CLASSES - 1)
    assert set(evaluated(networks, split, sharding.make_mesh(), diagnose=True)) == DIAGNOSED - {"class_accuracy"}


def test_lists_go_to_json_with_null_for_nan_and_not_to_tensorboard(tmp_path, monkeypatch):
    with MetricWriter(tmp_path, step=0) as out:
        scalars = []
        monkeypatch.setattr(out._tensorboard, "write_scalars", lambda step, values: scalars.append((step, values)))
        out.write(3, "eval", {"ece": 0.25, "class_accuracy": [0.5, float("nan")]})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "kind": "eval", "ece": 0.25, "class_accuracy": [0.5, None]}
    assert scalars == [(3, {"eval/ece": 0.25})]
