"""Small convolutional networks for the embedded sets (28x28x1 digits); images need at least 16 pixels a side.

3x3 convolutions at stride 2 with BatchNorm, the mean over the pixels, and a linear head. No layer works at
full resolution, where XLA's kernel gradients are slow on a CPU. The name gives the width of the first layer:
`small_cnn_w8` is the student (5.0k parameters), `small_cnn_w4` a smaller student (1.4k), and `small_cnn_w24` their
teacher, one layer deeper (121k).
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import initial_values, layers


class SmallCNN(nn.Module):
    """Strided convolutions, a mean and a linear head over images [batch, height, width, channels].

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits,
    features) with the pooled activations before the head. Both are in at least float32.

    Attributes:
        num_classes: size of the head.
        widths: channels after each convolution; each convolution halves height and width.
        image_shape: the (height, width, channels) that the network is meant for; others work too.
        dtype: of the computation up to the head; parameters have their own dtype.
        batch_norm_groups: see `layers.BatchNorm`.
    """

    num_classes: int
    widths: tuple[int, ...]
    image_shape: tuple[int, int, int] = (28, 28, 1)
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.TORCHVISION_CNN

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        x = images
        for index, width in enumerate(self.widths, start=1):
            conv = layers.Conv(width, 3, 2, 1, dtype=self.dtype, name=f"conv{index}")
            norm = layers.BatchNorm(groups=self.batch_norm_groups, dtype=self.dtype, name=f"bn{index}")
            x = nn.relu(norm(conv(x), train=train))
        pooled = layers.global_average_pool(x)
        logits = layers.Linear(self.num_classes, dtype=pooled.dtype, name="fc")(pooled)
        return (logits, pooled) if features else logits


MODELS = {
    "small_cnn_w4": partial(SmallCNN, widths=(4, 8, 12)),
    "small_cnn_w8": partial(SmallCNN, widths=(8, 16, 24)),
    "small_cnn_w24": partial(SmallCNN, widths=(24, 48, 72, 120)),
}
