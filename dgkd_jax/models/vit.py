"""Vision transformers with patches of 16 pixels: timm's ViT-Ti/16, ViT-S/16 and DeiT-S/16.

Source: Dosovitskiy et al., arXiv:2010.11929; sizes Ti and S, and DeiT (the same network with another training, here
without the distillation token): Touvron et al., arXiv:2012.12877. LayerNorm's epsilon is 1e-6, GELU is exact. There is
neither dropout nor stochastic depth, so `train=True` and `train=False` compute the same.
"""

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import initial_values, layers
from dgkd_jax.models.attention import SelfAttention

_EPSILON = 1e-6


class Block(nn.Module):
    """Attention, then MLP; each has a norm in front and is added to its input. Tokens are [batch, tokens, width].

    Attributes: as those of `VisionTransformer`.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(layers.LayerNorm, _EPSILON, dtype=self.dtype)
        x = x + SelfAttention(self.heads, dtype=self.dtype, name="attn")(norm(name="norm1")(x))
        return x + layers.MLP(dtype=self.dtype, name="mlp")(norm(name="norm2")(x))


class VisionTransformer(nn.Module):
    """Transformer over the patches of images [batch, height, width, channels] and a class token.

    `model.apply(variables, images)` gives logits [batch, num_classes]; `features=True` gives (logits, features) with
    the class token after the last norm. Both are in at least float32.

    Height and width may be any multiples of `patch`. The variables hold the position embeddings for `image_shape`; for
    images of another size each call resamples them (bicubic, antialiased), as timm's `dynamic_img_size` does. So one
    set of weights serves every size.

    Attributes:
        num_classes: size of the head.
        width: channels of each token.
        heads: of the attention; must divide the width.
        depth: number of blocks.
        patch: side of a patch in pixels.
        image_shape: the (height, width, channels) that the position embeddings belong to.
        dtype: of the computation up to the last norm; parameters have their own dtype.
        batch_norm_groups: for the same interface as other families; no effect without BatchNorm.

    Raises:
        ValueError: (when called) height or width is not a multiple of `patch`.
    """

    num_classes: int
    width: int
    heads: int
    depth: int = 12
    patch: int = 16
    image_shape: tuple[int, int, int] = (224, 224, 3)
    dtype: Any = jnp.float32
    batch_norm_groups: int = 1

    initial_values: ClassVar = initial_values.TIMM_VIT

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, features: bool = False):
        batch, height, width, _ = images.shape
        if height % self.patch or width % self.patch or not height * width:
            raise ValueError(
                f"images of {height}x{width} pixels do not divide into patches of {self.patch}: "
                f"resize them so that height and width are multiples of {self.patch}"
            )
        embed = layers.Conv(
            self.width, self.patch, self.patch, use_bias=True, dtype=self.dtype, name="patch_embed_proj"
        )
        x = embed(images).reshape(batch, -1, self.width)
        cls_token = self.param("cls_token", layers.undefined, (1, 1, self.width)).astype(self.dtype)
        x = jnp.concatenate([jnp.tile(cls_token, (batch, 1, 1)), x], 1)
        x = x + self._positions(height // self.patch, width // self.patch).astype(self.dtype)
        for index in range(self.depth):
            x = Block(self.heads, dtype=self.dtype, name=f"blocks_{index}")(x)
        wide = layers.at_least_float32(self.dtype)
        token = layers.LayerNorm(_EPSILON, dtype=wide, name="norm")(x[:, 0])
        logits = layers.Linear(self.num_classes, dtype=wide, name="head")(token)
        return (logits, token) if features else logits

    def _positions(self, rows: int, columns: int) -> jax.Array:
        """Position embeddings [1, 1 + rows * columns, width]: the class token's, then the patches' row by row."""
        own_rows, own_columns = (side // self.patch for side in self.image_shape[:2])
        shape = (1, 1 + own_rows * own_columns, self.width)
        positions = self.param("pos_embed", layers.undefined, shape)
        if (rows, columns) == (own_rows, own_columns):
            return positions
        grid = positions[:, 1:].reshape(1, own_rows, own_columns, self.width)
        grid = jax.image.resize(grid, (1, rows, columns, self.width), "bicubic")
        return jnp.concatenate([positions[:, :1], grid.reshape(1, -1, self.width)], 1)


_SMALL = partial(VisionTransformer, width=384, heads=6)
MODELS = {
    "vit_tiny_patch16_224": partial(VisionTransformer, width=192, heads=3),
    "vit_small_patch16_224": _SMALL,
    "deit_small_patch16_224": _SMALL,
}
