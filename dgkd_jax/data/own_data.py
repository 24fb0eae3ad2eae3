"""Opens a user's own data: objects from Python, or what an import path in `data.name` leads to."""

from collections.abc import Mapping
from typing import Any

from dgkd_jax import own_code
from dgkd_jax.data.item_source import open_items
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput

_WANTED = 'a pair (train, evaluate), {"train": …, "evaluate": …}, a TFDS builder, or a Source'


def open_given(train: Any, evaluate: Any, data: Any) -> Source:
    """A source of two splits.

    Args:
        train: (images, labels), anything with a length and items, or a `tf.data.Dataset`; or a `Source`, with
            `evaluate` None.
        evaluate: likewise; None: a part of `train` (`data.holdout`).
        data: the config's section `data`.

    Raises:
        BadInput: the data cannot be used.
    """
    if hasattr(train, "train_batches"):
        return train
    if hasattr(train, "element_spec"):
        from dgkd_jax.data.stream_source import open_streams

        return open_streams(train, evaluate, data)
    return open_items(train, evaluate, data)


def imported(data: Any) -> Any:
    """What the import path `data.name` leads to, called if it is a function.

    Raises:
        BadInput: it cannot be imported or called.
    """
    found = own_code.load(data.name, key="data.name")
    return found.called(key="data.name") if callable(found.value) and not is_builder(found.value) else found.value


def is_builder(value: Any) -> bool:
    """Whether this is the class of a TFDS builder."""
    return isinstance(value, type) and hasattr(value, "download_and_prepare") and hasattr(value, "as_dataset")


def open_imported(data: Any) -> Source:
    """The source that an import path leads to.

    Raises:
        BadInput: as `imported`; or it is nothing that a source can be made of.
    """
    found = imported(data)
    if isinstance(found, Mapping) and "train" in found:
        return open_given(found["train"], found.get("evaluate"), data)
    if isinstance(found, tuple) and len(found) == 2:
        return open_given(*found, data)
    if hasattr(found, "train_batches"):
        return found
    raise BadInput(f"config.data.name={data.name!r} gives a {type(found).__name__}; expected {_WANTED}")
