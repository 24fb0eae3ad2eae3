"""Evaluation: every number is that of the whole split, on any number of devices, whatever the padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from neural_collapse import by_definition
from small_runs import Asked

from dgkd_jax import losses, models
from dgkd_jax.evaluate import collapse, evaluator
from dgkd_jax.evaluate.evaluator import EvaluationSet, Evaluator
from dgkd_jax.models.network import Network, normalize
from dgkd_jax.runs import sharding

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


def set_of(split, *, num_examples=EXAMPLES) -> EvaluationSet:
    return EvaluationSet("split", num_examples, lambda size: batches(split, size=size))


def evaluated(networks, split, mesh, *, size=BATCH, mean=MEAN, std=STD, **options):
    """In float64, so that nothing but a mistake tells device counts apart; `mean` and `std` are the teacher's."""
    (student, variables), (teacher, teacher_variables) = networks
    with jax.enable_x64(True):
        place = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float64))
        evaluate = Evaluator(mesh, batch_size=size)
        return evaluate(
            Network(student.apply, sharding.place(place(variables), mesh), MEAN, STD),
            set_of(split),
            teacher=Network(teacher.apply, sharding.place(place(teacher_variables), mesh), mean, std),
            **options,
        )


def metrics_of(*arguments, **options):
    return evaluated(*arguments, **options).metrics


@pytest.fixture(scope="module")
def on_one_device(networks, split, one_device):
    return metrics_of(networks, split, one_device, diagnose=True)


@pytest.mark.slow
def test_every_number_is_that_of_the_whole_split(networks, split, on_one_device):
    (student, variables), (teacher, teacher_variables) = networks
    images, labels = split
    with jax.enable_x64(True):
        inputs = normalize(jnp.asarray(images), mean=MEAN, std=STD)
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
    found = metrics_of(networks, split, one_device, diagnose=True, mean=(0.2,), std=(0.7,))
    with jax.enable_x64(True):
        images = jnp.asarray(split[0])
        logits = student.apply(variables, normalize(images, mean=MEAN, std=STD))
        teacher_logits = teacher.apply(teacher_variables, normalize(images, mean=(0.2,), std=(0.7,)))
        expected = np.mean(np.sum((logits - teacher_logits) ** 2, -1))
    np.testing.assert_allclose(found["logit_msd"], expected, rtol=1e-5)  # as above


@pytest.mark.slow
def test_eight_devices_and_other_batches_give_the_same_numbers(networks, split, on_one_device):
    for size in (BATCH, 8):
        eight = metrics_of(networks, split, sharding.make_mesh(fsdp=2), size=size, diagnose=True)
        for name in ("accuracy", "agreement", "nc4", "class_accuracy"):  # counts
            assert eight[name] == on_one_device[name]
        for name in DIAGNOSED - {"class_accuracy"}:
            np.testing.assert_allclose(eight[name], on_one_device[name], rtol=1e-5, err_msg=name)  # as above


def test_diagnosing_changes_neither_accuracy_nor_cross_entropy(networks, split, one_device, on_one_device):
    plain = metrics_of(networks, split, one_device)
    assert set(plain) == {"accuracy", "ce"}
    assert plain["accuracy"] == on_one_device["accuracy"]
    np.testing.assert_allclose(plain["ce"], on_one_device["ce"], rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"diagnose": True}, {"by_example": True}])
def test_a_split_that_is_not_counted_once_is_an_error(networks, split, options):
    (student, variables), _ = networks
    mesh = sharding.make_mesh()
    with jax.enable_x64(True):
        evaluate = Evaluator(mesh, batch_size=BATCH)
        network = Network(student.apply, sharding.place(variables, mesh), MEAN, STD)
        with pytest.raises(RuntimeError, match="counted 43 examples where the set has 44"):
            evaluate(network, set_of(split, num_examples=EXAMPLES + 1), **options)
        with pytest.raises(RuntimeError, match="counted 0 examples where the set has 43"):
            evaluate(network, EvaluationSet("empty", EXAMPLES, lambda size: iter(())), **options)


def test_an_example_that_is_there_twice_while_another_is_missing_is_an_error():
    """What processes with the same share would do: the number of examples is right."""
    examples = evaluator._Examples(4)
    for places in ([0, 1], [0, 3]):
        batch = {"label": np.zeros(2, np.int32), "features": np.zeros((2, 3), np.float32)}
        examples.add(batch | {"mask": np.ones(2, bool), "index": np.array(places)})
    with pytest.raises(RuntimeError, match="2 of 4 examples were not evaluated exactly once"):
        examples.rows()


@pytest.mark.slow
def test_class_accuracies_are_left_out_where_there_are_too_many(networks, split, monkeypatch):
    monkeypatch.setattr(evaluator, "MOST_CLASSES_LISTED", CLASSES - 1)
    assert set(metrics_of(networks, split, sharding.make_mesh(), diagnose=True)) == DIAGNOSED - {"class_accuracy"}


