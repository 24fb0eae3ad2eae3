"""Opens foreign test sets, TFDS sets by name and folders of images, and maps their labels to the run's classes.

Classes are matched by name (class folders, or TFDS's class names: ImageNet's are wnids). If the set has only some of
the network's classes, the network must choose among these, as the authors of ImageNet-A and ImageNet-R do (Hendrycks
et al., arXiv:1907.07174 and arXiv:2006.16241): accuracies without this restriction are lower and cannot be compared
with the published ones.
"""

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dgkd_jax.data import catalogue, prepare
from dgkd_jax.data.builders import image_files
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput, closest, did_you_mean

# These have 200 of ImageNet's classes but declare all 1,000 in TFDS; the labels show which ones occur.
_PARTIAL = ("imagenet_a", "imagenet_r")


class TestSet(NamedTuple):
    """A split to evaluate on.

    Attributes:
        source: gives `eval_batches`, with the set's own labels.
        classes: int32 `[classes of the set]`, the network's class for each class of the set.
        restricted_to: the network's classes to choose among, ascending; None: all.
    """

    __test__ = False  # not a test: for pytest

    source: Source
    classes: np.ndarray
    restricted_to: tuple[int, ...] | None

    def batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """As `Source.eval_batches`, with labels that number the network's classes."""
        for batch in self.source.eval_batches(batch_size=batch_size):
            yield {**batch, "label": self.classes[batch["label"]]}


def open_tfds(name: str, split: str, *, run: Source, data: Any) -> TestSet:
    """Open a split of a TFDS data set, building it first if necessary and possible.

    Args:
        name: of the set and its config, for example `cifar10_corrupted/fog_1`.
        split: its name; '' means `test`, else `validation`, else the only split.
        run: what the networks were trained on.
        data: the section `data` of the run's config.

    Raises:
        BadInput: no such set, config or split; it has no labelled images; its classes are not the networks'; or it
            cannot be built.
    """
    data_dir = epath.Path(data.dir or tfds.core.constants.DATA_DIR).expanduser()
    family, known = name.split("/")[0], tfds.list_builders(with_community_datasets=False)
    if family not in known and not (data_dir / family).exists():  # else TFDS would ask Google's storage
        raise BadInput(f"tfds:{name}: TFDS has no data set of this name{did_you_mean(family, known, count=3)}")
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise BadInput(f"tfds:{name}: neither TFDS nor {data_dir / family} has a data set of this name") from error
    except ValueError as error:
        configurations = [config.name for config in tfds.builder_cls(name.split("/")[0]).BUILDER_CONFIGS]
        close = closest(name.partition("/")[2], configurations, count=3) or configurations[:3]
        raise BadInput(
            f"tfds:{name}: no such configuration of {name.split('/')[0]}; nearest: {', '.join(close)}"
        ) from error
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not isinstance(features["label"], tfds.features.ClassLabel):
        raise BadInput(f"tfds:{name}: no set of images with one label each; its features are {', '.join(features)}")
    _prepare(name, builder, data)
    split = _split(name, builder, split)
    test_set = _open(f"tfds:{name}", builder, split, run=run, data=data)
    if builder.name in _PARTIAL:
        labels = builder.as_dataset(split=split, decoders=tfds.decode.PartialDecoding({"label": True}))
        present = np.unique([int(example["label"]) for example in labels.as_numpy_iterator()])
        return test_set._replace(restricted_to=tuple(sorted(map(int, test_set.classes[present]))))
    return test_set


def open_folder(folder: str, *, run: Source, data: Any) -> TestSet:
    """Open FOLDER/<class>/* or FOLDER/test|validation|val/<class>/*; copied once, as `image_folder` is.

    Args:
        folder: with class folders named like the run's classes.
        run: what the networks were trained on.
        data: the section `data` of the run's config.

    Raises:
        BadInput: no images there, or the classes are not the networks'.
    """
    path = Path(folder).expanduser()
    try:
        listing = image_files.list_test_folder(path)
    except BadInput as error:
        raise BadInput(f"image_folder:{folder}: {error}") from error
    data_dir = epath.Path(data.dir or tfds.core.constants.DATA_DIR).expanduser()
    data_dir = data_dir / "image_folder" / listing.fingerprint(path)
    builder = image_files.ImageFolder(listing=listing, data_dir=data_dir)
    match_classes(listing.classes, _class_names(data), run.num_classes, what=f"image_folder:{folder}")  # before copying
    if not prepare.is_prepared(builder):
        image_files.check_images(listing, allowed=0)
        _build(f"image_folder:{folder}", builder, data)
        builder = image_files.ImageFolder(listing=listing, data_dir=data_dir)
    return _open(f"image_folder:{folder}", builder, "test", run=run, data=data)


