"""A user's arrays and data sets as a source: every batch is a pure function of (seed, step), and bad data are named."""

import itertools
import types

import jax
import numpy as np
import pytest
from PIL import Image

from configs import default
from dgkd_jax.data import on_device
from dgkd_jax.data.item_source import kept_evaluation, open_items, open_kept
from dgkd_jax.data.own_data import open_given
from dgkd_jax.errors import BadInput

SIDE, BATCH, TRAIN, EVALUATE = 16, 6, 40, 11
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (TRAIN + EVALUATE, SIDE, SIDE, 3), np.uint8)
LABELS = np.concatenate([np.arange(5), RANDOM.integers(0, 5, TRAIN + EVALUATE - 5)])


class Pairs:
    """A data set with a length and items, as PyTorch's: (PIL image, label)."""

    def __init__(self, images=IMAGES, labels=LABELS):
        self._images, self._labels = images, labels

    def __len__(self):
        return len(self._images)

    def __getitem__(self, place):
        return Image.fromarray(self._images[place]), int(self._labels[place])


class Dictionaries(Pairs):
    """As Hugging Face's data sets."""

    def __getitem__(self, place):
        image, label = super().__getitem__(place)
        return {"img": image, "fine_label": label, "path": "x"}


def data(**values):
    section = default.get_config().data
    section.update(values)
    return section


def arrays(first, last):
    return IMAGES[first:last], LABELS[first:last]


def source(train=None, evaluate=None, **values):
    return open_items(train or arrays(0, TRAIN), evaluate or arrays(TRAIN, None), data(**values))


def taken(found, count, *, start=0, seed=3, **process):
    batches = found.train_batches(seed=seed, batch_size=BATCH, start_step=start, **process)
    return list(itertools.islice(batches, count))


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in other.items():
            np.testing.assert_array_equal(one[name], array)


def test_an_epoch_holds_each_image_once_in_another_order_each_time():
    found = source()
    steps = found.steps_per_epoch(BATCH)
    batches = taken(found, 2 * steps)
    epochs = [np.concatenate([batch["image"] for batch in part]) for part in (batches[:steps], batches[steps:])]
    known = [image.tobytes() for image in IMAGES[:TRAIN]]
    places = [[known.index(image.tobytes()) for image in epoch] for epoch in epochs]
    assert all(len(set(epoch)) == steps * BATCH for epoch in places)
    assert places[0] != places[1] != sorted(places[1])
    for batch in batches:
        np.testing.assert_array_equal(batch["label"], [LABELS[known.index(i.tobytes())] for i in batch["image"]])


@pytest.mark.parametrize("augment", ["none", "pad_crop_flip", "random_resized_crop"])
def test_a_run_that_goes_on_sees_the_same_batches(augment):
    found = source(augment=augment)
    assert_same(taken(found, 3, start=5), taken(found, 8)[5:])


