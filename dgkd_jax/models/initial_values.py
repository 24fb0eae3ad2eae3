"""Initial values of a model's variables, drawn with numpy; nothing is compiled.

Each family names a table of (regular expression for the leaf's path, rule); the first match applies. A path is for
example "params/layer1_0/conv1/kernel". A rule maps (generator, shape of the leaf, shape of the kernel in the same
module or None) to a float32 array.
"""

import re
import zlib
from collections.abc import Callable

import jax
import numpy as np

Rule = Callable[[np.random.Generator, tuple[int, ...], tuple[int, ...] | None], np.ndarray]


def zeros(_rng, shape, _kernel) -> np.ndarray:
    return np.zeros(shape, np.float32)


def ones(_rng, shape, _kernel) -> np.ndarray:
    return np.ones(shape, np.float32)


def he_normal_fan_out(rng, shape, _kernel) -> np.ndarray:
    """Normal, variance 2 / (height * width * out channels): PyTorch's fan_out, which ignores groups.

    Source: He et al., arXiv:1502.01852, the backward case.
    """
    height, width, _, out_channels = shape
    values = rng.standard_normal(shape, dtype=np.float32)
    return np.multiply(values, np.sqrt(2.0 / (height * width * out_channels)), out=values, casting="same_kind")


def he_normal_depthwise(rng, shape, _kernel) -> np.ndarray:
    """Normal, variance 2 / (height * width): the fan_out of a single channel of a depthwise convolution."""
    height, width, _, _ = shape
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2.0 / (height * width)))


def uniform_fan_out(rng, shape, _kernel) -> np.ndarray:
    """Uniform within ±1/sqrt(fan_out)."""
    bound = 1.0 / np.sqrt(shape[-1])
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def uniform_fan_in(rng, shape, kernel) -> np.ndarray:
    """Uniform within ±1/sqrt(fan_in) for kernel and bias: the defaults of `torch.nn.Linear` and `Conv2d`."""
    bound = 1.0 / np.sqrt(np.prod(kernel[:-1]))
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def normal(std: float) -> Rule:
    """Normal with this standard deviation. PyTorch's `trunc_normal_` cuts at ±2; at 0.02 that changes nothing."""

    def rule(rng, shape, _kernel) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(std)

    return rule


def constant(value: float) -> Rule:
    def rule(_rng, shape, _kernel) -> np.ndarray:
        return np.full(shape, value, np.float32)

    return rule


TORCHVISION_CNN: tuple[tuple[str, Rule], ...] = (
    (r"params/fc/(kernel|bias)$", uniform_fan_in),
    (r"/kernel$", he_normal_fan_out),
    (r"/(scale|var)$", ones),
    (r"/(bias|mean)$", zeros),
)
NARROW_NORMAL_HEAD = ((r"params/fc/kernel$", normal(0.01)), (r"params/fc/bias$", zeros), *TORCHVISION_CNN)
ZERO_BIAS_HEAD = ((r"params/fc/bias$", zeros), *TORCHVISION_CNN)
# For networks that keep PyTorch's default initial values; their convolutions have no biases.
TORCH_DEFAULTS = ((r"/kernel$", uniform_fan_in), *TORCHVISION_CNN)
TENSORFLOW_EFFICIENTNET: tuple[tuple[str, Rule], ...] = (
    (r"/depthwise_conv/kernel$", he_normal_depthwise),
    (r"params/fc/kernel$", uniform_fan_out),
    (r"/kernel$", he_normal_fan_out),
    (r"/(scale|var)$", ones),
    (r"/(bias|mean)$", zeros),
)
TIMM_VIT: tuple[tuple[str, Rule], ...] = (
    (r"/patch_embed_proj/", uniform_fan_in),
    (r"/cls_token$", normal(1e-6)),
    (r"/(kernel|pos_embed)$", normal(0.02)),
    (r"/scale$", ones),
    (r"/bias$", zeros),
)
TORCHVISION_CONVNEXT: tuple[tuple[str, Rule], ...] = (
    (r"/kernel$", normal(0.02)),
    (r"/layer_scale$", constant(1e-6)),
    (r"/scale$", ones),
    (r"/bias$", zeros),
)
TORCHVISION_SWIN: tuple[tuple[str, Rule], ...] = (
    (r"params/features_0_0/", uniform_fan_in),
    (r"/(kernel|relative_position_bias_table)$", normal(0.02)),
    (r"/scale$", ones),
    (r"/bias$", zeros),
)


def fill(shapes: dict, table: tuple[tuple[str, Rule], ...], seed: int) -> dict:
    """Float32 arrays for a tree of shapes, drawn by a table of rules.

    Args:
        shapes: nested dict whose leaves have a `shape`.
        table: (regular expression, rule) pairs; every leaf must match one.
        seed: 0 <= seed < 2**64. A leaf's values depend on the seed and on its own path only.

    Returns:
        A tree of numpy arrays like `shapes`.

    Raises:
        ValueError: a leaf matches no rule.
    """
    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    shape_of = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf.shape for p, leaf in paths_and_leaves}
    return structure.unflatten([_value(path, shape_of, table, seed) for path in shape_of])


def _value(path: str, shape_of: dict, table: tuple[tuple[str, Rule], ...], seed: int) -> np.ndarray:
    for pattern, rule in table:
        if re.search(pattern, path):
            rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(path.encode())]))
            return rule(rng, shape_of[path], shape_of.get(path.rpartition("/")[0] + "/kernel"))
    raise ValueError(f"no rule gives the initial value of {path}; add one to its family's table")
