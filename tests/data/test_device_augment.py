"""What the device does to a batch is a function of seed and step, and the same on any number of devices."""

import dataclasses

import jax
import numpy as np
import pytest
from small_runs import assert_bit_equal

from dgkd_jax.data.device_augment import DeviceAugment
from dgkd_jax.runs import sharding

ALL = DeviceAugment(
    seed=1, num_classes=5, fill=(1, 2, 3), trivial_augment=True, random_erasing=0.5, mixup=0.2, cutmix=1.0
)
NOTHING = dataclasses.replace(ALL, trivial_augment=False, random_erasing=0.0, mixup=0.0, cutmix=0.0)
RANDOM = np.random.default_rng(0)
BATCH = {
    "image": RANDOM.integers(0, 256, (16, 12, 14, 3), np.uint8),
    "label": RANDOM.integers(0, 5, 16, np.int32),
    "teacher_logits": RANDOM.normal(size=(16, 5)).astype(np.float16),
}


@pytest.fixture(scope="module")
def augment():
    """All of it, compiled once."""
    return jax.jit(ALL)


def test_it_is_a_function_of_the_step(augment):
    found = augment(BATCH, 3)
    assert_bit_equal(found, augment(BATCH, 3))
    assert (np.asarray(found["image"]) != np.asarray(augment(BATCH, 4)["image"])).mean() > 0.1


def test_another_seed_makes_other_batches():
    one, other = (jax.jit(dataclasses.replace(NOTHING, random_erasing=1.0, seed=seed))(BATCH, 3) for seed in (1, 2))
    assert (np.asarray(one["image"]) != np.asarray(other["image"])).mean() > 0.1


def test_the_generator_is_fixed_whatever_jaxs_default_is():
    erasing = dataclasses.replace(NOTHING, random_erasing=1.0)
    expected = jax.jit(erasing)(BATCH, 3)
    with jax.default_prng_impl("rbg"):
        assert_bit_equal(jax.jit(lambda *given: erasing(*given))(BATCH, 3), expected)


def test_eight_devices_make_the_batch_of_one_bit_for_bit(augment):
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    spread = sharding.to_global(BATCH, mesh)
    assert_bit_equal(augment(spread, 3), augment(BATCH, 3))


def test_programs_with_and_without_it_fused_into_something_give_the_same_bits(augment):
    """As the one that stores a teacher's logits and the one that trains."""

    def more(batch):
        found = ALL(batch, 3)
        return found, (found["image"].astype(np.float32) / 255 - 0.3).sum()

    found, _ = jax.jit(more)(BATCH)
    assert_bit_equal(found, augment(BATCH, 3))


def test_with_nothing_on_the_batch_is_returned_as_it_is():
    assert NOTHING(BATCH, 3) is BATCH


@pytest.mark.parametrize(
    ("on", "label"),
    [
        ({"trivial_augment": True}, np.int32),
        ({"random_erasing": 1.0}, np.int32),
        ({"mixup": 0.5}, np.float32),
        ({"cutmix": 1.0}, np.float32),
    ],
)
def test_each_part_alone_changes_images_and_only_mixing_the_labels(on, label):
    found = jax.jit(dataclasses.replace(NOTHING, **on))(BATCH, 1)
    assert found.keys() == BATCH.keys()
    assert found["image"].dtype == np.uint8
    assert (np.asarray(found["image"]) != BATCH["image"]).any()
    assert found["label"].dtype == label
    assert_bit_equal(found["teacher_logits"], BATCH["teacher_logits"])
    if label == np.int32:
        np.testing.assert_array_equal(found["label"], BATCH["label"])
    else:
        assert found["label"].shape == (16, 5)
