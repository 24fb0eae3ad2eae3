"""Training images and files that cannot be read are named; as many as are allowed are replaced by their neighbours."""

import numpy as np
import pytest
import tensorflow as tf
from batches import take

from configs import default
from dgkd_jax.data import augment
from dgkd_jax.data.open import open_source
from dgkd_jax.errors import BadInput


def damaged(root, *, which, how):
    """Opens a folder of 12 training and 5 test images, of which some training images are damaged after encoding."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for number in range(count):
            folder = root / split / f"class {number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            image = tf.io.encode_jpeg(rng.integers(0, 256, (32, 32, 3), np.uint8)).numpy()
            if split == "train" and number in which:
                image = how(image)
            (folder / f"{number:02d}.jpg").write_bytes(image)

    def source(**values):
        data = default.get_config().data
        data.update(name="image_folder", dir=str(root / "tfds"), manual_dir=str(root), image_size=32, max_bad_images=12)
        open_source(data)  # built with whatever damage is there
        data.update({"shuffle_buffer": 0, "max_bad_images": 0} | values)
        return open_source(data)

    return source


def cut(image):
    return image[: len(image) // 2]


@pytest.mark.parametrize("shuffle_buffer", [0, 5])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, shuffle_buffer):
    source = damaged(tmp_path, which={3}, how=cut)(shuffle_buffer=shuffle_buffer)
    with pytest.raises(BadInput, match=r"1 training image\(s\) cannot be decoded.*tfrecord.*__\d+\. Mend"):
        take(source, 3, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("shuffle_buffer", [0, 5])
def test_allowed_bad_images_are_replaced_and_batches_stay_a_function_of_their_step(tmp_path, shuffle_buffer):
    whole = damaged(tmp_path / "whole", which=set(), how=cut)(shuffle_buffer=shuffle_buffer)
    source = damaged(tmp_path / "damaged", which={3, 8}, how=cut)(shuffle_buffer=shuffle_buffer, max_bad_images=2)
    expected, found = take(whole, 6, batch_size=4), take(source, 6, batch_size=4)
    bad = [
        {row for row, name in enumerate(source.train_ids(seed=0, batch_size=4, step=step)) if name in source._bad}
        for step in range(6)
    ]
    assert len(source._bad) == 2
    assert sum(map(len, bad)) == 4  # each twice in two epochs
    for step in range(6):
        for row in range(4):
            kept = next(r for r in [*range(row, 4), *range(4)] if r not in bad[step])
            np.testing.assert_array_equal(found[step]["image"][row], expected[step]["image"][kept])
            assert found[step]["label"][row] == expected[step]["label"][kept]
    for step in (2, 5):
        (later,) = take(source, 1, batch_size=4, start_step=step)
        np.testing.assert_array_equal(later["image"], found[step]["image"])


def test_more_bad_images_than_allowed_are_an_error(tmp_path):
    source = damaged(tmp_path, which={1, 4, 7}, how=cut)(max_bad_images=2)
    with pytest.raises(BadInput, match=r"3 training image\(s\) cannot be decoded, where config.data.max_bad_images=2"):
        take(source, 3, batch_size=4)


def test_a_damaged_and_a_missing_file_are_named(tmp_path):
    source = damaged(tmp_path, which=set(), how=cut)(shuffle_buffer=5)
    (file,) = source.builder.info.splits["train"].filepaths
    content = file.read_bytes()
    file.write_bytes(content[:1000] + bytes(8) + content[1008:])
    with pytest.raises(BadInput, match=rf"{file.name}: corrupted record"):
        take(source, 3, batch_size=4)
    file.unlink()
    with pytest.raises(BadInput, match=file.name):
        take(source, 3, batch_size=4)


@pytest.mark.slow
def test_ids_name_the_examples_of_a_batch_in_their_rows(tmp_path):
    for shuffle_buffer in (0, 5):
        source = damaged(tmp_path, which=set(), how=cut)(shuffle_buffer=shuffle_buffer)
        by_id = {
            record["tfds_id"].numpy().decode(): augment.decode(record["image"], channels=3).numpy()
            for record in source._read("train", 0, 12)
        }
        (batch,) = take(source, 1, batch_size=4, start_step=4, seed=3)
        names = source.train_ids(seed=3, batch_size=4, step=4)
        for name, image in zip(names, batch["image"], strict=True):
            np.testing.assert_array_equal(by_id[name], image)
