"""A user's images and labels, whatever holds them: arrays, or anything with a length and items.

An item is a pair (image, label), or a dictionary with an image ("image" or "img") and a label ("label", "labels",
"target" or "fine_label"). An image is uint8 [height, width, channels] or [height, width] of any array library, or a
PIL image; a label is the number of a class from 0 on.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dgkd_jax import own_code
from dgkd_jax.errors import BadInput

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "target", "fine_label")
_LOOKED_AT = 64  # items that stand for a data set whose items are made when they are asked for
_FLOATS = "images must be uint8, 0 to 255: for floats in [0, 1] give (255 * images).round().astype('uint8')"


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """Images uint8 `[examples, height, width, channels]` and labels int32 `[examples]`, of the split `what`."""

    what: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def examples(self, places: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """The images and labels at these places."""
        places = np.asarray(places)
        return list(self.images[places]), self.labels[places]

    def every_label(self) -> np.ndarray:
        return self.labels

    def digest(self) -> bytes:
        """Changes with every pixel and label."""
        content = hashlib.sha256(repr(self.images.shape).encode())
        content.update(np.ascontiguousarray(self.images))
        content.update(np.ascontiguousarray(self.labels))
        return content.digest()


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """Anything with a length and items, of the split `what`; its items are read by `threads` at once."""

    what: str
    dataset: Any
    threads: concurrent.futures.ThreadPoolExecutor

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, place: int) -> tuple[np.ndarray, int]:
        """Image uint8 `[height, width, channels]` and label at a place.

        Raises:
            BadInput: the item is not as described above.
        """
        where = f"{self.what}[{place}]"
        try:
            item = self.dataset[int(place)]
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise BadInput(f"{where} of {len(self)} could not be read: {type(error).__name__}: {why}") from error
        return example(item, where=where)

    def examples(self, places: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """The images and labels at these places."""
        images, labels = zip(*self.threads.map(self.example, places), strict=True)
        return list(images), np.array(labels, np.int32)

    def every_label(self) -> np.ndarray:
        """All labels: from the data set's own list of them if it has one, else every item is read."""
        for name in ("targets", "labels"):
            listed = getattr(self.dataset, name, None)
            if listed is not None and not callable(listed) and len(listed) == len(self):
                return labels_of(listed, what=self.what)
        columns = getattr(self.dataset, "column_names", None)
        if isinstance(columns, list):
            return labels_of(self.dataset[_named(dict.fromkeys(columns), _LABEL_NAMES, self.what)], what=self.what)
        return np.array([label for _, label in self.threads.map(self.example, range(len(self)))], np.int32)

    def digest(self) -> bytes:
        """Changes with the length and with some of the items."""
        content = hashlib.sha256(str(len(self)).encode())
        images, labels = self.examples(spread(len(self), _LOOKED_AT))
        for image in images:
            content.update(np.ascontiguousarray(image))
        content.update(labels)
        return content.digest()


def spread(number: int, most: int) -> list[int]:
    """At most `most` places, evenly over `number` of them."""
    count = min(number, most)
    return [number * place // count for place in range(count)]


def split(given: Any, *, what: str) -> Arrays | Items:
    """A split as the user gave it.

    Args:
        given: (images, labels), or a data set.
        what: train or evaluate, for messages.

    Raises:
        BadInput: it is neither, it is empty, or its first item is not as described above.
    """
    if isinstance(given, Arrays):
        return given
    if isinstance(given, tuple) and len(given) == 2:
        return _arrays(*given, what=what)
    if isinstance(given, str) or not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise BadInput(
            f"{what} is of type {type(given).__name__}; give (images, labels) or something with a length and items, "
            "each of them (image, label)"
        )
    if len(given) == 0:
        raise BadInput(f"{what} holds no example")
    found = Items(what, given, concurrent.futures.ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))))
    first, again = found.example(0), found.example(0)
    if not np.array_equal(first[0], again[0]) or first[1] != again[1]:
        raise BadInput(
            f"{what}[0] is another image each time that it is asked for: leave random changes out of the data set and "
            "choose data.augment, so that a run can go on where it was"
        )
    return found


