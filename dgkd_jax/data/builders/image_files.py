"""Data sets of image files in folders: any image folder, and Tiny ImageNet.

The files are copied once, unchanged, into TFRecords; what TensorFlow's decoder does not know (WebP, BMP, TIFF) becomes
PNG, pixel for pixel. Reading them in place, as `tfds.ImageFolder` does, would save
the copy, but that builder supports neither a shuffle seed nor a part of a split, and random reads per image are slow
on the network disks that pods read from. The records are written in an order that mixes the classes.
"""

import concurrent.futures
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from PIL import Image

from dgkd_jax.errors import BadInput

_EVAL_NAMES = {"validation": "validation", "val": "validation", "test": "test"}  # the first existing one is used
_COPIED = (".jpg", ".jpeg", ".png")
_CONVERTED = (".webp", ".bmp", ".tif", ".tiff")  # to PNG, by Pillow
_SUFFIXES = (*_COPIED, *_CONVERTED)
_CLASSES_FILE = "classes.txt"
_TINY_CLASSES = 200
_JPEG_BEGINS, _JPEG_ENDS = b"\xff\xd8\xff", b"\xff\xd9"
# What TensorFlow decodes, whatever the file's name.
_IMAGES_BEGIN = (_JPEG_BEGINS, b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM")
_NO_IMAGE = "no JPEG or PNG that can be decoded"
_MOST_NAMED = 1000  # damaged files


class Listing(NamedTuple):
    """The content of a folder of images: classes in label order, and (path, class) of each image."""

    classes: tuple[str, ...]
    splits: dict[str, list[tuple[Path, str]]]

    def fingerprint(self, folder: Path) -> str:
        """Twelve hexadecimal digits that change with the classes and with the files' names, classes and sizes."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for split, images in self.splits.items():
            for path, label in images:
                digest.update(f"{split}\0{label}\0{path.relative_to(folder)}\0{_size(path)}\n".encode())
        return digest.hexdigest()[:12]


def check_images(listing: Listing, *, allowed: int) -> None:
    """Decode every image once, so that damaged files are found before they are copied.

    Args:
        allowed: training images that may be damaged: training replaces them by their neighbours.

    Raises:
        BadInput: names all damaged files if there are more, or if one is to be evaluated on.
    """
    damaged, count = {}, sum(map(len, listing.splits.values()))
    print(f"checking {count:,} images", file=sys.stderr, flush=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        for split, images in listing.splits.items():
            paths = [path for path, _ in images]
            reasons = zip(paths, threads.map(_problem_with, paths), strict=True)
            damaged[split] = {path: reason for path, reason in reasons if reason}
    training = damaged.get("train", {})
    others = {path: reason for split, found in damaged.items() if split != "train" for path, reason in found.items()}
    shown = (training if len(training) > allowed else {}) | others
    if shown:
        lines = [f"  {path}: {reason}" for path, reason in shown.items()]
        more = [f"  and {len(lines) - _MOST_NAMED:,} more"] if len(lines) > _MOST_NAMED else []
        raise BadInput(
            "\n".join([f"{len(shown):,} of {count:,} images cannot be used:", *lines[:_MOST_NAMED], *more])
            + "\nMend or remove them"
            + (f", or allow --config.data.max_bad_images={len(training)} in training" if not others else "")
        )


def _problem_with(path: Path) -> str:
    """Why a file cannot be decoded; "" if it can."""
    import tensorflow as tf

    from dgkd_jax.data import augment

    if path.suffix.lower() in _CONVERTED:
        try:
            _as_png(path)
        except Exception as error:  # Pillow's readers raise what they like
            return f"no image that Pillow can read: {' '.join(str(error).split())[:100]}"
        return ""
    try:
        content = path.read_bytes()
        # Decoding what is none of these, libjpeg writes lines of its own.
        if not content:
            return "it is empty"
        if not content.startswith(_IMAGES_BEGIN):
            return _NO_IMAGE
        if content.startswith(_JPEG_BEGINS) and _JPEG_ENDS not in content:
            return f"a JPEG that is cut off after {len(content):,} bytes"
        augment.decode(tf.constant(content), channels=3)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except tf.errors.InvalidArgumentError:
        return _NO_IMAGE
    return ""


def _as_png(path: Path) -> io.BytesIO:
    """The image as a PNG, in colour; of several images in a file the first."""
    content = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(content, "PNG", compress_level=1)
    content.seek(0)
    return content


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from error


def list_folder(folder: Path, *, holdout: float = 0.1) -> Listing:
    """The images in train/<class>/*, and in validation/<class>/*, else val/<class>/*, else test/<class>/*.

    Without these folders: the images in <class>/*, of which a share of each class is kept for validation.

    Args:
        folder: of the images.
        holdout: that share; which images depends on their names only.

    Labels number the folders of train in alphabetical order. A network with other or more classes (ImageNet's 1,000)
    needs its own labels: then classes.txt lists folder names, one per line, in the order of that network's classes.
    Line n names the folder of label n - 1; that folder may be missing.

    Raises:
        BadInput: a folder is missing, a class has no images or is not in classes.txt.
    """
    evaluated = next((name for name in _EVAL_NAMES if (folder / name).is_dir()), None)
    has_train = (folder / "train").is_dir()
    listed = folder / _CLASSES_FILE
    if not has_train and evaluated is None and len(_folders(folder)) > 1:
        return _held_out(folder, _listed_classes(listed) if listed.exists() else tuple(_folders(folder)), holdout)
    if not has_train or evaluated is None:
        raise BadInput(
            f"The data set image_folder is missing: looked for {folder}/train/<class>/* and one of "
            f"{folder}/test|val|validation/<class>/*, or for {folder}/<class>/*; found "
            f"{', '.join(_folders(folder)) or 'nothing'}.\n"
            "  Provide it:  put images there, or name a folder with --config.data.manual_dir=FOLDER"
        )
    classes = _listed_classes(listed) if listed.exists() else tuple(_folders(folder / "train"))
    if len(classes) < 2:
        raise BadInput(f"{folder}/train: expected a folder for each of two or more classes, found {len(classes)}")
    splits = {}
    for name, split in (("train", "train"), (evaluated, _EVAL_NAMES[evaluated])):
        unknown = set(_folders(folder / name)) - set(classes)
        if unknown:
            where = listed if listed.exists() else folder / "train"
            raise BadInput(f"{folder}/{name}/{min(unknown)}: no such class in {where}")
        splits[split] = [(path, label) for label in _folders(folder / name) for path in _images(folder / name / label)]
        if not splits[split]:
            raise BadInput(f"{folder}/{name}: no folder of any class")
    return Listing(classes, splits)


def _held_out(folder: Path, classes: tuple[str, ...], holdout: float) -> Listing:
    """One folder of classes in two parts: in the order of a digest of their names, the first images are kept."""
    if unknown := set(_folders(folder)) - set(classes):
        raise BadInput(f"{folder}/{min(unknown)}: no such class in {folder / _CLASSES_FILE}")
    splits: dict[str, list[tuple[Path, str]]] = {"train": [], "validation": []}
    for label in _folders(folder):
        images = _images(folder / label)
        mixed = sorted(images, key=lambda path: hashlib.sha256(f"{label}/{path.name}".encode()).digest())
        kept = set(mixed[: max(1, round(holdout * len(images)))])
        if len(kept) == len(images):
            raise BadInput(f"{folder}/{label}: one image, and each class needs one for training and one for validation")
        splits["train"] += [(path, label) for path in images if path not in kept]
        splits["validation"] += [(path, label) for path in images if path in kept]
    return Listing(classes, splits)


def _listed_classes(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: no text in UTF-8; expected one folder name a line") from error
    classes = tuple(line.strip() for line in text.rstrip().splitlines())
    for line, name in enumerate(classes, 1):
        if not name or name in classes[: line - 1]:
            raise BadInput(f"{path}, line {line}: {name!r} is not a class of its own; expected one folder name a line")
    return classes


def list_test_folder(folder: Path) -> Listing:
    """The images of one split, `test`: from test/<class>/* (or validation, or val) if it exists, else <class>/*.

    Raises:
        BadInput: the folder is missing, it has no class folders, or a class has no images.
    """
    inner = next((folder / name for name in ("test", "validation", "val") if (folder / name).is_dir()), folder)
    classes = tuple(_folders(inner))
    if not classes:
        raise BadInput(f"looked for images in {inner}/<class>/*, and found no folder of a class there")
    return Listing(classes, {"test": [(path, label) for label in classes for path in _images(inner / label)]})


def list_tiny_imagenet(folder: Path) -> Listing:
    """The images of tiny-imagenet-200: train/<wnid>/images/* and val/images/* with val_annotations.txt.

    Raises:
        BadInput: a part of it is missing.
    """
    annotations = folder / "val" / "val_annotations.txt"
    for path in (folder / "train", annotations):
        if not path.exists():
            raise BadInput(
                f"The data set tiny_imagenet is missing: looked for {path}.\n"
                "  Provide it:  curl -LO http://cs231n.stanford.edu/tiny-imagenet-200.zip && "
                "unzip -q tiny-imagenet-200.zip\n"
                "  and name the folder with --config.data.manual_dir=tiny-imagenet-200"
            )
    classes = tuple(_folders(folder / "train"))
    if len(classes) != _TINY_CLASSES:
        raise BadInput(f"{folder}/train: expected {_TINY_CLASSES} classes, found {len(classes)}")
    train = [(path, label) for label in classes for path in _images(folder / "train" / label / "images")]
    validation = []
    for line in annotations.read_text().splitlines():
        name, label = line.split("\t")[:2]
        path = folder / "val" / "images" / name
        if label not in classes or not path.exists():
            raise BadInput(f"{annotations}: {line.strip()!r} names a class or an image that is not there")
        validation.append((path, label))
    return Listing(classes, {"train": train, "validation": validation})


class ImageFolder(tfds.core.GeneratorBasedBuilder):
    """Any folder of images.

    Args:
        listing: of all files.
    """

    name = "image_folder_records"  # TFDS itself has an `image_folder`
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, listing: Listing, **kwargs):
        self.listing = listing
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, tfds.features.ClassLabel(names=self.listing.classes))

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self.listing.splits}

    def _generate_examples(self, split: str) -> Iterator:
        return _examples(self.listing, split)


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """100,000 training and 10,000 validation images of 64x64 pixels; 200 classes, in the order of their wnids.

    Args:
        folder: the unpacked tiny-imagenet-200; read only when the set is built.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder: Path, **kwargs):
        self.folder = folder
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, tfds.features.ClassLabel(num_classes=_TINY_CLASSES))

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        listing = list_tiny_imagenet(self.folder)
        return {split: self._generate_examples(listing, split) for split in listing.splits}

    def _generate_examples(self, listing: Listing, split: str) -> Iterator:
        return _examples(listing, split)


def _info(builder: tfds.core.DatasetBuilder, label: tfds.features.ClassLabel) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=builder,
        description="Image files from local folders, as they are.",
        features=tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3)), "label": label}),
    )


def _examples(listing: Listing, split: str) -> Iterator:
    number_of = {name: number for number, name in enumerate(listing.classes)}
    for key, (path, name) in enumerate(listing.splits[split]):
        image = _as_png(path) if path.suffix.lower() in _CONVERTED else path
        yield key, {"image": image, "label": number_of[name]}


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and _is_folder(entry)]
    return _readable(folder, names)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def _images(folder: Path) -> list[Path]:
    names = [name for name in os.listdir(folder) if name.lower().endswith(_SUFFIXES) and not name.startswith(".")]
    if not names:
        raise BadInput(f"{folder}: no images ({', '.join(_SUFFIXES)})")
    return [folder / name for name in _readable(folder, names)]


def _readable(folder: Path, names: list[str]) -> list[str]:
    """The names, sorted; refuses one that is no UTF-8, because the built set could not hold it."""
    for name in names:
        if not name.isprintable():
            raise BadInput(f"{folder}: {name!r} has characters that cannot be written; rename it")
    return sorted(names)
