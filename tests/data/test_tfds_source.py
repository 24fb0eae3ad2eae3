"""Batches are a pure function of (seed, step), the same over any number of processes; evaluation sees all once."""

import dataclasses
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from batches import take

from configs import default
from dgkd_jax.data import open as data_lib
from dgkd_jax.data import order, prepare
from dgkd_jax.data.open import open_source
from dgkd_jax.errors import BadInput


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Opens mnist5k, whose training split lies in several files so that their order matters."""
    folder = str(tmp_path_factory.mktemp("tfds"))

    def source(**values):
        data = default.get_config().data
        data.update(name="mnist5k", dir=folder, **values)
        return open_source(data)

    data = default.get_config().data
    data.update(name="mnist5k", dir=folder)
    config = tfds.download.DownloadConfig(num_shards=5)
    prepare.find_builder(data).download_and_prepare(download_config=config)
    return source


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Opens a folder of 21 training and 23 evaluation images; the mean of each tells which it is."""
    root = tmp_path_factory.mktemp("photos")
    for split, count, encode in (("train", 21, tf.io.encode_jpeg), ("test", 23, tf.io.encode_png)):
        for number in range(count):
            folder = root / split / f"class {number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            image = np.full((40 + number % 3, 48 - number % 5, 3), 10 * number, np.uint8)
            image[::2] = (10 * number + 20) % 256
            (folder / f"{number}.png").write_bytes(encode(image).numpy())

    def source(**values):
        data = default.get_config().data
        data.update(name="image_folder", dir=str(root / "tfds"), manual_dir=str(root), image_size=32, **values)
        return open_source(data)

    return source


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            np.testing.assert_array_equal(value, other[key])


def contents(batch):
    return [image.tobytes() for image in batch["image"]]


HELD_OR_STREAMED = pytest.mark.parametrize("shuffle_buffer", [0, 300], ids=["held", "streamed"])


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@HELD_OR_STREAMED
@pytest.mark.parametrize("readers", [1, 4])
def test_started_at_a_step_it_yields_what_it_yields_when_it_comes_there(digits, shuffle_buffer, readers):
    source = digits(augment="pad_crop", shuffle_buffer=shuffle_buffer, readers=readers)
    through = take(source, 8, batch_size=1200)  # 3 steps per epoch
    for start in (1, 3, 7):  # within, at the end of and beyond the first epoch
        assert_same(take(source, 8 - start, batch_size=1200, start_step=start), through[start:])


