"""MobileNetV2: torchvision's network for ImageNet, and mdistiller's of half width for 32-pixel images.

Source: Sandler et al., arXiv:1801.04381, table 2. The CIFAR form has half the channels, stride 1 in the third row of
that table, an expanding convolution (1:1) in the first block too, and ReLU instead of ReLU6.

Training differs in one point: torchvision drops 20 % of the features before the head. Dropout is left out here, so a
step needs no random numbers. (mdistiller has none either.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import initial_values, layers

_EXPANSION = 6  # in all stages except the first


class InvertedResidual(nn.Module):
    """1x1 convolution that widens, depthwise 3x3, 1x1 that narrows; a shortcut if input and output shapes are equal.

    Attributes:
        width: output channels.
        stride: of the depthwise convolution.
        expanded: channels of the depthwise convolution.
        expands: whether the first 1x1 convolution is there.
        activation, dtype, batch_norm_groups: as those of `MobileNetV2`.
    """

    width: int
    stride: int
    expanded: int
    expands: bool
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any
    batch_norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(layers.BatchNorm, groups=self.batch_norm_groups, dtype=self.dtype)
        conv = partial(layers.Conv, dtype=self.dtype)
        y = x
        if self.expands:
            y = conv(self.expanded, 1, name="expand")(y)
            y = self.activation(norm(name="expand_bn")(y, train=train))
        y = conv(self.expanded, 3, stride=self.stride, padding=1, groups=self.expanded, name="depthwise")(y)
        y = self.activation(norm(name="depthwise_bn")(y, train=train))
        y = conv(self.width, 1, name="project")(y)
        y = norm(name="project_bn")(y, train=train)
        return x + y if self.stride == 1 and x.shape[-1] == self.width else y


class MobileNetV2(nn.Module):
    """MobileNetV2 over images [batch, height, width, channels].

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits, features) with
    the pooled activations before the head. Both are in at least float32.

    Attributes:
        num_classes: size of the head.
        stem_width: channels after the first convolution.
        stages: (channels, blocks, stride of the first block) of each stage.
        expands_everywhere: the first stage has the expanding convolution too.
        activation: after every convolution except those that narrow.
        image_shape: the (height, width, channels) that the network is meant for; others work too.
        dtype: of the computation up to the head; parameters have their own dtype.
        batch_norm_groups: see `layers.BatchNorm`.
    """

    num_classes: int
    stem_width: int
    stages: tuple[tuple[int, int, int], ...]
    expands_everywhere: bool
    activation: Callable[[jax.Array], jax.Array]
    image_shape: tuple[int, int, int]
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.NARROW_NORMAL_HEAD

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        norm = partial(layers.BatchNorm, groups=self.batch_norm_groups, dtype=self.dtype)
        x = layers.Conv(self.stem_width, 3, 2, 1, dtype=self.dtype, name="stem_conv")(images)
        x = self.activation(norm(name="stem_bn")(x, train=train))
        for stage, (width, size, stride) in enumerate(self.stages):
            for index in range(size):
                x = InvertedResidual(
                    width=width,
                    stride=stride if index == 0 else 1,
                    expanded=x.shape[-1] * (_EXPANSION if stage > 0 else 1),
                    expands=stage > 0 or self.expands_everywhere,
                    activation=self.activation,
                    dtype=self.dtype,
                    batch_norm_groups=self.batch_norm_groups,
                    name=f"stage{stage}_{index}",
                )(x, train=train)
        x = layers.Conv(1280, 1, dtype=self.dtype, name="last_conv")(x)
        x = self.activation(norm(name="last_bn")(x, train=train))
        pooled = layers.global_average_pool(x)
        logits = layers.Linear(self.num_classes, dtype=pooled.dtype, name="fc")(pooled)
        return (logits, pooled) if features else logits


MODELS = {
    "mobilenet_v2": partial(
        MobileNetV2,
        stem_width=32,
        stages=((16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)),
        expands_everywhere=False,
        activation=nn.relu6,
        image_shape=(224, 224, 3),
    ),
    "mobilenet_v2_half_cifar": partial(
        MobileNetV2,
        stem_width=16,
        stages=((8, 1, 1), (12, 2, 1), (16, 3, 2), (32, 4, 2), (48, 3, 1), (80, 3, 2), (160, 1, 1)),
        expands_everywhere=True,
        activation=nn.relu,
        image_shape=(32, 32, 3),
    ),
}
