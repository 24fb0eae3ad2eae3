"""Data sets that are folders of images: classes, damaged files, links, and what is said where something is missing."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from data.read_back import examples, one_epoch
from PIL import Image

from dgkd_jax.data.builders import image_files
from dgkd_jax.data.open import missing, open_source
from dgkd_jax.errors import BadInput

pytestmark = pytest.mark.usefixtures("no_network")


def write_image(path, colour, *, size=(40, 50)):
    """A PNG or JPEG of one colour, which both formats keep exactly if it is grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.broadcast_to(np.uint8(colour), (*size, 3))
    encode = tf.io.encode_png if path.suffix.lower() == ".png" else tf.io.encode_jpeg
    path.write_bytes(encode(image).numpy())


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "my images"
    write_image(root / "train" / "zebra" / "a.png", [1, 1, 1])
    write_image(root / "train" / "zebra" / "b.JPG", [2, 2, 2], size=(50, 40))
    write_image(root / "train" / "big cat" / "c.jpeg", [3, 3, 3], size=(33, 80))
    write_image(root / "val" / "zebra" / "d.png", [4, 4, 4])
    write_image(root / "val" / "big cat" / "e.png", [5, 5, 5])
    (root / "train" / "zebra" / "notes.txt").write_text("not an image")
    (root / "train" / "zebra" / "._b.jpg").write_text("what macOS leaves")
    return root


def folder_section(section, folder, **values):
    return section("image_folder", manual_dir=str(folder), image_size=32, **values)


def first_pixels(pairs):
    return sorted((image[0], label) for image, label in pairs)


def test_image_folder_labels_are_the_sorted_class_folders(section, folder):
    source = open_source(folder_section(section, folder))
    assert (source.num_classes, source.image_shape, source.eval_split) == (2, (32, 32, 3), "validation")
    assert first_pixels(one_epoch(source, 3)) == [(1, 1), (2, 1), (3, 0)]  # "big cat" is 0, "zebra" is 1
    assert first_pixels(examples(source)) == [(4, 1), (5, 0)]


def test_classes_file_gives_the_labels_of_a_larger_network(section, folder):
    data = folder_section(section, folder)
    open_source(data)  # a copy prepared before the file was written is not used again
    (folder / "classes.txt").write_text("ant\nzebra\nwolf\nbig cat\nyak\n\n")
    source = open_source(data)
    assert source.num_classes == 5
    assert first_pixels(one_epoch(source, 3)) == [(1, 1), (2, 1), (3, 3)]
    assert first_pixels(examples(source)) == [(4, 1), (5, 3)]
    write_image(folder / "val" / "yak" / "f.png", [7, 7, 7])  # a class without training images
    assert first_pixels(examples(open_source(data))) == [(4, 1), (5, 3), (7, 4)]


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["zebra", "wolf"], "train/big cat: no such class in .*classes.txt"),
        (["zebra", "big cat", "zebra"], "classes.txt, line 3: 'zebra' is not a class of its own"),
        (["zebra", "", "big cat"], "classes.txt, line 2: '' is not a class of its own"),
    ],
)
def test_classes_file_that_cannot_be_used_is_named(section, folder, lines, message):
    (folder / "classes.txt").write_text("\n".join(lines))
    assert re.search(message, missing(folder_section(section, folder)))


def test_a_changed_image_folder_is_read_again(section, folder):
    data = folder_section(section, folder)
    assert open_source(data).num_train == 3
    write_image(folder / "train" / "big cat" / "new.png", [6, 6, 6])
    source = open_source(data)
    assert first_pixels(one_epoch(source, 4)) == [(1, 1), (2, 1), (3, 0), (6, 0)]