@HELD_OR_STREAMED
@pytest.mark.parametrize("augment", ["none", "pad_crop_flip", "random_resized_crop", "random_resized_crop_fast"])
def test_photos_started_at_a_step(photos, shuffle_buffer, augment):
    source = photos(augment=augment, shuffle_buffer=shuffle_buffer)
    through = take(source, 12, batch_size=4)  # 5 steps per epoch
    for batch in through:
        assert batch["image"].shape == (4, 32, 32, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
    for start in (3, 5, 11):
        assert_same(take(source, 12 - start, batch_size=4, start_step=start), through[start:])


def test_fast_crops_are_other_pixels_of_the_same_examples(photos):
    (exact,), (fast,) = (take(photos(augment=f"random_resized_crop{kind}"), 1, batch_size=20) for kind in ("", "_fast"))
    np.testing.assert_array_equal(fast["label"], exact["label"])
    assert (fast["image"] != exact["image"]).any()
    # Stripes of 20 grey levels, weighted otherwise; another window of another image would differ by up to 200.
    assert np.abs(fast["image"].astype(int) - exact["image"]).max() <= 20


@pytest.mark.slow
@HELD_OR_STREAMED
def test_seed_and_epoch_each_give_another_order(digits, shuffle_buffer):
    source = digits(shuffle_buffer=shuffle_buffer)
    first_epoch = take(source, 10, batch_size=400)
    orders = [
        [content for batch in batches for content in contents(batch)]
        for batches in (
            first_epoch,
            take(source, 10, batch_size=400, start_step=10),
            take(source, 10, batch_size=400, seed=1),
        )
    ]
    assert_same(take(source, 10, batch_size=400), first_epoch)
    for k, one in enumerate(orders):
        for other in orders[:k]:
            assert Counter(one) == Counter(other)  # 4000 = 10 · 400: the same images
            # A random order repeats a place with probability 1/4000: once on average, never 20 times.
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 20


def test_augmentation_differs_by_seed_epoch_and_position(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for name in ("train/a/1", "train/a/2", "train/b/1", "train/b/2", "test/a/1"):  # copies of one image
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(pixels).numpy())
    data = default.get_config().data
    data.update(name="image_folder", dir=str(tmp_path), manual_dir=str(tmp_path), image_size=32)
    data.augment = "random_resized_crop"
    source = open_source(data)
    batches = take(source, 5, batch_size=4) + take(source, 5, batch_size=4, seed=1)  # 1 step per epoch
    assert len({content for batch in batches for content in contents(batch)}) == 40


@HELD_OR_STREAMED
@pytest.mark.parametrize("readers", [1, 3])
def test_an_epoch_has_each_example_at_most_once(digits, shuffle_buffer, readers):
    source = digits(shuffle_buffer=shuffle_buffer, readers=readers)
    assert source.steps_per_epoch(300) == 13
    dropped = set()
    for epoch in range(2):
        seen = Counter(
            content for batch in take(source, 13, batch_size=300, start_step=13 * epoch) for content in contents(batch)
        )
        assert len(seen) == 3900
        assert max(seen.values()) == 1
        dropped.add(frozenset(seen))
    assert len(dropped) == 2  # another tail is dropped in each epoch


@pytest.mark.slow
def test_files_are_read_in_another_order_in_each_epoch(digits):
    source = digits(shuffle_buffer=1)  # the order of the five files is all that is shuffled
    assert_same(take(source, 2, batch_size=2000), take(source, 2, batch_size=2000))
    first, second = (contents(batch) for batch in take(source, 3, batch_size=2000)[::2])
    assert first != second


def test_a_shuffle_mixes_the_classes(digits):
    labels = np.concatenate([batch["label"] for batch in take(digits(), 10, batch_size=400)]).reshape(40, 100)
    # 100 of a class-balanced set, drawn at random: each class 10 ± 3; all within 5 standard deviations.
    counts = np.apply_along_axis(np.bincount, 1, labels, minlength=10)
    assert counts.min() > 0
    assert counts.max() < 25


@pytest.mark.slow
@HELD_OR_STREAMED
@pytest.mark.parametrize(("readers", "processes"), [(1, 4), (4, 4), (4, 2), (6, 2)])
def test_processes_share_the_batch_of_one_process(digits, shuffle_buffer, readers, processes):
    source = digits(augment="pad_crop", shuffle_buffer=shuffle_buffer, readers=readers)
    whole = take(source, 4, batch_size=480, start_step=6)  # over the end of an epoch
    parts = [
        take(source, 4, batch_size=480, start_step=6, process_index=p, process_count=processes)
        for p in range(processes)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in ("image", "label")}
        for step in zip(*parts, strict=True)
    ]
    assert all(len(part["label"]) == 480 // processes for step in parts for part in step)
    assert_same(joined, whole)


def test_each_reader_supplies_its_rows_from_its_piece(photos):
    source = photos(readers=3)
    pieces = [set(), set(), set()]
    for batch in take(source, 14, batch_size=6):
        for row, content in enumerate(contents(batch)):
            pieces[row // 2].add(content)
    assert [len(piece) for piece in pieces] == [7, 7, 7]  # 21 images in three pieces that do not overlap
    assert len(set.union(*pieces)) == 21


@pytest.mark.slow
def test_labels_belong_to_their_images(digits):
    of_image = {}
    for batch in take(digits(), 10, batch_size=400):
        of_image |= dict(zip(contents(batch), batch["label"].tolist(), strict=True))
    for batch in take(digits(shuffle_buffer=100, readers=4), 10, batch_size=400, seed=5):
        assert [of_image[content] for content in contents(batch)] == batch["label"].tolist()


# -- evaluation -----------------------------------------------------------------------------------------------------


@HELD_OR_STREAMED
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("per_process", [1, 5, 40])
def test_evaluation_sees_every_image_once(photos, shuffle_buffer, processes, per_process):
    source = photos(shuffle_buffer=shuffle_buffer)
    size = per_process * processes
    runs = [
        list(source.eval_batches(batch_size=size, process_index=p, process_count=processes)) for p in range(processes)
    ]
    assert len({len(run) for run in runs}) == 1  # every process takes part in every step
    seen = []
    for batch in (batch for run in runs for batch in run):
        assert batch["image"].shape == (per_process, 32, 32, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert batch["mask"].dtype == bool
        assert not batch["image"][~batch["mask"]].any()
        seen += [image.tobytes() for image in batch["image"][batch["mask"]]]
    assert len(seen) == source.num_eval == 23
    assert len(set(seen)) == 23


def test_evaluation_of_fewer_images_than_processes(photos):
    source = dataclasses.replace(photos(), num_eval=2)
    runs = [list(source.eval_batches(batch_size=6, process_index=p, process_count=3)) for p in range(3)]
    assert [[batch["mask"].tolist() for batch in run] for run in runs] == [
        [[False, False]],
        [[True, False]],
        [[True, False]],
    ]


@pytest.mark.parametrize("examples", [1, 7, 64, 1000])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_pieces_cover_a_split_evenly(examples, count):
    pieces = [order.piece(examples, index, count) for index in range(count)]
    assert pieces[0][0] == 0
    assert pieces[-1][1] == examples
    assert all(left[1] == right[0] for left, right in pairwise(pieces))
    sizes = [stop - start for start, stop in pieces]
    assert max(sizes) - min(sizes) <= 1


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "cifra100"}, r"config\.data\.name='cifra100' is not allowed: one of .*; did you mean 'cifar100'\?"),
        ({"name": ""}, r"config\.data\.name='' is not allowed: one of 'mnist5k'"),
        ({"augment": "pad"}, r"config\.data\.augment='pad' is not allowed: one of 'none', 'pad_crop'"),
        ({"image_size": 40}, r"image_size=40 is larger than the images, 28 pixels: set config\.data\.eval_resize"),
        ({"image_size": -1}, r"config\.data\.image_size=-1 is not allowed: 0 or more"),
        ({"eval_resize": 20}, r"config\.data\.image_size=28 is larger than the images, 20 pixels"),
        ({"readers": 0}, r"config\.data\.readers=0 is not allowed: 1 or more"),
        ({"mean": (0.1, 0.2, 0.3)}, r"config\.data\.mean=.* is not allowed: one number for each of 1 channels"),
        ({"name": "imagenet2012"}, r"config\.data\.image_size=0 is not allowed for imagenet2012"),
        ({"name": "image_folder", "image_size": 32, "mock": True}, r"config\.data\.mock=True: .*no number of classes"),
    ],
)
def test_values_that_cannot_be_used_are_named(values, message):
    data = default.get_config().data
    data.update({"name": "mnist5k", "dir": "/nowhere"} | values)
    with pytest.raises(BadInput, match=message):
        open_source(data)


