"""ShuffleNetV1 (three groups) and V2 (full width) for 32-pixel images, as RepDistiller and mdistiller build them.

Sources: Zhang et al., arXiv:1707.01083, table 1, g = 3; Ma et al., arXiv:1807.11164. Both start with one 1x1
convolution instead of the strided stem and the max-pool. V1 differs from the paper as in those repositories: a ReLU
follows the depthwise convolution, and a downsampling unit's bottleneck is a quarter of the channels that it appends.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import initial_values, layers
from dgkd_jax.models.shufflenet_v2 import ShuffleNetV2, channel_shuffle

_GROUPS = 3


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3 and grouped 1x1 convolution with a shortcut; `width` output channels.

    The shortcut is added. In a downsampling unit it is a 3x3 average at stride 2 and is appended to the output.

    Attributes: as those of `ShuffleNetV1`; `groups` applies to the first convolution and the shuffle.
    """

    width: int
    groups: int
    downsample: bool
    dtype: Any
    batch_norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = partial(layers.BatchNorm, groups=self.batch_norm_groups, dtype=self.dtype)
        conv = partial(layers.Conv, dtype=self.dtype)
        out = self.width - x.shape[-1] if self.downsample else self.width
        mid = out // 4
        stride = 2 if self.downsample else 1
        y = conv(mid, 1, groups=self.groups, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y, train=train))
        y = channel_shuffle(y, groups=self.groups)
        y = conv(mid, 3, stride=stride, padding=1, groups=mid, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y, train=train))
        y = conv(out, 1, groups=_GROUPS, name="conv3")(y)
        y = norm(name="bn3")(y, train=train)
        if self.downsample:
            # The padding zeros count in the average, as in torch.nn.AvgPool2d.
            shortcut = nn.avg_pool(x.astype(layers.at_least_float32(x.dtype)), (3, 3), (2, 2), ((1, 1), (1, 1)))
            return nn.relu(jnp.concatenate([y, shortcut.astype(y.dtype)], -1))
        return nn.relu(y + x)


class ShuffleNetV1(nn.Module):
    """ShuffleNetV1 over images [batch, height, width, channels].

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits, features) with
    the pooled activations before the head. Both are in at least float32.

    Attributes:
        num_classes: size of the head.
        widths: channels after each stage.
        sizes: units per stage; the first unit of each stage halves height and width.
        image_shape: the (height, width, channels) that the network is meant for; others work too.
        dtype: of the computation up to the head; parameters have their own dtype.
        batch_norm_groups: see `layers.BatchNorm`.
    """

    num_classes: int
    widths: tuple[int, ...] = (240, 480, 960)
    sizes: tuple[int, ...] = (4, 8, 4)
    image_shape: tuple[int, int, int] = (32, 32, 3)
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.TORCH_DEFAULTS

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        norm = layers.BatchNorm(groups=self.batch_norm_groups, dtype=self.dtype, name="bn1")
        x = nn.relu(norm(layers.Conv(24, 1, dtype=self.dtype, name="conv1")(images), train=train))
        for stage, (width, size) in enumerate(zip(self.widths, self.sizes, strict=True), start=1):
            for index in range(size):
                x = ShuffleUnit(
                    width=width,
                    groups=1 if stage == 1 and index == 0 else _GROUPS,  # the stem has too few channels
                    downsample=index == 0,
                    dtype=self.dtype,
                    batch_norm_groups=self.batch_norm_groups,
                    name=f"layer{stage}_{index}",
                )(x, train=train)
        pooled = layers.global_average_pool(x)
        logits = layers.Linear(self.num_classes, dtype=pooled.dtype, name="fc")(pooled)
        return (logits, pooled) if features else logits


MODELS = {
    "shufflenet_v1_cifar": ShuffleNetV1,
    "shufflenet_v2_cifar": partial(ShuffleNetV2, widths=(116, 232, 464), image_shape=(32, 32, 3), imagenet_stem=False),
}
