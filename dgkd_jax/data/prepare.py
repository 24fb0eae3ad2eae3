"""Finds and builds TFDS data sets: python -m dgkd_jax.data.prepare NAME [--data_dir=DIR].

Nothing here imports TensorFlow before a set is built: TFDS itself loads it late. The command stands in for
`tfds build`, which does not start without apache-beam.
"""

import argparse
import contextlib
import io
import os
import shlex
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from dgkd_jax import own_code
from dgkd_jax.data import catalogue, quiet
from dgkd_jax.data.builders import fashion_mnist, image_files, mnist5k
from dgkd_jax.data.hosts import resolves
from dgkd_jax.errors import ArgumentParser, BadInput, exit_code_of

# A running build writes at least this often; an older unfinished one is abandoned, not another process's.
_ABANDONED_S = 3600

_IMAGENET_FILES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def find_builder(data: Any) -> tfds.core.DatasetBuilder:
    """The TFDS builder of a data set, which may not be built yet.

    Args:
        data: the config's section `data`.

    Raises:
        BadInput: no such data set; or it is a folder of images, which its files define, and they are missing.
    """
    data_dir = epath.Path(data.dir or tfds.core.constants.DATA_DIR).expanduser()
    if own_code.is_import_path(data.name):
        return own_code.load(data.name, key="data.name").called(key="data.name", data_dir=data_dir)
    catalogue.find(data.name)
    match data.name:
        case "mnist5k":
            return mnist5k.Mnist5k(data_dir=data_dir)
        case "fashion_mnist_local":
            folder = Path(data.manual_dir or fashion_mnist.DEFAULT_FOLDER).expanduser()
            return fashion_mnist.FashionMnistLocal(folder=folder, data_dir=data_dir)
        case "tiny_imagenet":
            folder = data_dir / "downloads" / "manual" / "tiny-imagenet-200"
            folder = Path(data.manual_dir or folder).expanduser()
            return image_files.TinyImagenet(folder=folder, data_dir=data_dir)
        case "image_folder":
            if not data.manual_dir:
                raise BadInput("config.data.name='image_folder' needs the folder: --config.data.manual_dir=FOLDER")
            folder = Path(data.manual_dir).expanduser()
            listing = image_files.list_folder(folder, holdout=data.holdout)
            # One built copy per content: a folder that has changed is read again.
            data_dir = data_dir / "image_folder" / listing.fingerprint(folder)
            return image_files.ImageFolder(listing=listing, data_dir=data_dir)
        case _:
            return tfds.builder(data.name, data_dir=data_dir)


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    return (builder.data_path / "dataset_info.json").exists()


def check_preparable(data: Any, builder: tfds.core.DatasetBuilder) -> None:
    """Check in advance that everything needed to build the set is there.

    Raises:
        BadInput: names what is missing, where it was expected, and the command that provides it.
    """
    match data.name:
        case "mnist5k":
            mnist5k.locate()
        case "fashion_mnist_local":
            fashion_mnist.locate(builder.folder)
        case "tiny_imagenet":
            image_files.list_tiny_imagenet(builder.folder)
        case "image_folder":
            pass  # `find_builder` has already listed its files
        case "imagenet2012":
            _check_imagenet(builder, _manual_dir(data, builder))
        case own if own_code.is_import_path(own):
            pass  # a builder of the user's own says itself what it lacks
        case _:
            _check_download(data, builder)