@pytest.mark.parametrize(
    ("readers", "arguments", "message"),
    [
        (3, {"batch_size": 400}, r"config\.data\.readers=3 must divide config\.batch_size=400"),
        (4, {"batch_size": 12, "process_count": 3}, r"readers=4 must be 1 or a multiple of the 3 processes"),
    ],
)
def test_readers_that_do_not_divide_the_work_are_refused(digits, readers, arguments, message):
    with pytest.raises(BadInput, match=message):
        digits(readers=readers).train_batches(seed=0, start_step=0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 10, "process_count": 3}, "a batch of 10 cannot be divided evenly over 3 processes"),
        ({"batch_size": 4001}, r"config\.batch_size=4001 is larger than the training split, 4000 images"),
    ],
)
@pytest.mark.parametrize("mock", [False, True])
def test_batches_that_cannot_be_divided_are_refused(digits, arguments, message, mock):
    source = digits(mock=mock, mock_train_examples=4000)
    with pytest.raises(BadInput, match=message):
        source.train_batches(seed=0, start_step=0, **arguments)


def test_evaluation_batches_that_cannot_be_divided_are_refused(digits):
    for source in (digits(), digits(mock=True)):
        with pytest.raises(BadInput, match="10 cannot be divided evenly over 3 processes"):
            source.eval_batches(batch_size=10, process_count=3)