def match_classes(
    names: tuple[str, ...], of_network: tuple[str, ...] | None, num_classes: int, *, what: str
) -> tuple[np.ndarray, tuple[int, ...] | None]:
    """The network's class for each class of a set, and the restriction if these are not all.

    Args:
        names: of the set's classes, in label order.
        of_network: names of the network's classes; None: unknown.
        num_classes: of the network.
        what: name of the set, for messages.

    Returns:
        `TestSet.classes` and `TestSet.restricted_to`. Matched by name if both sides have names; by number if one side
        has none (or numbers as names) and both have equally many.

    Raises:
        BadInput: a class that the network lacks; or different numbers of classes without names.
    """
    same_number = len(names) == num_classes
    if of_network is not None and set(names) <= set(of_network) and (same_number or not _numbers(names)):
        number_of = {name: number for number, name in enumerate(of_network)}
        classes = np.array([number_of[name] for name in names], np.int32)
        return classes, None if same_number else tuple(sorted(map(int, classes)))
    if same_number and (_numbers(names) or of_network is None or _numbers(of_network)):
        return np.arange(num_classes, dtype=np.int32), None
    if of_network is None or _numbers(names):
        raise BadInput(f"{what} has {len(names)} classes, the networks have {num_classes}, and no names tell which")
    strange = next(name for name in names if name not in of_network)
    close = closest(strange, of_network)
    raise BadInput(
        f"{what}: its class {strange!r} is none of the networks' {num_classes}"
        + (f"; the nearest is {close[0]!r}" if close else f" ({', '.join(of_network[:3])}, …)")
    )


def _numbers(names: tuple[str, ...]) -> bool:
    return tuple(names) == tuple(map(str, range(len(names))))


def _class_names(data: Any) -> tuple[str, ...] | None:
    if data.mock and catalogue.find(data.name).num_classes is None:
        return None
    return tuple(prepare.find_builder(data).info.features["label"].names)


def _open(name: str, builder: tfds.core.DatasetBuilder, split: str, *, run: Source, data: Any) -> TestSet:
    from dgkd_jax.data.tfds_source import TfdsSource

    names = tuple(builder.info.features["label"].names)
    classes, restricted_to = match_classes(names, _class_names(data), run.num_classes, what=name)
    height, width, _ = run.image_shape
    made_for_this_size = builder.info.features["image"].shape[:2] == (height, width)  # as ImageNet-C: cropped
    source = TfdsSource(
        name=name,
        num_classes=len(names),
        image_shape=run.image_shape,
        mean=run.mean,
        std=run.std,
        num_train=0,
        num_eval=builder.info.splits[split].num_examples,
        eval_split=split,
        builder=builder,
        augment="none",
        eval_resize=0 if made_for_this_size else data.eval_resize or min(height, width),
        eval_interpolation=data.eval_interpolation,
        shuffle_buffer=1,  # streamed: each evaluation reads it once
        readers=1,
    )
    return TestSet(source, classes, restricted_to)


def _split(name: str, builder: tfds.core.DatasetBuilder, split: str) -> str:
    splits = list(builder.info.splits)
    if split in splits:
        return split
    usual = [usual for usual in ("test", "validation") if usual in splits] or splits
    if not split and (len(usual) == 1 or usual[0] == "test"):
        return usual[0]
    raise BadInput(f"tfds:{name}: " + (f"no split {split!r}; " if split else "") + f"choose :{', :'.join(splits)}")


def _prepare(name: str, builder: tfds.core.DatasetBuilder, data: Any) -> None:
    if prepare.is_prepared(builder):
        return
    hosts = {urlparse(url).hostname for url in builder.url_infos or ()}
    if not data.download:
        reason = "config.data.download=False"
    elif hosts and not any(prepare.resolves(host) for host in sorted(hosts)):
        reason = f"{min(hosts)}, from where it is downloaded, cannot be reached from here"
    else:
        _build(f"tfds:{name}", builder, data)
        return
    raise BadInput(
        f"tfds:{name} is missing: looked for it in {builder.data_path}, and {reason}. Build it where there is a "
        f"network (tfds.builder({name!r}).download_and_prepare() in Python), or name the folder with --data_dir=DIR"
    )


def _build(what: str, builder: tfds.core.DatasetBuilder, data: Any) -> None:
    print(f"building {what} in {builder.data_path} (once)", file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    manual_dir = epath.Path(data.manual_dir or builder.data_dir_root / "downloads" / "manual").expanduser()
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS's banner
            builder.download_and_prepare(download_config=config)
    except (OSError, AssertionError, tfds.download.DownloadError, prepare.NonMatchingChecksumError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{what} could not be built in {builder.data_path}: {first_line}") from error