def prepare(data: Any, builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    """Build the set if it is not built yet.

    Returns:
        A builder that can be read from.

    Raises:
        BadInput: it cannot be built: files are missing, a download failed, or the disk is full.
    """
    if is_prepared(builder):
        return builder
    check_preparable(data, builder)
    print(
        f"building the data set {data.name} in {builder.data_dir} (once; elsewhere: --config.data.dir=DIR)",
        file=sys.stderr,
        flush=True,
    )
    _remove_abandoned(builder)
    if data.name in ("image_folder", "tiny_imagenet"):
        is_folder = data.name == "image_folder"
        listing = builder.listing if is_folder else image_files.list_tiny_imagenet(builder.folder)
        image_files.check_images(listing, allowed=data.max_bad_images)
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(manual_dir=_manual_dir(data, builder))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS's banner
            builder.download_and_prepare(download_config=config)
    except (OSError, tfds.download.DownloadError, NonMatchingChecksumError) as error:
        if not is_prepared(builder):
            raise BadInput(
                f"The data set {data.name} could not be built in {builder.data_dir}: {_first_line(error)}\n"
                f"  Try again, here or elsewhere:  {_command(data.name, builder, data.manual_dir)}"
            ) from error
        # Another process of this run was faster and has moved its copy to the same place.
    if not is_prepared(builder):
        raise BadInput(f"{builder.data_dir} is not a complete data set: remove this folder and start again")
    size = sum(path.stat().length for path in builder.data_path.iterdir())
    print(f"built: {size / 1e6:,.1f} MB in {builder.data_dir}", file=sys.stderr, flush=True)
    return find_builder(data)


def _remove_abandoned(builder: tfds.core.DatasetBuilder) -> None:
    """Remove what killed builds of this set left: TFDS does not, and it can be as large as the set."""
    for folder in builder.data_path.parent.glob("incomplete.*"):
        newest = max(path.stat().mtime for path in (folder, *folder.glob("*")))
        if time.time() - newest > _ABANDONED_S:
            print(f"removing {folder}, left by a build that did not end", file=sys.stderr, flush=True)
            folder.rmtree()


def statistics(builder: tfds.core.DatasetBuilder) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel over all pixels of the training split, in units of pixel/255."""
    count, total, squares = 0, 0.0, 0.0
    for example in builder.as_dataset(split="train").as_numpy_iterator():
        pixels = example["image"].reshape(-1, example["image"].shape[-1]) / 255
        count += len(pixels)
        total += pixels.sum(0)
        squares += (pixels**2).sum(0)
    mean = total / count
    return mean, np.sqrt(squares / count - mean**2)


def _manual_dir(data: Any, builder: tfds.core.DatasetBuilder) -> epath.Path:
    """The folder in which TFDS looks for files that it cannot download."""
    return epath.Path(data.manual_dir or builder.data_dir_root / "downloads" / "manual").expanduser()


def _check_imagenet(builder: tfds.core.DatasetBuilder, manual_dir: epath.Path) -> None:
    absent = [name for name in _IMAGENET_FILES if not (manual_dir / name).exists()]
    if absent:
        raise BadInput(
            f"The data set imagenet2012 is missing: looked for it in {builder.data_dir},\n"
            f"  and to build it for {' and '.join(absent)} in {manual_dir}.\n"
            "  Provide it:  get both tar files from https://image-net.org/download-images into a folder TARS, then\n"
            f"    {_command('imagenet2012', builder, 'TARS')}\n"
            "  Or name the TFDS folder where it has been built with --config.data.dir=DIR"
        )


def _check_download(data: Any, builder: tfds.core.DatasetBuilder) -> None:
    host = catalogue.find(data.name).host
    downloads = builder.data_dir_root / "downloads"
    fetched = any(path.is_file() for folder in (downloads, downloads / data.name) for path in folder.glob("*"))
    if not data.download:
        reason = "config.data.download=False"
    elif fetched or urllib.request.getproxies() or resolves(host):  # a proxy resolves names itself
        return
    else:
        reason = f"{host}, from where it is downloaded, cannot be reached from here"
    raise BadInput(
        f"The data set {data.name} is missing: looked for it in {builder.data_dir}, and {reason}.\n"
        f"  Provide it, where there is a network:  {_command(data.name, builder)}\n"
        "  Or name the TFDS folder where it has been built with --config.data.dir=DIR"
    )


def _command(name: str, builder: tfds.core.DatasetBuilder, manual_dir: str = "") -> str:
    command = f"python -m dgkd_jax.data.prepare {name} --data_dir={shlex.quote(os.fspath(builder.data_dir_root))}"
    return f"{command} --manual_dir={shlex.quote(manual_dir)}" if manual_dir else command


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m dgkd_jax.data.prepare",
        description="Build a data set.",
        example="python -m dgkd_jax.data.prepare mnist5k --statistics",
    )
    parser.add_argument("name", help=", ".join(catalogue.NAMES))
    parser.add_argument("--data_dir", default="", help="TFDS's folder; default $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--manual_dir", default="", help="folder with files that cannot be downloaded")
    parser.add_argument("--max_bad_images", type=int, default=0, help="damaged training images that are tolerated; 0")
    parser.add_argument("--holdout", type=float, default=0.1, help="share of a folder of classes for validation; 0.1")
    parser.add_argument("--statistics", action="store_true", help="mean and deviation of the training pixels")

    def work() -> None:
        _build(parser.parse_args(argv))

    return exit_code_of(work)


def _build(options: argparse.Namespace) -> None:
    quiet.for_good()
    data = SimpleNamespace(
        name=options.name,
        dir=options.data_dir,
        manual_dir=options.manual_dir,
        max_bad_images=options.max_bad_images,
        holdout=options.holdout,
        download=True,
    )
    builder = prepare(data, find_builder(data))
    sizes = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
    print(f"{options.name} in {builder.data_dir}: {sizes}")
    if options.statistics:
        mean, std = statistics(builder)
        print(f"mean {np.round(mean, 4).tolist()}, std {np.round(std, 4).tolist()}")


if __name__ == "__main__":
    sys.exit(main())
