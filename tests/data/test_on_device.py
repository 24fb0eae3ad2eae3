"""Batches from the device's memory are those of the pipeline, bit for bit."""

import functools

import jax
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from configs import default
from dgkd_jax.data import augment, on_device, philox, prepare
from dgkd_jax.data import open as data_lib
from dgkd_jax.data.open import BadInput, open_source
from dgkd_jax.runs import sharding

BATCH = 8
STEPS = 5  # of 8 in 43 images: three are left over, others in each epoch


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """Opens a folder of 43 training images of several sizes, in three files, so that their order matters."""
    root = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for split, count in (("train", 43), ("test", 4)):
        for number in range(count):
            path = root / split / f"class {number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = random.integers(0, 256, (24 + number % 3, 30 - number % 4, 3), np.uint8)
            path.write_bytes(tf.io.encode_png(image).numpy())

    def source(**values):
        data = default.get_config().data
        given = {"name": "image_folder", "dir": str(root / "tfds"), "manual_dir": str(root), "image_size": 24}
        data.update(given | values)
        return open_source(data)

    data = default.get_config().data
    data.update(name="image_folder", dir=str(root / "tfds"), manual_dir=str(root))
    prepare.find_builder(data).download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    return source


def taken(source, steps, *, seed=0, **process):
    """The batches of these steps, taken from the whole set."""
    examples = source.train_set()
    for step in steps:
        epoch, in_epoch = divmod(step, source.steps_per_epoch(BATCH))
        rows = source.epoch_rows(seed=seed, batch_size=BATCH, epoch=epoch, **process)
        cut = {name: array[in_epoch] for name, array in rows.items()}
        batch = jax.jit(on_device.batch)(examples, cut)
        of_rows = jax.jit(functools.partial(on_device.batch, image_shape=source.image_shape))
        as_rows = of_rows(on_device.as_rows(examples), cut)
        jax.tree.map(np.testing.assert_array_equal, batch, as_rows)
        yield batch


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "seed"),
    [
        ({"augment": "none"}, 0),
        ({"augment": "pad_crop"}, 3),
        ({"augment": "pad_crop_flip"}, 0),
        ({"augment": "pad_crop_flip", "readers": 4}, 2**31 - 1),
        ({"augment": "pad_crop", "label_noise": 0.5}, 1),
        ({"augment": "pad_crop_flip", "train_examples": 17, "readers": 2}, 2),
        ({"augment": "pad_crop_flip", "eval_resize": 32}, 5),
    ],
    ids=str,
)
def test_batches_are_those_of_the_pipeline(colours, values, seed):
    source = colours(**values)
    steps = source.steps_per_epoch(BATCH)
    assert source.on_device
    start = steps + 1  # in the middle of the second epoch
    streamed = source.train_batches(seed=seed, batch_size=BATCH, start_step=start)
    # Into the third epoch; and the first one's beginning.
    for found, expected in zip(taken(source, range(start, 3 * steps), seed=seed), streamed, strict=False):
        assert_same(found, expected)
    (found,) = taken(source, [0], seed=seed)
    assert_same(found, next(source.train_batches(seed=seed, batch_size=BATCH, start_step=0)))


def test_augmentation_moves_and_mirrors(colours):
    """So that the equality above is one of something."""
    sources = {name: colours(augment=name) for name in ("pad_crop", "pad_crop_flip")}
    arguments = {"seed": 0, "batch_size": BATCH}
    epochs = [sources["pad_crop_flip"].epoch_rows(**arguments, epoch=epoch) for epoch in range(5)]
    assert epochs[0]["index"].shape == (STEPS, BATCH)
    windows = np.stack([rows["window"] for rows in epochs])
    assert windows.shape == (5, STEPS, BATCH, 3)
    # 200 draws; that one of 7 places is missing has probability 7·(6/7)²⁰⁰ = 3e-13.
    assert set(windows[..., 0].flat) == set(windows[..., 1].flat) == set(range(7))  # 2 · 24 // 8 + 1
    assert set(windows[..., 2].flat) == {0, 1}
    assert not sources["pad_crop"].epoch_rows(**arguments, epoch=0)["window"][..., 2].any()


@pytest.mark.parametrize(("readers", "processes"), [(1, 2), (4, 2), (4, 4)])
def test_processes_share_the_rows(colours, readers, processes):
    source = colours(augment="pad_crop", readers=readers)
    arguments = {"seed": 4, "batch_size": BATCH, "epoch": 2}
    whole = source.epoch_rows(**arguments)
    parts = [source.epoch_rows(**arguments, process_index=p, process_count=processes) for p in range(processes)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts], axis=1), array)


