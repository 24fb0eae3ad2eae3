"""Opens a data set by name: `open_source` gives a `Source`; `missing` tells the user what to provide first.

TensorFlow is imported when a source is opened, not when this module is imported.
"""

import math
from typing import Any

from dgkd_jax import own_code
from dgkd_jax.data import catalogue, own_data
from dgkd_jax.data.mock_source import MockSource
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput

AUGMENTATIONS = ("none", "pad_crop", "pad_crop_flip", "random_resized_crop", "random_resized_crop_fast")
INTERPOLATIONS = ("bilinear", "bicubic")
_MIB = 2**20
_MEMORY_LIMIT = 2**30  # largest encoded training split to keep in memory, bytes


def missing(data: Any) -> str | None:
    """What the user must provide before `open_source` can work. Takes seconds and does not import TensorFlow.

    Args:
        data: the config's section `data`.

    Returns:
        Lines that name what is missing, where it was looked for and the command that provides it; or None.
    """
    if data.mock or own_code.is_given(data.name):
        return None
    if own_code.is_import_path(data.name) and not own_data.is_builder(own_code.load(data.name, key="data.name").value):
        return None
    from dgkd_jax.data import prepare

    try:
        builder = prepare.find_builder(data)
        if not prepare.is_prepared(builder):
            prepare.check_preparable(data, builder)
    except BadInput as problem:
        return str(problem)
    return None


def open_source(data: Any) -> Source:
    """Open a data set, building it first if necessary and possible.

    Args:
        data: the config's section `data`; its keys are explained in `runs/default.py`.

    Raises:
        BadInput: a key has an unusable value, or the data set is missing.
    """
    if own_code.is_given(data.name):
        raise BadInput(
            f"config.data.name={data.name!r} are images from Python, which only Python can give: "
            "dgkd_jax.distill(train=…, evaluate=…)"
        )
    if not own_code.is_import_path(data.name):
        entry = catalogue.find(data.name)
    elif own_data.is_builder(own_code.load(data.name, key="data.name").value):
        from dgkd_jax.data import prepare

        entry = catalogue.of_builder(prepare.find_builder(data))
    elif data.mock:
        raise BadInput(f"config.data.mock=True generates images like those of a known set, not of {data.name!r}")
    else:
        return own_data.open_imported(data)
    shared = what_the_models_see(data, entry)
    return _generated(data, entry, shared) if data.mock else _prepared(data, entry, shared)


def what_the_models_see(data: Any, entry: catalogue.DataSet) -> dict[str, Any]:
    """Name, image_shape, mean and std of a `Source`.

    Raises:
        BadInput: a key has an unusable value.
    """
    size = _check_view(data, entry)
    return {
        "name": data.name,
        "image_shape": (size, size, entry.channels),
        "mean": _per_channel("mean", data.mean, entry),
        "std": _per_channel("std", data.std, entry),
    }


def _generated(data: Any, entry: catalogue.DataSet, shared: dict[str, Any]) -> Source:
    if entry.num_classes is None:
        raise BadInput(
            f"config.data.mock=True: without its files, config.data.name={data.name!r} has no number of classes; "
            "choose another, such as 'imagenet2012'"
        )
    return MockSource(
        **shared,
        num_classes=entry.num_classes,
        num_train=data.mock_train_examples,
        num_eval=data.mock_eval_examples,
        eval_split=entry.eval_split,
    )


def _prepared(data: Any, entry: catalogue.DataSet, shared: dict[str, Any]) -> Source:
    from dgkd_jax.data import prepare, tfds_source

    tfds_source.one_thread_per_operation()
    builder = prepare.prepare(data, prepare.find_builder(data))
    splits = builder.info.splits
    eval_split = entry.eval_split or next(name for name in splits if name != "train")
    if data.shuffle_buffer == 0 and splits["train"].num_bytes > _MEMORY_LIMIT:
        raise BadInput(
            f"config.data.shuffle_buffer=0 would hold all of {data.name} in memory, "
            f"{splits['train'].num_bytes / 2**30:.0f} GiB: give a number of records, such as 16384"
        )
    num_train = _train_examples(data, splits["train"].num_examples)
    return tfds_source.TfdsSource(
        **shared,
        num_classes=builder.info.features["label"].num_classes,
        num_train=num_train,
        num_eval=splits[eval_split].num_examples,
        eval_split=eval_split,
        builder=builder,
        augment=data.augment,
        eval_resize=data.eval_resize,
        eval_interpolation=data.eval_interpolation,
        shuffle_buffer=data.shuffle_buffer,
        readers=data.readers,
        max_bad_images=data.max_bad_images,
        label_noise=data.label_noise,
        on_device=may_be_on_device(data, num_train, shared["image_shape"]),
    )


def may_be_on_device(data: Any, num_train: int, image_shape: tuple[int, int, int]) -> bool:
    """Whether a set's decoded training images are kept in the memory of each device."""
    # Crops that are resized are made by the host; and a set that needs a shuffle buffer does not fit in memory.
    possible = not data.augment.startswith("random_resized_crop") and data.shuffle_buffer == 0
    return possible and num_train * math.prod(image_shape) <= data.on_device_mib * _MIB


def _train_examples(data: Any, there: int) -> int:
    if data.train_examples > there:
        raise BadInput(f"config.data.train_examples={data.train_examples}: {data.name} has {there} training images")
    return data.train_examples or there


def _check_view(data: Any, entry: catalogue.DataSet) -> int:
    """Check the keys for size and augmentation against the data set; returns the side of the model's images, pixels."""
    for key, value, choices in (
        ("augment", data.augment, AUGMENTATIONS),
        ("eval_interpolation", data.eval_interpolation, INTERPOLATIONS),
    ):
        if value not in choices:
            raise BadInput(f"config.data.{key}={value!r} is not allowed: one of {', '.join(map(repr, choices))}")
    for key, value, low in (
        ("image_size", data.image_size, 0),
        ("eval_resize", data.eval_resize, 0),
        ("shuffle_buffer", data.shuffle_buffer, 0),
        ("readers", data.readers, 1),
    ):
        if value < low:
            raise BadInput(f"config.data.{key}={value} is not allowed: {low} or more")
    size = data.image_size or entry.size
    if size is None:
        raise BadInput(
            f"config.data.image_size=0 is not allowed for {data.name}, whose images differ in size: "
            "give pixels, such as 224"
        )
    smallest = data.eval_resize or entry.size
    if smallest is not None and smallest < size:
        raise BadInput(
            f"config.data.image_size={size} is larger than the images, {smallest} pixels: "
            f"set config.data.eval_resize to {size} or more"
        )
    return size


def _per_channel(key: str, given: tuple[float, ...], entry: catalogue.DataSet) -> tuple[float, ...]:
    if not given:
        return getattr(entry, key)
    if len(given) != entry.channels or not all(math.isfinite(value) for value in given):
        raise BadInput(
            f"config.data.{key}={tuple(given)} is not allowed: one number for each of {entry.channels} channels"
        )
    return tuple(given)
