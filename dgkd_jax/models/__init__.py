"""Image classifiers by name.

    model = models.create("resnet18", num_classes=1000)
    variables = models.initialise(model, (224, 224, 3), seed=0)
    logits = model.apply(variables, images)                                      # evaluation
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])

Images are [batch, height, width, channels] floats, already normalised. Each family has its own file, which
ends in its table `MODELS`: name -> constructor. `model.init` of Flax only gives shapes here, filled with NaN:
compiling it takes seconds, so the values come from `initialise`.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

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
    """The network called `name`, without values.

    Args:
        name: one of `NAMES`.
        num_classes: size of the head, at least 1.
        dtype: of the computation: bfloat16, float32 or float64. Parameters keep their own; the head computes
            in, and logits and features leave in, at least float32.
        batch_norm_groups: in training, BatchNorm takes its statistics within this many equal, consecutive
            parts of the batch; it must divide the batch. See `layers.BatchNorm`.

    Returns:
        A Linen module: `apply(variables, images, train=False, features=False)` gives logits [batch,
        num_classes], or (logits, features [batch, channels]). With `train=True` pass
        `mutable=["batch_stats"]`.

    Raises:
        ValueError: unknown name, or a knob out of range.
    """
    if name not in _CONSTRUCTORS:
        near = difflib.get_close_matches(str(name), NAMES, n=3, cutoff=0.5)
        nearest = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"unknown model {name!r}.{nearest} All names: dgkd_jax.models.NAMES")
    for knob, value in {"num_classes": num_classes, "batch_norm_groups": batch_norm_groups}.items():
        if value < 1:
            raise ValueError(f"{knob} must be at least 1, got {value} for model {name!r}")
    constructor = _CONSTRUCTORS[name]
    return constructor(num_classes=num_classes, dtype=jnp.dtype(dtype), batch_norm_groups=batch_norm_groups)


def shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> dict:
    """The variables as `jax.ShapeDtypeStruct`, for images of (height, width, channels); nothing is run."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(model.init, key, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))


def initialise(model: nn.Module, image_shape: tuple[int, int, int], seed: int) -> dict:
    """Fresh variables by the family's own rules, drawn with numpy: nothing is compiled.

    Args:
        model: from `create`.
        image_shape: (height, width, channels) of the images.
        seed: 0 <= seed < 2**64. A leaf's values depend only on the seed, its path and its shape.

    Returns:
        {"params": …, "batch_stats": …}, float32 numpy arrays; no "batch_stats" where there is no BatchNorm.
    """
    return initial_values.fill(shapes(model, image_shape), model.initial_values, seed)


def classifier(variables: dict) -> Any:
    """The weights of the last layer, `[channels of the features, num_classes]`: logits = features @ weights + bias.

    Raises:
        ValueError: not the variables of a network from `create`.
    """
    # In every family the head is the one linear layer that is no part of a block.
    layers = [layer for layer in variables["params"].values() if isinstance(layer, Mapping) and "kernel" in layer]
    matrices = [layer["kernel"] for layer in layers if layer["kernel"].ndim == 2]
    if len(matrices) != 1:
        raise ValueError(f"expected one linear layer outside the blocks, the head, found {len(matrices)}")
    return matrices[0]
