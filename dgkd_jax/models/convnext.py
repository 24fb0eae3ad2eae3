"""ConvNeXt-T, torchvision's.

Source: Liu et al., arXiv:2201.03545. LayerNorm's epsilon is 1e-6, GELU is exact. Torchvision's stochastic depth (0.1)
is left out, so `train=True` and `train=False` compute the same.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import initial_values, layers

_EPSILON = 1e-6


class Block(nn.Module):
    """Depthwise 7x7 convolution, norm and MLP, scaled per channel and added to the input.

    Attributes: as those of `ConvNeXt`.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        y = layers.Conv(channels, 7, padding=3, groups=channels, use_bias=True, dtype=self.dtype, name="dwconv")(x)
        y = layers.LayerNorm(_EPSILON, dtype=self.dtype, name="norm")(y)
        y = layers.MLP(dtype=self.dtype, name="mlp")(y)
        layer_scale = self.param("layer_scale", layers.undefined, (channels, 1, 1))  # PyTorch's shape
        return x + y * layer_scale.reshape(channels).astype(self.dtype)


class ConvNeXt(nn.Module):
    """ConvNeXt over images [batch, height, width, channels].

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits, features) with
    the pooled activations after the last norm. Both are in at least float32. Images need at least 32 pixels a side; as
    in torchvision, a reduction drops rows and columns that do not fill a patch.

    Attributes:
        num_classes: size of the head.
        stage_sizes: blocks per stage. The stem divides height and width by 4, each stage but the first by 2.
        widths: channels of each stage.
        image_shape: the (height, width, channels) that the network is meant for.
        dtype: of the computation up to the pooling; parameters have their own dtype.
        batch_norm_groups: for the same interface as other families; no effect without BatchNorm.
    """

    num_classes: int
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    image_shape: tuple[int, int, int] = (224, 224, 3)
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.TORCHVISION_CONVNEXT

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        norm = partial(layers.LayerNorm, _EPSILON, dtype=self.dtype)
        x = images
        for stage, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
            # torchvision counts the reductions and the stages in one list, `features`.
            reduction, blocks = f"features_{2 * stage}", f"features_{2 * stage + 1}"
            if stage == 0:
                x = layers.Conv(width, 4, 4, use_bias=True, dtype=self.dtype, name=f"{reduction}_0")(x)
                x = norm(name=f"{reduction}_1")(x)
            else:
                x = norm(name=f"{reduction}_0")(x)
                x = layers.Conv(width, 2, 2, use_bias=True, dtype=self.dtype, name=f"{reduction}_1")(x)
            for index in range(size):
                x = Block(dtype=self.dtype, name=f"{blocks}_{index}")(x)
        pooled = layers.global_average_pool(x)
        pooled = layers.LayerNorm(_EPSILON, dtype=pooled.dtype, name="classifier_0")(pooled)
        logits = layers.Linear(self.num_classes, dtype=pooled.dtype, name="classifier_2")(pooled)
        return (logits, pooled) if features else logits


MODELS = {"convnext_tiny": partial(ConvNeXt, stage_sizes=(3, 3, 9, 3), widths=(96, 192, 384, 768))}