def test_image_folder_missing_says_what_was_looked_for(section, tmp_path, folder):
    assert "--config.data.manual_dir=FOLDER" in missing(section("image_folder", image_size=32))
    message = missing(folder_section(section, tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere" / "train") in message
    assert "found nothing" in message
    shutil.rmtree(folder / "val")
    assert "found train" in missing(folder_section(section, folder))


@pytest.mark.wrong_input
def test_image_folder_refuses_empty_and_unknown_classes(section, folder):
    data = folder_section(section, folder)
    (folder / "train" / "empty").mkdir()
    with pytest.raises(BadInput, match="train/empty: no images"):
        open_source(data)
    (folder / "train" / "empty").rmdir()
    write_image(folder / "val" / "horse" / "f.png", [7, 7, 7])
    with pytest.raises(BadInput, match="val/horse: no such class"):
        open_source(data)
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    with pytest.raises(BadInput, match="val: no folder of any class"):
        open_source(data)


def jpeg() -> bytes:
    return tf.io.encode_jpeg(np.full((8, 8, 3), 99, np.uint8)).numpy()


DAMAGED = {
    "a.png": (b"\x89PNG nonsense", "no JPEG or PNG that can be decoded"),
    "cut.jpg": (jpeg()[:-40], f"a JPEG that is cut off after {len(jpeg()) - 40} bytes"),
    "empty.jpg": (b"", "it is empty"),
    "text.jpg": (b"hello", "no JPEG or PNG that can be decoded"),
}


@pytest.mark.wrong_input
def test_all_images_that_cannot_be_decoded_are_named_when_the_set_is_built(section, folder, tmp_path, capfd):
    (folder / "train" / "zebra" / "whole.jpg").write_bytes(jpeg())
    for name, (content, _) in DAMAGED.items():
        (folder / "train" / "zebra" / name).write_bytes(content)
    with pytest.raises(BadInput) as refused:
        open_source(folder_section(section, folder, max_bad_images=3))
    lines = str(refused.value).splitlines()
    assert lines[0] == "4 of 9 images cannot be used:"
    assert lines[1:5] == [f"  {folder}/train/zebra/{name}: {DAMAGED[name][1]}" for name in sorted(DAMAGED)]
    assert lines[5:] == ["Mend or remove them, or allow --config.data.max_bad_images=4 in training"]
    assert len(capfd.readouterr().err.splitlines()) == 2  # what is done, and nothing of TensorFlow's
    assert not list((tmp_path / "data").rglob("*.tfrecord*"))


@pytest.mark.wrong_input
def test_damaged_training_images_may_be_allowed_but_not_damaged_evaluation_images(section, folder):
    (folder / "train" / "zebra" / "a.png").write_bytes(b"")
    open_source(folder_section(section, folder, max_bad_images=1))
    (folder / "val" / "zebra" / "b.png").write_bytes(b"")
    with pytest.raises(BadInput, match="val/zebra/b.png: it is empty\nMend or remove them$"):
        open_source(folder_section(section, folder, max_bad_images=1))


@pytest.mark.wrong_input
@pytest.mark.parametrize("name", [b"train/\xff\xfe", b"train/zebra/\xff.png", b"train/line\nbreak"])
def test_a_name_that_cannot_be_written_is_refused(section, folder, name):
    path = os.fsencode(folder) + b"/" + name
    if name.endswith(b".png"):
        Path(os.fsdecode(path)).write_bytes(b"")
    else:
        os.mkdir(path)
    with pytest.raises(BadInput, match="has characters that cannot be written; rename it"):
        open_source(folder_section(section, folder))


@pytest.mark.wrong_input
def test_a_classes_file_that_is_no_text_is_refused(section, folder):
    (folder / "classes.txt").write_bytes(b"zebra\n\xff\xfe\x80")
    with pytest.raises(BadInput, match=r"classes\.txt: no text in UTF-8"):
        open_source(folder_section(section, folder))


def test_a_link_that_leads_back_to_itself_is_no_class_and_no_image(section, folder):
    (folder / "train" / "loop").symlink_to("loop")
    assert open_source(folder_section(section, folder)).num_classes == 2
    (folder / "train" / "zebra" / "loop.png").symlink_to("loop.png")
    with pytest.raises(BadInput, match="loop.png: cannot be read: Too many levels of symbolic links"):
        open_source(folder_section(section, folder))


@pytest.mark.parametrize("damage", ["cut short", "gone"])
@pytest.mark.parametrize("shuffle_buffer", [0, 2])
def test_damaged_records_are_bad_input(section, folder, damage, shuffle_buffer):
    data = folder_section(section, folder, shuffle_buffer=shuffle_buffer)
    source = open_source(data)
    (records,) = source.builder.data_path.glob("*train.tfrecord*")
    if damage == "gone":
        records.unlink()
    else:
        records.write_bytes(records.read_bytes()[:-10])
    with pytest.raises(BadInput, match="image_folder in .* cannot be read"):
        next(source.train_batches(seed=0, batch_size=3, start_step=0))


def test_images_that_are_too_small_ask_for_eval_resize(section, folder):
    data = folder_section(section, folder)
    data.image_size = 36
    source = open_source(data)
    with pytest.raises(BadInput, match="smaller than 36 pixels: set config.data.eval_resize to 36 or more"):
        next(source.train_batches(seed=0, batch_size=3, start_step=0))
    data.eval_resize = 36
    assert next(open_source(data).eval_batches(batch_size=2))["image"].shape == (2, 36, 36, 3)


@pytest.fixture
def tiny_folder(tmp_path):
    """200 classes of one training image; two validation images."""
    root = tmp_path / "tiny-imagenet-200"
    wnids = [f"n{i:08d}" for i in range(200)]
    for number, wnid in enumerate(wnids):
        write_image(root / "train" / wnid / "images" / f"{wnid}_0.JPEG", [number] * 3, size=(64, 64))
    write_image(root / "val" / "images" / "val_0.JPEG", [77] * 3, size=(64, 64))
    write_image(root / "val" / "images" / "val_1.JPEG", [5] * 3, size=(64, 64))
    lines = [f"val_0.JPEG\t{wnids[77]}\t0\t0\t62\t57", f"val_1.JPEG\t{wnids[5]}\t0\t0\t62\t57"]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def test_tiny_imagenet_labels_follow_the_order_of_the_wnids(section, tiny_folder):
    data = section("tiny_imagenet", manual_dir=str(tiny_folder))
    source = open_source(data)
    assert (source.num_train, source.num_eval, source.num_classes) == (200, 2, 200)
    assert (source.image_shape, source.eval_split) == ((64, 64, 3), "validation")
    assert first_pixels(one_epoch(source, 200)) == [(number, number) for number in range(200)]
    assert first_pixels(examples(source)) == [(5, 5), (77, 77)]
    shutil.rmtree(tiny_folder)
    assert missing(data) is None


@pytest.mark.wrong_input
def test_tiny_imagenet_that_is_not_whole_is_refused(section, tiny_folder):
    data = section("tiny_imagenet", manual_dir=str(tiny_folder))
    (tiny_folder / "val" / "images" / "val_1.JPEG").unlink()
    assert "names a class or an image that is not there" in missing(data)
    shutil.rmtree(tiny_folder / "train" / "n00000000")
    assert "expected 200 classes, found 199" in missing(data)
    shutil.rmtree(tiny_folder)
    message = missing(data)
    assert str(tiny_folder / "train") in message
    assert "tiny-imagenet-200.zip" in message


def test_fingerprint_changes_with_names_classes_and_sizes(folder):
    def fingerprint():
        return image_files.list_folder(folder).fingerprint(folder)

    seen = {fingerprint()}
    (folder / "val" / "zebra" / "d.png").rename(folder / "val" / "zebra" / "f.png")
    seen.add(fingerprint())
    (folder / "val" / "zebra" / "f.png").rename(folder / "val" / "big cat" / "f.png")
    write_image(folder / "val" / "zebra" / "g.png", [9, 9, 9])
    seen.add(fingerprint())
    write_image(folder / "val" / "zebra" / "g.png", [9, 9, 9], size=(200, 200))
    seen.add(fingerprint())
    assert len(seen) == 4
    assert fingerprint() in seen  # and with nothing else


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".tif", ".TIFF"])
def test_formats_that_tensorflow_does_not_decode_become_png_pixel_for_pixel(section, folder, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    path = folder / "val" / "zebra" / f"f{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    batches = open_source(folder_section(section, folder)).eval_batches(batch_size=4)
    assert any(np.array_equal(image, pixels) for image in next(batches)["image"])


@pytest.mark.wrong_input
def test_a_damaged_file_of_such_a_format_is_named(section, folder):
    (folder / "val" / "zebra" / "f.webp").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"f.webp: no image that Pillow can read"):
        open_source(folder_section(section, folder))


