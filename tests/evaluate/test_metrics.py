"""Sums and counts: exact whatever the batches are."""

import jax.numpy as jnp
import numpy as np

from dgkd_jax.evaluate import metrics


def test_accuracy_is_the_same_however_the_examples_are_batched():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(1000, 7)).astype(np.float32), rng.integers(0, 7, 1000)
    totals = {"accuracy": (jnp.int32(0), jnp.int32(0))}
    for start, stop in ((0, 1), (1, 337), (337, 1000)):
        batch = metrics.accuracy(jnp.asarray(logits[start:stop]), jnp.asarray(labels[start:stop]))
        totals = metrics.merge(totals, {"accuracy": batch})
    assert metrics.compute(totals) == {"accuracy": (logits.argmax(1) == labels).sum() / 1000}


def test_padding_is_neither_correct_nor_counted():
    logits, labels = jnp.eye(4), jnp.asarray([0, 1, 0, 3])
    correct, count = metrics.accuracy(logits, labels, jnp.asarray([True, False, True, False]))
    assert (int(correct), int(count)) == (1, 2)
    total, count = metrics.masked_mean(
        jnp.asarray([1.0, jnp.nan, 4.0, jnp.inf]), jnp.asarray([True, False, True, False])
    )
    assert (float(total), int(count)) == (5.0, 2)


def test_of_a_mixed_label_the_class_of_highest_weight_counts():
    labels = jnp.asarray([[0.7, 0.3, 0.0], [0.4, 0.0, 0.6], [0.0, 1.0, 0.0]])
    correct, count = metrics.accuracy(jnp.asarray([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), labels)
    assert (int(correct), int(count)) == (2, 3)


def test_counts_beyond_the_integers_of_float32_stay_exact():
    many = {"accuracy": (jnp.int32(2**24 + 1), jnp.int32(2**24 + 3))}
    one = {"accuracy": (jnp.int32(1), jnp.int32(1))}
    correct, count = metrics.merge(many, one)["accuracy"]
    assert (int(correct), int(count)) == (2**24 + 2, 2**24 + 4)


def test_nothing_counted_is_not_a_number():
    assert np.isnan(metrics.compute({"loss": (jnp.float32(0), jnp.int32(0))})["loss"])


def test_zeros_like_keeps_names_and_types():
    totals = {"accuracy": (jnp.int32(3), jnp.int32(4)), "loss": (jnp.float32(3), jnp.int32(4))}
    empty = metrics.zeros_like(totals)
    assert [leaf.dtype for pair in empty.values() for leaf in pair] == [jnp.int32, jnp.int32, jnp.float32, jnp.int32]
    assert all(int(leaf) == 0 for pair in empty.values() for leaf in pair)