def test_a_set_too_large_for_memory_asks_for_a_buffer(digits, monkeypatch):
    monkeypatch.setattr(data_lib, "_MEMORY_LIMIT", 1000)
    with pytest.raises(BadInput, match=r"config\.data\.shuffle_buffer=0 would hold all of mnist5k in memory"):
        digits()
    assert digits(shuffle_buffer=16).num_train == 4000


def test_given_mean_and_std_replace_the_sets_own(digits):
    source = digits(mean=(0.5,), std=(0.25,))
    assert (source.mean, source.std) == ((0.5,), (0.25,))


# -- generated images -----------------------------------------------------------------------------------------------


@pytest.fixture
def mock(digits):
    return digits(mock=True, mock_train_examples=70, mock_eval_examples=23)


def test_mock_batches_are_a_function_of_seed_and_step(mock):
    through = take(mock, 6, batch_size=12)
    assert_same(take(mock, 4, batch_size=12, start_step=2), through[2:])
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in ("image", "label")}
        for parts in zip(
            *(take(mock, 6, batch_size=12, process_index=p, process_count=3) for p in range(3)), strict=True
        )
    ]
    assert_same(joined, through)
    everything = [content for batch in through for content in contents(batch)]
    everything += [content for batch in take(mock, 6, batch_size=12, seed=1) for content in contents(batch)]
    assert len(set(everything)) == 144


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_mock_evaluation_sees_every_image_once(mock, processes):
    runs = [
        list(mock.eval_batches(batch_size=6 * processes, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    assert len({len(run) for run in runs}) == 1
    seen = [image.tobytes() for run in runs for batch in run for image in batch["image"][batch["mask"]]]
    assert len(seen) == len(set(seen)) == 23
    alone = {image.tobytes() for batch in mock.eval_batches(batch_size=23) for image in batch["image"]}
    assert set(seen) == alone


def test_mock_has_the_sets_shapes_and_can_be_learned():
    data = default.get_config().data
    data.update(name="cifar100", mock=True, image_size=48, eval_resize=48)
    source = open_source(data)
    assert (source.image_shape, source.num_classes, source.steps_per_epoch(100)) == ((48, 48, 3), 100, 10)
    (train,) = take(source, 1, batch_size=600)
    (test,) = source.eval_batches(batch_size=256)
    assert (train["image"].dtype, train["label"].dtype) == (np.uint8, np.int32)
    # The nearest training image is of the same class: the pattern is stronger than the noise.
    train_images, test_images = (b["image"].reshape(len(b["image"]), -1).astype(np.float32) for b in (train, test))
    distance = (train_images**2).sum(1) - 2 * test_images @ train_images.T
    known = np.isin(test["label"], train["label"])
    assert (train["label"][distance.argmin(1)] == test["label"])[known].mean() > 0.95


# -- what is imported, and how it ends ------------------------------------------------------------------------------


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_mock_and_missing_do_not_import_tensorflow(tmp_path):
    result = run_python(
        f"""
import sys
from configs import default
from dgkd_jax.data.open import missing, open_source
data = default.get_config().data
data.update(name="imagenet2012", image_size=16, eval_resize=16, mock=True)
source = open_source(data)
batch = next(source.train_batches(seed=0, batch_size=4, start_step=0))
assert batch["image"].shape == (4, 16, 16, 3) and source.num_classes == 1000
assert missing(data) is None
assert "tensorflow_datasets" not in sys.modules
data.update(mock=False, dir={str(tmp_path)!r})
print(missing(data))
assert "tensorflow" not in sys.modules
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The data set imagenet2012 is missing")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_process_ends_with_batches_still_under_way_and_holds_each_operation_to_one_thread(digits):
    folder = digits().builder.data_dir_root
    result = run_python(
        f"""
from configs import default
from dgkd_jax.data.open import missing, open_source
data = default.get_config().data
data.update(name="mnist5k", dir={str(folder)!r}, augment="pad_crop", shuffle_buffer=500)
source = open_source(data)
train = source.train_batches(seed=0, batch_size=100, start_step=0)
test = source.eval_batches(batch_size=100)
print(next(train)["image"].shape, next(test)["image"].shape)
import tensorflow as tf
print(tf.config.threading.get_intra_op_parallelism_threads())
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == ["(100, 28, 28, 1) (100, 28, 28, 1)", "1"]
    assert "Exception ignored" not in result.stderr