def test_readers_that_do_not_divide_the_work_are_refused_as_by_the_pipeline(colours):
    for source, arguments in ((colours(readers=3), {}), (colours(readers=4), {"process_count": 8})):
        with pytest.raises(BadInput) as streamed:
            source.train_batches(seed=0, batch_size=BATCH, start_step=0, **arguments)
        with pytest.raises(BadInput) as found:
            source.epoch_rows(seed=0, batch_size=BATCH, epoch=0, **arguments)
        assert str(found.value) == str(streamed.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"augment": "random_resized_crop"}, False),
        ({"augment": "random_resized_crop_fast"}, False),
        ({"shuffle_buffer": 16}, False),
        ({"on_device_mib": 0}, False),
        ({"mock": True, "name": "cifar10"}, False),
    ],
)
def test_which_sets_go_to_the_device(colours, values, expected):
    assert colours(**values).on_device is expected


def test_a_set_over_the_limit_stays_with_the_host(colours, monkeypatch):
    bytes_ = 43 * 24 * 24 * 3
    monkeypatch.setattr(data_lib, "_MIB", bytes_)
    assert colours(on_device_mib=1).on_device
    monkeypatch.setattr(data_lib, "_MIB", bytes_ - 1)
    assert not colours(on_device_mib=1).on_device


def test_what_else_an_epoch_holds_becomes_part_of_the_batch():
    examples = {"image": np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2, 1), "label": np.array([7, 8, 9], np.int32)}
    logits = np.ones((2, 5), np.float16)
    found = jax.jit(on_device.batch)(examples, {"index": np.array([2, 0]), "teacher_logits": logits})
    assert_same(
        found, {"image": examples["image"][[2, 0]], "label": np.array([9, 7], np.int32), "teacher_logits": logits}
    )


@pytest.mark.parametrize(("size", "mirror"), [(8, True), (28, False), (32, True), (225, True)])
def test_windows_are_those_of_pad_crop_at_the_ends_of_the_range(size, mirror):
    almost_one = np.float32(1) - np.float32(2**-23)
    image = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    for uniforms in ((0, 0, 0), (almost_one, almost_one, almost_one), (0, almost_one, 0.5), (0.3, 0.7, 0.4999)):
        uniforms = np.array(uniforms, np.float32)
        window = on_device.windows(uniforms[None], size=size, mirror=mirror)
        rows = {"index": np.array([0]), "window": window}
        expected = augment.pad_crop(image, uniforms, size=size, mirror=mirror)
        for by_products in (False, True):
            made = jax.jit(functools.partial(on_device.batch, by_products=by_products))
            np.testing.assert_array_equal(made({"image": image[None]}, rows)["image"][0], expected)


def test_each_device_makes_its_rows_alone(colours):
    """Of eight devices each has the whole set; nothing is exchanged to make a batch."""
    source, mesh = colours(augment="pad_crop_flip"), sharding.make_mesh()
    examples = sharding.replicate(source.train_set(), mesh)
    rows = sharding.steps_to_global(source.epoch_rows(seed=0, batch_size=BATCH, epoch=0), mesh)
    cut = sharding.batch_sharding(mesh)

    def batch(examples, rows):
        return on_device.batch(examples, {name: array[1] for name, array in rows.items()}, sharding=cut)

    compiled = jax.jit(batch).lower(examples, rows).compile()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
    found = compiled(examples, rows)
    assert all(array.sharding.is_equivalent_to(cut, array.ndim) for array in found.values())
    assert_same(found, next(source.train_batches(seed=0, batch_size=BATCH, start_step=1)))


def test_undecodable_images_leave_the_set_with_the_host(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for number in range(count):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            encoded = tf.io.encode_jpeg(np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)).numpy()
            path.write_bytes(encoded[: len(encoded) // 2] if (split, number) == ("train", 2) else encoded)
    data = default.get_config().data
    data.update(
        name="image_folder", dir=str(tmp_path / "tfds"), manual_dir=str(tmp_path), image_size=32, max_bad_images=1
    )
    assert open_source(data).train_set() is None


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_uniforms_are_tensorflows(seed):
    places = np.concatenate([np.random.default_rng(seed).integers(0, 2**62, 40), [0, 1, 2**32 - 1, 2**32, 2**62]])
    expected = [tf.random.stateless_uniform([4], tf.constant([seed, place], tf.int64)).numpy() for place in places]
    found = philox.uniforms(seed, places)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(philox.uniforms(seed, places.reshape(5, 9)), found.reshape(5, 9, 4))