@pytest.fixture
def classes_only(tmp_path):
    """One folder of classes, without train and val."""
    root = tmp_path / "animals"
    for label, name in enumerate(("ant", "bee")):
        for number in range(20):
            write_image(root / name / f"{number}.png", [100 * label + number] * 3)
    return root


def test_of_a_folder_of_classes_a_share_of_each_class_is_kept_for_evaluation(section, classes_only):
    source = open_source(folder_section(section, classes_only, holdout=0.2))
    trained, evaluated = first_pixels(one_epoch(source, 8)), first_pixels(examples(source))
    assert [label for _, label in evaluated] == [0] * 4 + [1] * 4
    assert sorted(trained + evaluated) == [(100 * label + n, label) for label in range(2) for n in range(20)]
    listing = image_files.list_folder(classes_only, holdout=0.2)
    assert listing == image_files.list_folder(classes_only, holdout=0.2)
    more = image_files.list_folder(classes_only, holdout=0.3).splits["validation"]
    assert set(listing.splits["validation"]) < set(more)


@pytest.mark.wrong_input
def test_a_class_of_one_image_cannot_be_split(classes_only):
    write_image(classes_only / "cow" / "0.png", [1, 1, 1])
    with pytest.raises(BadInput, match=r"animals/cow: one image, and each class needs one for training and one for"):
        image_files.list_folder(classes_only)