def _arrays(images: Any, labels: Any, *, what: str) -> Arrays:
    try:
        images, numbers = np.asarray(images), labels_of(labels, what=what)
    except (ValueError, TypeError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{what}: (images, labels) must be arrays: {' '.join(str(error).split())[:200]}") from error
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise BadInput(f"{what}: images of shape {images.shape}; expected uint8 [examples, height, width, channels]")
    if len(images) == 0:
        raise BadInput(f"{what} holds no example")
    if len(images) != len(numbers):
        raise BadInput(f"{what}: {len(images)} images and {len(numbers)} labels")
    return Arrays(what, _checked(images, where=what), numbers)


def example(item: Any, *, where: str) -> tuple[np.ndarray, int]:
    """Image uint8 `[height, width, channels]` and label of an item.

    Raises:
        BadInput: it is not as described above; the message begins with `where`.
    """
    if hasattr(item, "keys"):
        image = item[_named(item, _IMAGE_NAMES, where)]
        label = item[_named(item, _LABEL_NAMES, where)]
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        image, label = item
    else:
        raise BadInput(f"{where} is of type {type(item).__name__}; expected (image, label), or a dictionary of them")
    if isinstance(image, Image.Image):
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    image = np.asarray(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3:
        raise BadInput(f"{where}: an image of shape {image.shape}; expected uint8 [height, width, channels]")
    return _checked(image, where=where), int(labels_of(np.asarray(label)[None], what=where)[0])


def _checked(images: np.ndarray, *, where: str) -> np.ndarray:
    """Images `[..., height, width, channels]`, found to be uint8 and to have their channels last."""
    channels, first = images.shape[-1], images.shape[-3]
    if channels not in (1, 3):
        if first in (1, 3):
            raise BadInput(
                f"{where}: images of shape {images.shape} have their channels first; they must come last: "
                "images.transpose(0, 2, 3, 1) for arrays, image.transpose(1, 2, 0) for one image"
            )
        raise BadInput(f"{where}: images of shape {images.shape}; the last dimension must be 1 (grey) or 3 (colour)")
    if images.dtype != np.uint8:
        raise BadInput(f"{where}: images of {images.dtype}; {_FLOATS}")
    return images


def labels_of(labels: Any, *, what: str) -> np.ndarray:
    """Int32 `[examples]`.

    Raises:
        BadInput: they are no class numbers from 0 on.
    """
    found = np.asarray(labels)
    if found.dtype.kind in "USO":
        first = found.reshape(-1)[0] if found.size else ""
        raise BadInput(
            f"{what}: labels are texts such as {str(first)!r}; give the numbers of the classes from 0 on: "
            "names, labels = np.unique(labels, return_inverse=True)"
        )
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise BadInput(
            f"{what}: labels of {found.dtype} and shape {found.shape}; expected whole numbers [examples], a class each"
        )
    if found.size and found.min() < 0:
        raise BadInput(f"{what}: label {found.min()} is not allowed; classes are numbered from 0 on")
    return found.astype(np.int32)


def classes(train: Arrays | Items, *, given: int) -> int:
    """The number of classes.

    Args:
        train: the training split.
        given: by the user; 0: it is found from the data set's own list of classes, else from the labels.

    Raises:
        BadInput: labels begin at 1, or one is too large.
    """
    if given:
        return given
    dataset = getattr(train, "dataset", None)
    known = getattr(dataset, "classes", None)
    if isinstance(known, (list, tuple)):
        return len(known)
    features = getattr(dataset, "features", None)
    if hasattr(features, "keys"):
        told = getattr(features.get(_named(features, _LABEL_NAMES, train.what)), "num_classes", None)
        if told:
            return told
    labels = train.every_label()
    if labels.min() == 1:
        raise BadInput(
            f"{train.what}: labels go from 1 to {labels.max()}, and classes are numbered from 0: give labels - 1 (or, "
            f"if class 0 has no image, data.num_classes={labels.max() + 1})"
        )
    return int(labels.max()) + 1


def name(train: Arrays | Items, evaluate: Arrays | Items) -> str:
    """A name for this data, by which a run is recognised."""
    kind = type(getattr(train, "dataset", None)).__name__ if isinstance(train, Items) else "arrays"
    return own_code.name_of_given(kind, "", train.digest(), evaluate.digest())


def _named(item: Any, names: tuple[str, ...], where: str) -> str:
    """The first of `names` that is a key of a dictionary."""
    for each in names:
        if each in item:
            return each
    raise BadInput(f"{where}: has {', '.join(map(str, item.keys()))}; expected one of {', '.join(names)}")
