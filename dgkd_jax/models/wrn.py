"""Wide residual networks for 32-pixel images: WRN-16-2, WRN-40-1 and WRN-40-2, without dropout.

Source: Zagoruyko and Komodakis, arXiv:1605.07146, as mdistiller builds them. `wrn_D_k` has D = 6n + 4 layers (three
stages of n blocks) and k times the width of a thin ResNet. Normalisation and ReLU come before each convolution (He et
al., arXiv:1603.05027); where the width changes, the shortcut's 1x1 convolution starts from the normalised input.

Training differs in one point: mdistiller, which also returns activations, runs three of its BatchNorms (`block2_0/bn1`,
`block3_0/bn1` and the last) twice per step, so their running statistics move by 0.19 there and by 0.1 here.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import initial_values, layers


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut; `width` output channels.

    Attributes: as those of `WideResNet`; `stride` is that of the first convolution and of the shortcut.
    """

    width: int
    stride: int
    dtype: Any
    batch_norm_groups: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = partial(layers.Conv, self.width, dtype=self.dtype)
        norm = partial(layers.BatchNorm, groups=self.batch_norm_groups, dtype=self.dtype)
        activated = nn.relu(norm(name="bn1")(x, train=train))
        if x.shape[-1] != self.width:
            x = conv(1, stride=self.stride, name="shortcut")(activated)
        y = conv(3, stride=self.stride, padding=1, name="conv1")(activated)
        y = nn.relu(norm(name="bn2")(y, train=train))
        return x + conv(3, padding=1, name="conv2")(y)


class WideResNet(nn.Module):
    """Pre-activation residual network over images [batch, height, width, channels].

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits, features) with
    the pooled activations before the head. Both are in at least float32.

    Attributes:
        num_classes: size of the head.
        blocks: per stage. The second and the third stage halve height and width.
        widen: factor on the stages' 16, 32 and 64 channels.
        image_shape: the (height, width, channels) that the network is meant for; others work too (not in mdistiller,
            which pools 8 x 8 pixels).
        dtype: of the computation up to the head; parameters have their own dtype.
        batch_norm_groups: see `layers.BatchNorm`.
    """

    num_classes: int
    blocks: int
    widen: int
    image_shape: tuple[int, int, int] = (32, 32, 3)
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.ZERO_BIAS_HEAD

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        x = layers.Conv(16, 3, padding=1, dtype=self.dtype, name="conv1")(images)
        for stage in range(3):
            for index in range(self.blocks):
                x = PreActivationBlock(
                    width=16 * 2**stage * self.widen,
                    stride=2 if stage > 0 and index == 0 else 1,
                    dtype=self.dtype,
                    batch_norm_groups=self.batch_norm_groups,
                    name=f"block{stage + 1}_{index}",
                )(x, train=train)
        norm = layers.BatchNorm(groups=self.batch_norm_groups, dtype=self.dtype, name="bn1")
        pooled = layers.global_average_pool(nn.relu(norm(x, train=train)))
        logits = layers.Linear(self.num_classes, dtype=pooled.dtype, name="fc")(pooled)
        return (logits, pooled) if features else logits


MODELS = {
    f"wrn_{depth}_{widen}": partial(WideResNet, blocks=(depth - 4) // 6, widen=widen)
    for depth, widen in ((16, 2), (40, 1), (40, 2))
}
