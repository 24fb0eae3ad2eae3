"""Multi-head self-attention, its arrays arranged as is quick on the platform."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dgkd_jax.models import kernel_gradient, layers, platform


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens [..., tokens, channels]; the output has the same shape.

    One linear layer `qkv` gives queries, keys and values, in that order, each cut into heads; `proj` joins the heads.

    Attributes:
        heads: must divide the channels.
        dtype: of the products and the output; the softmax is at least float32.

    Source: Vaswani et al., arXiv:1706.03762, section 3.2.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """`bias` is added to the scores before the softmax; it must broadcast to [..., heads, tokens, tokens]."""
        wide = layers.at_least_float32(self.dtype)
        product = partial(jnp.einsum, precision=layers.full_precision(self.dtype))

        def attend(scores: str, mix: str, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            logits = product(scores, q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
            if bias is not None:
                logits = logits + bias.astype(wide)
            return product(mix, nn.softmax(logits).astype(self.dtype), v)

        *leading, tokens, channels = x.shape
        if platform.current() == "tpu":
            qkv, proj = _Leaves(3 * channels, name="qkv")(channels), _Leaves(channels, name="proj")(channels)
            return _heads_first(x.astype(self.dtype), qkv, proj, heads=self.heads, attend=attend)
        qkv = layers.Linear(3 * channels, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(*leading, tokens, 3, self.heads, -1), -3, 0)
        mixed = attend("...qhc,...khc->...hqk", "...hqk,...khc->...qhc", q, k, v)
        return layers.Linear(channels, dtype=self.dtype, name="proj")(mixed.reshape(x.shape))


class _Leaves(nn.Module):
    """Declares those of a linear layer and returns kernel [in, out] and bias [out]."""

    features: int

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", layers.undefined, (channels, self.features))
        return kernel, self.param("bias", layers.undefined, (self.features,))


_Linear = tuple[jax.Array, jax.Array]


def _heads_first(x: jax.Array, qkv: _Linear, proj: _Linear, *, heads: int, attend: Callable[..., jax.Array]):
    """Attention with arrays [..., heads, tokens, size], which the linear layers themselves make and join.

    A TPU's compiler would copy [..., tokens, heads, size] to this arrangement, which takes as long as the products.
    """
    channels, dtype = x.shape[-1], x.dtype
    multiply = partial(jnp.einsum, precision=layers.full_precision(dtype))
    kernels, biases = qkv[0].reshape(channels, 3, heads, -1), qkv[1].reshape(3, heads, 1, -1).astype(dtype)
    split = partial(multiply, "...tc,chd->...htd")
    q, k, v = (kernel_gradient.product(split, x, kernels[:, i]) + biases[i] for i in range(3))
    mixed = attend("...hqd,...hkd->...hqk", "...hqk,...hkd->...hqd", q, k, v)
    join = partial(multiply, "...htd,hde->...te")
    return kernel_gradient.product(join, mixed, proj[0].reshape(heads, -1, channels)) + proj[1].astype(dtype)
