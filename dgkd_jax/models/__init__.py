"""Image classifiers by name.

    model = models.create("resnet18", num_classes=1000)
    variables = models.initialise(model, (224, 224, 3), seed=0)
    logits = model.apply(variables, images)                                      # evaluation
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])

Images are [batch, height, width, channels] floats, already normalised. Each family has its own file with a table
`MODELS`: name -> constructor. Flax's `model.init` gives the shapes only, filled with NaN; use `initialise` for the
values: it draws them with numpy, because compiling `init` takes seconds.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.errors import did_you_mean
from dgkd_jax.models import (
    convnext,
    efficientnet_lite,
    initial_values,
    mobilenet_v2,
    resnet,
    resnet_cifar,
    shufflenet_cifar,
    shufflenet_v2,
    small,
    swin,
    vgg,
    vit,
    wrn,
)

_CONSTRUCTORS = {
    **resnet_cifar.MODELS,
    **resnet.MODELS,
    **vgg.MODELS,
    **wrn.MODELS,
    **shufflenet_cifar.MODELS,
    **shufflenet_v2.MODELS,
    **mobilenet_v2.MODELS,
    **efficientnet_lite.MODELS,
    **vit.MODELS,
    **convnext.MODELS,
    **swin.MODELS,
    **small.MODELS,
}
NAMES: tuple[str, ...] = tuple(_CONSTRUCTORS)


def create(name: str, *, num_classes: int, dtype: Any = jnp.float32, batch_norm_groups: int = 1) -> nn.Module:
    """The network called `name`, without variables.

    Args:
        name: one of `NAMES`.
        num_classes: size of the head, at least 1.
        dtype: of the computation: bfloat16, float32 or float64. Parameters have their own dtype. The head, logits
            and features have at least float32.
        batch_norm_groups: in training, BatchNorm normalises this many equal, consecutive parts of the batch
            separately; it must divide the batch. See `layers.BatchNorm`.

    Returns:
        A Linen module: `apply(variables, images, train=False, features=False)` gives logits [batch,
        num_classes], or (logits, features [batch, channels]). With `train=True` pass
        `mutable=["batch_stats"]`.

    Raises:
        ValueError: unknown name, or an argument out of range.
    """
    if name not in _CONSTRUCTORS:
        raise ValueError(f"unknown model {name!r}{did_you_mean(name, NAMES, count=3)} All names: dgkd_jax.models.NAMES")
    for knob, value in {"num_classes": num_classes, "batch_norm_groups": batch_norm_groups}.items():
        if value < 1:
            raise ValueError(f"{knob} must be at least 1, got {value} for model {name!r}")
    constructor = _CONSTRUCTORS[name]
    return constructor(num_classes=num_classes, dtype=jnp.dtype(dtype), batch_norm_groups=batch_norm_groups)


def shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> dict:
    """The variables as `jax.ShapeDtypeStruct`s, for images of (height, width, channels). Runs nothing."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(model.init, key, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))


def initialise(model: nn.Module, image_shape: tuple[int, int, int], seed: int) -> dict:
    """Initial variables by the family's rules, drawn with numpy; nothing is compiled.

    Args:
        model: from `create`.
        image_shape: (height, width, channels) of the images.
        seed: 0 <= seed < 2**64. A leaf's values depend only on the seed, its path and its shape.

    Returns:
        {"params": …, "batch_stats": …}, float32 numpy arrays; without "batch_stats" if there is no BatchNorm.
    """
    return initial_values.fill(shapes(model, image_shape), model.initial_values, seed)


def classifier(variables: dict) -> Any:
    """The weight matrix of the last layer, `[channels of the features, num_classes]`: logits = features @ it + bias.

    Raises:
        ValueError: the variables are not those of a network from `create`.
    """
    # In every family the head is the only linear layer outside a block.
    layers = [layer for layer in variables["params"].values() if isinstance(layer, Mapping) and "kernel" in layer]
    matrices = [layer["kernel"] for layer in layers if layer["kernel"].ndim == 2]
    if len(matrices) != 1:
        raise ValueError(f"expected one linear layer outside the blocks, the head, found {len(matrices)}")
    return matrices[0]
