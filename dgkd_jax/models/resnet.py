"""ResNet-18/34/50/101: torchvision's networks for ImageNet, and their CIFAR forms (`…_cifar`).

Source: He et al., arXiv:1512.03385; the stride of a bottleneck sits on its 3x3 convolution (torchvision).
The CIFAR form replaces the stem by one 3x3 convolution at stride 1 and drops the max-pool; mdistiller and
many others train it on 32-pixel images.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import initial_values, layers


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; `width` output channels.

    Attributes: as those of `ResNet`; `stride` is that of the first convolution and of the shortcut.
    """

    width: int
    stride: int
    dtype: Any
    batch_norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = partial(layers.Conv, dtype=self.dtype)
        norm = partial(layers.BatchNorm, groups=self.batch_norm_groups, dtype=self.dtype)
        y = conv(self.width, 3, stride=self.stride, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y, train=train))
        y = conv(self.width, 3, padding=1, name="conv2")(y)
        y = norm(name="bn2")(y, train=train)
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            x = conv(self.width, 1, stride=self.stride, name="downsample_0")(x)
            x = norm(name="downsample_1")(x, train=train)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a shortcut; 4 * `width` output channels.

    Attributes: as those of `ResNet`; `stride` is that of the 3x3 convolution and of the shortcut.
    """

    width: int
    stride: int
    dtype: Any
    batch_norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = partial(layers.Conv, dtype=self.dtype)
        norm = partial(layers.BatchNorm, groups=self.batch_norm_groups, dtype=self.dtype)
        y = conv(self.width, 1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y, train=train))
        y = conv(self.width, 3, stride=self.stride, padding=1, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y, train=train))
        y = conv(4 * self.width, 1, name="conv3")(y)
        y = norm(name="bn3")(y, train=train)
        if self.stride != 1 or x.shape[-1] != y.shape[-1]:
            x = conv(4 * self.width, 1, stride=self.stride, name="downsample_0")(x)
            x = norm(name="downsample_1")(x, train=train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Residual network over images [batch, height, width, channels].

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits,
    features) with the pooled activations before the head. Both are in at least float32.

    Attributes:
        num_classes: size of the head.
        block: `BasicBlock` or `Bottleneck`.
        stage_sizes: blocks per stage. Each stage but the first halves height and width.
        widths: `width` of the blocks of each stage.
        stem_width: channels after the first convolution.
        image_shape: the (height, width, channels) that the network is meant for; others work too.
        imagenet_stem: 7x7 convolution at stride 2 and a 3x3 max-pool at stride 2; else one 3x3 convolution.
        dtype: of the computation up to the head; parameters have their own dtype.
        batch_norm_groups: see `layers.BatchNorm`.
    """

    num_classes: int
    block: type[nn.Module]
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_width: int = 64
    image_shape: tuple[int, int, int] = (224, 224, 3)
    imagenet_stem: bool = True
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.TORCHVISION_CNN

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        norm = layers.BatchNorm(groups=self.batch_norm_groups, dtype=self.dtype, name="bn1")
        side, stride, padding = (7, 2, 3) if self.imagenet_stem else (3, 1, 1)
        stem = layers.Conv(self.stem_width, side, stride, padding, dtype=self.dtype, name="conv1")
        x = nn.relu(norm(stem(images), train=train))
        if self.imagenet_stem:
            x = layers.max_pool(x, window=3, stride=2, padding=1)
        for stage, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            for index in range(size):
                x = self.block(
                    width=width,
                    stride=2 if stage > 0 and index == 0 else 1,
                    dtype=self.dtype,
                    batch_norm_groups=self.batch_norm_groups,
                    name=f"layer{stage + 1}_{index}",
                )(x, train=train)
        pooled = layers.global_average_pool(x)
        logits = layers.Linear(self.num_classes, dtype=pooled.dtype, name="fc")(pooled)
        return (logits, pooled) if features else logits


_IMAGENET = {
    "resnet18": partial(ResNet, block=BasicBlock, stage_sizes=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block=BasicBlock, stage_sizes=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, block=Bottleneck, stage_sizes=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, block=Bottleneck, stage_sizes=(3, 4, 23, 3)),
}
MODELS = _IMAGENET | {
    f"{name}_cifar": partial(constructor, imagenet_stem=False, image_shape=(32, 32, 3))
    for name, constructor in _IMAGENET.items()
}
