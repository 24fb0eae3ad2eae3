"""VGG-8/11/13/16/19 for 32-pixel images, with and without BatchNorm, as RepDistiller and mdistiller build them.

Source: Simonyan and Zisserman, arXiv:1409.1556, table 1 (A, B, D, E; the 8-layer one is RepDistiller's). The end of the
network is RepDistiller's: no pooling after the fourth block, the mean over the pixels after the fifth, one linear
layer; its exception too: for images 64 pixels high a pooling follows the fourth block.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import initial_values, layers

_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions and a linear head over images [batch, height, width, channels].

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits, features) with
    the pooled activations before the head. Both are in at least float32.

    Attributes:
        num_classes: size of the head.
        depths: convolutions in each of the five blocks.
        batch_norm: normalise after each convolution.
        image_shape: the (height, width, channels) that the network is meant for; others from 8 pixels up work too.
        dtype: of the computation up to the head; parameters have their own dtype.
        batch_norm_groups: see `layers.BatchNorm`.

    Raises:
        ValueError: (when applied) the images are too small for the poolings.
    """

    num_classes: int
    depths: tuple[int, int, int, int, int]
    batch_norm: bool
    image_shape: tuple[int, int, int] = (32, 32, 3)
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.NARROW_NORMAL_HEAD

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        height, width = images.shape[1:3]
        poolings = 4 if height == 64 else 3
        if min(height, width) < 2**poolings:
            raise ValueError(
                f"VGG halves images of {height}x{width} pixels {poolings} times; each side must have at least "
                f"{2**poolings} pixels"
            )
        # Layers are numbered as in PyTorch's Sequential, which counts activations too.
        step = 3 if self.batch_norm else 2
        x = images
        for block, (depth, channels) in enumerate(zip(self.depths, _WIDTHS, strict=True)):
            for index in range(0, step * depth, step):
                conv = layers.Conv(
                    channels, 3, padding=1, use_bias=True, dtype=self.dtype, name=f"block{block}_{index}"
                )
                x = conv(x)
                if self.batch_norm:
                    name = f"block{block}_{index + 1}"
                    norm = layers.BatchNorm(groups=self.batch_norm_groups, dtype=self.dtype, name=name)
                    x = norm(x, train=train)
                x = nn.relu(x)
            if block < poolings:
                x = layers.max_pool(x, window=2, stride=2, padding=0)
        pooled = layers.global_average_pool(x)
        logits = layers.Linear(self.num_classes, dtype=pooled.dtype, name="fc")(pooled)
        return (logits, pooled) if features else logits


_DEPTHS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
MODELS = {name: partial(VGG, depths=depths, batch_norm=False) for name, depths in _DEPTHS.items()} | {
    f"{name}_bn": partial(VGG, depths=depths, batch_norm=True) for name, depths in _DEPTHS.items()
}
