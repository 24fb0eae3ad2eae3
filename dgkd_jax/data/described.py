"""What is known of a data set before any of its files is read: enough to compile the programs that use it."""

import dataclasses
from typing import Any

from dgkd_jax import own_code
from dgkd_jax.data import catalogue, order
from dgkd_jax.data.open import may_be_on_device, open_source, what_the_models_see
from dgkd_jax.data.source import Description
from dgkd_jax.errors import BadInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """A `Description` (see `data/source.py`) of a data set whose files need not be there."""

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    num_eval: int
    eval_split: str
    on_device: bool

    def steps_per_epoch(self, batch_size: int) -> int:
        return order.steps_per_epoch(self.num_train, batch_size)


def describe(data: Any) -> Description:
    """The description of a data set, from the catalogue and the config alone.

    Of a user's own data it believes the config: `image_size`, `num_classes` and `train_examples`, RGB unless `mean`
    has one number.

    Args:
        data: the config's section `data`.

    Raises:
        BadInput: a key has an unusable value, or what only the files say is not in the config.
    """
    if own_code.is_given(data.name) or data.mock:
        return open_source(data)
    own = own_code.is_import_path(data.name)
    entry = _of_own(data) if own else catalogue.find(data.name)
    known = {
        "image_size": data.image_size or entry.size,
        "num_classes": entry.num_classes or data.num_classes,
        "train_examples": data.train_examples or entry.num_train,
    }
    if absent := [key for key, value in known.items() if not value]:
        flags = " ".join(f"--config.data.{key}=N" for key in absent)
        raise BadInput(f"config.data.name={data.name}: only its files say what the programs need to know; give {flags}")
    seen = what_the_models_see(data, entry)
    return Described(
        **seen,
        num_classes=known["num_classes"],
        num_train=known["train_examples"],
        num_eval=entry.num_eval or known["train_examples"],
        eval_split=entry.eval_split or "validation",
        on_device=may_be_on_device(data, known["train_examples"], seen["image_shape"]),
    )


def _of_own(data: Any) -> catalogue.DataSet:
    channels = len(data.mean) or 3
    return catalogue.DataSet(
        num_classes=None, size=None, channels=channels, mean=channels * (0.5,), std=channels * (0.25,), eval_split=None
    )