def test_metrics_are_the_same_with_and_without_rows(networks, split, one_device, on_one_device):
    plain = evaluated(networks, split, one_device, by_example=True)
    assert set(plain.metrics) == {"accuracy", "ce"}
    both = evaluated(networks, split, one_device, by_example=True, diagnose=True)
    for name, value in on_one_device.items():
        np.testing.assert_array_equal(both.metrics[name], value, err_msg=name)
    for name, array in plain.rows.items():
        np.testing.assert_array_equal(both.rows[name], array, err_msg=name)
    assert plain.metrics["accuracy"] == (plain.rows["student_prediction"] == split[1]).mean()
    assert evaluated(networks, split, one_device, diagnose=True).rows is None


def test_an_evaluation_ends_after_the_batch_at_which_it_is_told_to(networks, split, one_device):
    for question in (0, 2):
        stop = Asked(question)
        assert evaluated(networks, split, one_device, stop=stop) is None
        assert stop._left == -1  # it was not asked again
    assert evaluated(networks, split, one_device, stop=Asked(3)) is not None


@pytest.mark.slow
def test_the_first_batches_are_counted_by_themselves(networks, split, one_device):
    (student, variables), _ = networks
    network = Network(student.apply, sharding.place(variables, one_device), MEAN, STD)
    images, labels = split
    logits = np.asarray(network(jnp.asarray(images)))
    correct = np.cumsum(logits.argmax(-1) == labels)
    evaluate = Evaluator(one_device, batch_size=BATCH)
    for number, examples in ((1, BATCH), (2, 2 * BATCH), (3, EXAMPLES), (9, EXAMPLES)):
        assert evaluate.count(network, set_of(split), batches=number) == (correct[examples - 1], examples)


def test_embedding_is_that_of_the_singular_value_decomposition():
    features = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * [5, 3, 1, 1, 1, 1]
    centred = features - features.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    embedding = evaluator.principal_components(features)
    np.testing.assert_allclose(np.abs(embedding), np.abs(left * values)[:, :2], atol=1e-5)  # float32
    assert evaluator.principal_components(features[:, :1]).shape == (50, 2)
    assert not evaluator.principal_components(np.ones((3, 4), np.float32)).any()


def test_large_sets_keep_2000_features_spread_evenly():
    def apply(variables, images, features=False):
        logits = images.reshape(len(images), -1)[:, :2] * variables
        return (logits, logits) if features else logits

    def batches(size):
        assert size == 480
        for first in range(0, 4800, 480):
            index = np.arange(first, first + 480)
            images = np.stack([index // 256, index % 256], -1).astype(np.uint8).reshape(-1, 1, 2, 1)
            yield {"image": images, "label": (index % 2).astype(np.int32), "mask": index < 4500}

    evaluate = Evaluator(sharding.make_mesh(), batch_size=480)
    network = Network(apply, 255.0, (0.0,), (1.0,))
    rows = evaluate(network, EvaluationSet("large", 4500, batches), by_example=True).rows
    kept = np.arange(2000) * 4500 // 2000
    features = np.stack([kept // 256, kept % 256], -1)
    np.testing.assert_allclose(rows["embedding"], evaluator.principal_components(features), atol=0.01)  # of 256
    np.testing.assert_array_equal(rows["embedding_label"], kept % 2)
    with pytest.raises(RuntimeError, match="counted 4500 examples where the set has 4800"):
        evaluate(network, EvaluationSet("large", 4800, batches), by_example=True)


@pytest.mark.slow
def test_a_teacher_is_run_over_a_set_once_if_it_is_to_be_remembered(networks, split, one_device, monkeypatch):
    """A second evaluation gives the first one's numbers although the teacher's weights are gone meanwhile."""
    (student, variables), (teacher, teacher_variables) = networks
    learner = Network(student.apply, sharding.place(variables, one_device), MEAN, STD)
    placed = sharding.place(teacher_variables, one_device)
    taught_by = Network(teacher.apply, placed, MEAN, STD, fingerprint="one")
    gone = taught_by.with_variables(jax.tree.map(jnp.zeros_like, placed))

    def found(evaluate, beside, **options):
        evaluation = evaluate(learner, set_of(split), teacher=beside, diagnose=True, **options)
        return evaluation and evaluation.metrics["logit_msd"]

    evaluate = Evaluator(one_device, batch_size=BATCH, remembers_teacher=True)
    assert found(evaluate, gone, stop=lambda: True) is None  # a stopped evaluation is not remembered
    first = found(evaluate, taught_by)
    assert found(evaluate, gone) == first
    assert found(evaluate, gone.replace(fingerprint="another")) != pytest.approx(first)
    # Without remembering, student and teacher are one program, which may round otherwise.
    each_time = Evaluator(one_device, batch_size=BATCH)
    assert found(each_time, taught_by) == pytest.approx(first, rel=1e-5)
    assert found(each_time, gone) != pytest.approx(first)
    monkeypatch.setattr(evaluator, "MOST_REMEMBERED_BYTES", 4 * CLASSES * BATCH)  # one batch's
    evaluate = Evaluator(one_device, batch_size=BATCH, remembers_teacher=True)
    assert found(evaluate, taught_by) == first
    assert found(evaluate, gone) != pytest.approx(first)
