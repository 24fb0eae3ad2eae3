"""ShuffleNetV2 at half and at full width: torchvision's networks for ImageNet.

Source: Ma et al., arXiv:1807.11164, table 5. The form for CIFAR is in `shufflenet_cifar`.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import initial_values, layers


def channel_shuffle(x: jax.Array, *, groups: int) -> jax.Array:
    """Interleaves `groups` equal groups of channels: channel i of group g becomes channel i·groups + g.

    Args:
        x: [batch, height, width, channels].
        groups: must divide the channels.

    Source: Zhang et al., arXiv:1707.01083, figure 1.
    """
    grouped = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return grouped.swapaxes(-1, -2).reshape(x.shape)


class ShuffleUnit(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolution of the right half of the channels, then a shuffle of both halves.

    A downsampling unit gives all channels to both sides, each at stride 2; its left side has a depthwise 3x3 and a 1x1
    convolution. `width` output channels. Source: figure 3 (c) and (d) of the paper.

    Attributes: as those of `ShuffleNetV2`.
    """

    width: int
    downsample: bool
    dtype: Any
    batch_norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(layers.BatchNorm, groups=self.batch_norm_groups, dtype=self.dtype)
        pointwise = partial(layers.Conv, self.width // 2, 1, dtype=self.dtype)

        def depthwise(y: jax.Array, name: str) -> jax.Array:
            channels = y.shape[-1]
            stride = 2 if self.downsample else 1
            return layers.Conv(channels, 3, stride, 1, groups=channels, dtype=self.dtype, name=name)(y)

        if self.downsample:
            left = norm(name="left_bn1")(depthwise(x, "left_conv1"), train=train)
            left = nn.relu(norm(name="left_bn2")(pointwise(name="left_conv2")(left), train=train))
            right = x
        else:
            left, right = jnp.split(x, 2, axis=-1)
        right = nn.relu(norm(name="right_bn1")(pointwise(name="right_conv1")(right), train=train))
        right = norm(name="right_bn2")(depthwise(right, "right_conv2"), train=train)
        right = nn.relu(norm(name="right_bn3")(pointwise(name="right_conv3")(right), train=train))
        return channel_shuffle(jnp.concatenate([left, right], -1), groups=2)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 over images [batch, height, width, channels].

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits, features) with
    the pooled activations before the head. Both are in at least float32.

    Attributes:
        num_classes: size of the head.
        widths: channels after each stage.
        sizes: units per stage; the first unit of each stage halves height and width.
        image_shape: the (height, width, channels) that the network is meant for; others work too.
        imagenet_stem: 3x3 convolution at stride 2 and a 3x3 max-pool at stride 2; else one 1x1 convolution.
        dtype: of the computation up to the head; parameters have their own dtype.
        batch_norm_groups: see `layers.BatchNorm`.
    """

    num_classes: int
    widths: tuple[int, ...]
    sizes: tuple[int, ...] = (4, 8, 4)
    image_shape: tuple[int, int, int] = (224, 224, 3)
    imagenet_stem: bool = True
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.TORCH_DEFAULTS

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        norm = partial(layers.BatchNorm, groups=self.batch_norm_groups, dtype=self.dtype)
        side, stride, padding = (3, 2, 1) if self.imagenet_stem else (1, 1, 0)
        x = layers.Conv(24, side, stride, padding, dtype=self.dtype, name="stem_conv")(images)
        x = nn.relu(norm(name="stem_bn")(x, train=train))
        if self.imagenet_stem:
            x = layers.max_pool(x, window=3, stride=2, padding=1)
        for stage, (width, size) in enumerate(zip(self.widths, self.sizes, strict=True), start=2):
            for index in range(size):
                x = ShuffleUnit(
                    width=width,
                    downsample=index == 0,
                    dtype=self.dtype,
                    batch_norm_groups=self.batch_norm_groups,
                    name=f"stage{stage}_{index}",
                )(x, train=train)
        x = layers.Conv(1024, 1, dtype=self.dtype, name="last_conv")(x)
        x = nn.relu(norm(name="last_bn")(x, train=train))
        pooled = layers.global_average_pool(x)
        logits = layers.Linear(self.num_classes, dtype=pooled.dtype, name="fc")(pooled)
        return (logits, pooled) if features else logits


MODELS = {
    "shufflenet_v2_x0_5": partial(ShuffleNetV2, widths=(48, 96, 192)),
    "shufflenet_v2_x1_0": partial(ShuffleNetV2, widths=(116, 232, 464)),
}
