"""A `tf.data.Dataset` as a source: its own order, each element once per epoch, continued by skipping."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from configs import default
from dgkd_jax.data.own_data import open_given
from dgkd_jax.errors import BadInput

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), np.uint8)
LABELS = np.arange(23) % 4
BATCH = 5


def data(**values):
    section = default.get_config().data
    section.update(values)
    return section


def elements(*, shuffled=False):
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS))
    return dataset.shuffle(23, seed=1, reshuffle_each_iteration=False) if shuffled else dataset


def opened(train=None, evaluate=None, **values):
    return open_given(train or elements(), evaluate or elements(), data(**values))


def taken(source, count, start=0):
    return list(itertools.islice(source.train_batches(seed=3, batch_size=BATCH, start_step=start), count))


@pytest.mark.parametrize("kind", ["pairs", "dictionaries", "batched", "of unknown length"])
def test_an_epoch_is_the_data_sets_own_order(kind):
    train = {
        "pairs": elements(),
        "dictionaries": elements().map(lambda image, label: {"image": image, "label": label}),
        "batched": elements().batch(7),
        "of unknown length": elements().filter(lambda image, label: label >= 0),
    }[kind]
    source = opened(train)
    assert (source.num_train, source.num_classes, source.image_shape) == (23, 4, (8, 8, 3))
    found = taken(source, 8)
    for first in (0, 4):
        images = np.concatenate([batch["image"] for batch in found[first : first + 4]])
        np.testing.assert_array_equal(images, IMAGES[:20])


@pytest.mark.parametrize("start", [2, 4, 6])
def test_a_run_that_goes_on_sees_the_same_batches(start, capsys):
    source = opened(elements(shuffled=True), augment="pad_crop_flip")
    for found, expected in zip(taken(source, 3, start), taken(source, start + 3)[start:], strict=True):
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
    assert ("again to go on" in capsys.readouterr().err) == (start != 4)


@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_holds_each_image_once(processes):
    source = opened()
    batches = [
        batch
        for process in range(processes)
        for batch in source.eval_batches(batch_size=4, process_index=process, process_count=processes)
    ]
    images = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(images, IMAGES)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (elements().repeat(), elements()), "train never ends: leave repeat"),
        (lambda: (elements(), None), "a tf.data.Dataset cannot be split: give evaluate="),
        (lambda: (elements(), (IMAGES, LABELS)), "evaluate is of type tuple, and the other split is a tf.data"),
        (lambda: (elements().take(0), elements()), "train holds no example"),
        (
            lambda: (elements().map(lambda image, label: (image / 255, label)), elements()),
            r"train\[0\]: images of float",
        ),
    ],
)
def test_data_sets_that_cannot_be_used_are_named(make, message):
    with pytest.raises(BadInput, match=message):
        open_given(*make(), data())