def test_two_processes_together_see_the_batches_of_one():
    found = source(augment="pad_crop")
    halves = [taken(found, 3, process_index=process, process_count=2) for process in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    assert_same(joined, taken(found, 3))


@pytest.mark.parametrize("augment", ["none", "pad_crop_flip"])
def test_batches_from_the_devices_memory_are_those_of_the_host(augment):
    found = source(augment=augment, label_noise=0.5)
    examples, rows = found.train_set(), found.epoch_rows(seed=3, batch_size=BATCH, epoch=1)
    steps = found.steps_per_epoch(BATCH)
    made = [
        jax.jit(on_device.batch)(examples, {name: array[step] for name, array in rows.items()}) for step in range(steps)
    ]
    assert_same(made, taken(found, steps, start=steps))


@pytest.mark.parametrize("kind", [Pairs, Dictionaries, lambda *given: list(zip(*given, strict=True))])
def test_a_data_set_gives_the_batches_of_its_arrays(kind):
    found = source(kind(*arrays(0, TRAIN)), kind(*arrays(TRAIN, None)), augment="pad_crop")
    assert_same(taken(found, 8), taken(source(augment="pad_crop"), 8))
    assert found.num_classes == 5
    assert_same(found.eval_batches(batch_size=4), source().eval_batches(batch_size=4))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_an_evaluation_holds_each_image_once(processes):
    found = source()
    seen = [
        list(found.eval_batches(batch_size=6, process_index=process, process_count=processes))
        for process in range(processes)
    ]
    assert len({len(batches) for batches in seen}) == 1
    rows = [(i, label) for batches in seen for b in batches for i, label in zip(b["image"][b["mask"]], b["label"][b["mask"]], strict=True)]  # fmt: skip  # noqa: E501
    assert sorted((image.tobytes(), label) for image, label in rows) == sorted(
        (image.tobytes(), label) for image, label in zip(*arrays(TRAIN, None), strict=True)
    )


def test_pixel_statistics_are_those_of_the_training_images():
    pixels = IMAGES[:TRAIN].reshape(-1, 3) / 255
    np.testing.assert_allclose(source().mean, pixels.mean(0), atol=5.1e-5)  # to four digits
    np.testing.assert_allclose(source().std, pixels.std(0), atol=5.1e-5)


def test_images_of_several_sizes_are_seen_as_pillow_resizes_them():
    sizes = [IMAGES[i, : 10 + i % 4, : 12 + i % 3] for i in range(20)]
    pairs = list(zip(sizes, LABELS[:20].tolist(), strict=True))
    found = source(pairs, pairs, image_size=8, eval_resize=9)
    batch = next(found.eval_batches(batch_size=20))
    for size, image in zip(sizes, batch["image"], strict=True):
        height, width = size.shape[:2]
        short = min(height, width)
        resized = np.asarray(Image.fromarray(size).resize((9 * width // short, 9 * height // short), 2))
        top, left = (round((side - 8) / 2) for side in resized.shape[:2])
        np.testing.assert_array_equal(image, resized[top : top + 8, left : left + 8])


def test_a_share_of_the_training_images_is_held_out_where_there_are_no_others():
    found = open_items((IMAGES, LABELS), None, data(holdout=0.2))
    assert (found.num_train, found.num_eval) == (41, 10)
    both = np.concatenate([found.train.images, found.evaluate.images])
    assert sorted(i.tobytes() for i in both) == sorted(i.tobytes() for i in IMAGES)
    again = open_items((IMAGES, LABELS), None, data(holdout=0.2))
    np.testing.assert_array_equal(found.evaluate.images, again.evaluate.images)
    pairs = open_items(Pairs(), None, data(holdout=0.2))
    assert_same(pairs.eval_batches(batch_size=10), found.eval_batches(batch_size=10))


def test_label_noise_replaces_its_share_by_other_classes_and_always_the_same():
    many = (np.zeros((4000, 2, 2, 1), np.uint8), np.arange(4000) % 5)
    found = open_items(many, many, data(label_noise=0.3))
    noisy = found.train_set()["label"]
    changed = noisy != many[1]
    assert abs(changed.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    shifts = np.bincount((noisy - many[1])[changed] % 5, minlength=5)
    assert shifts[0] == 0
    assert shifts[1:].min() > 0.2 * changed.sum()
    np.testing.assert_array_equal(open_items(many, many, data(label_noise=0.3)).train_set()["label"], noisy)
    np.testing.assert_array_equal(next(found.eval_batches(batch_size=4000))["label"], many[1])


def test_the_name_follows_the_content():
    other = IMAGES.copy()
    other[3, 0, 0, 0] ^= 1
    names = [source().name, source().name, source((other[:TRAIN], LABELS[:TRAIN])).name]
    assert names[0] == names[1] != names[2]
    changed = Pairs(other[:TRAIN], LABELS[:TRAIN])
    assert source(Pairs(*arrays(0, TRAIN))).name != source(changed).name


def test_the_kept_evaluation_split_is_what_the_networks_saw():
    found = source(image_size=8, eval_resize=12)
    kept = open_kept(kept_evaluation(found), data(image_size=8, eval_resize=12, augment="pad_crop"))
    assert_same(kept.eval_batches(batch_size=4), found.eval_batches(batch_size=4))


def test_the_data_sets_own_list_of_classes_counts():
    pairs = Pairs(*arrays(0, TRAIN))
    pairs.classes = list("abcdefgh")
    assert source(pairs).num_classes == 8
    pairs = Dictionaries(*arrays(0, TRAIN))
    pairs.features = {"img": None, "fine_label": types.SimpleNamespace(num_classes=7)}
    assert source(pairs).num_classes == 7
    assert source(num_classes=9).num_classes == 9


class Changing(Pairs):
    def __getitem__(self, place):
        image, label = super().__getitem__(place)
        return np.asarray(image) ^ np.random.default_rng().integers(1, 255, (SIDE, SIDE, 3), np.uint8), label


class Failing(Pairs):
    def __getitem__(self, place):
        raise OSError("the disk is gone")


CASES = {
    "floats": (lambda: (IMAGES / 255, LABELS), "train: images of float64; images must be uint8"),
    "channels first": (
        lambda: (IMAGES.transpose(0, 3, 1, 2), LABELS),
        r"shape \(51, 3, 16, 16\) have their channels first; .*transpose\(0, 2, 3, 1\)",
    ),
    "two channels": (lambda: (IMAGES[..., :2], LABELS), "the last dimension must be 1 .grey. or 3"),
    "one image": (lambda: (IMAGES[0, 0], LABELS), r"images of shape \(16, 3\); expected uint8"),
    "texts": (
        lambda: (IMAGES, np.array(["cat", "dog"] * 25 + ["cat"])),
        "labels are texts such as 'cat'; give the num",
    ),
    "from 1": (
        lambda: (IMAGES, LABELS + 1),
        r"labels go from 1 to 5, and classes are numbered from 0: give labels - 1",
    ),
    "negative": (lambda: (IMAGES, LABELS - 1), "label -1 is not allowed"),
    "label floats": (lambda: (IMAGES, LABELS / 2), "labels of float64 and shape .51,.; expected whole numbers"),
    "fewer labels": (lambda: (IMAGES, LABELS[:3]), "51 images and 3 labels"),
    "none": (lambda: (IMAGES[:0], LABELS[:0]), "train holds no example"),
    "empty": (list, "train holds no example"),
    "a number": (lambda: 3, "train is of type int; give .images, labels. or something with a length and items"),
    "a path": (lambda: "images/", "train is of type str"),
    "three things": (lambda: [(1, 2, 3)], r"train\[0\] is of type tuple; expected .image, label."),
    "other names": (lambda: [{"pixels": 1, "label": 2}], r"train\[0\]: has pixels, label; expected one of image, img"),
    "changing": (Changing, r"train\[0\] is another image each time .* choose data.augment"),
    "failing": (Failing, r"train\[0\] of 51 could not be read: OSError: the disk is gone"),
    "sizes": (
        lambda: [(IMAGES[0], 0), (IMAGES[1, :9], 1)],
        "config.data.image_size=0: the images differ in size, from 9x16 to 16x16",
    ),
    "small": (lambda: [(IMAGES[0, :9], 0), (IMAGES[1, :9], 1)], "config.data.augment='pad_crop' is for square images"),
}


@pytest.mark.wrong_input
@pytest.mark.parametrize("case", CASES)
def test_data_that_cannot_be_used_are_named(case):
    make, message = CASES[case]
    with pytest.raises(BadInput, match=message):
        open_given(make(), (IMAGES, LABELS), data(augment="pad_crop"))


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_examples": 99}, "config.data.train_examples=99: there are 40 training images"),
        ({"num_classes": 4}, r"train\[\d+\]: label 4 is not allowed, there are 4 classes"),
        ({"mean": (0.5,), "std": (1.0,)}, r"config.data.mean=\(0.5,\) is not allowed: one number for each of the 3"),
        ({"image_size": 32}, "an image of 16x16 pixels is smaller than 32x32: set data.eval_resize"),
    ],
)
def test_keys_that_do_not_fit_the_data_are_named(values, message):
    with pytest.raises(BadInput, match=message):
        next(source(**values).eval_batches(batch_size=4))


@pytest.mark.wrong_input
def test_a_share_that_leaves_nothing_is_named():
    with pytest.raises(BadInput, match=r"config.data.holdout=0.001 of 51 training images leaves none"):
        open_items((IMAGES, LABELS), None, data(holdout=0.001))
