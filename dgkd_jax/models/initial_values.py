"""Initial values of a model's leaves, drawn with numpy: nothing is compiled.

Each family names a table of (regular expression on the leaf's path, rule); the first match wins. A path is
"params/layer1_0/conv1/kernel". A rule is a function of (generator, shape of the leaf, shape of the kernel in
the same module or None) and returns float32.
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


def uniform_fan_in(rng, shape, kernel) -> np.ndarray:
    """Uniform within ±1/sqrt(fan_in) for kernel and bias alike: what `torch.nn.Linear` starts from."""
    bound = 1.0 / np.sqrt(np.prod(kernel[:-1]))
    return rng.uniform(-bound, bound, shape).astype(np.float32)


TORCHVISION_CNN: tuple[tuple[str, Rule], ...] = (
    (r"params/fc/(kernel|bias)$", uniform_fan_in),
    (r"/kernel$", he_normal_fan_out),
    (r"/(scale|var)$", ones),
    (r"/(bias|mean)$", zeros),
)


def fill(shapes: dict, table: tuple[tuple[str, Rule], ...], seed: int) -> dict:
    """Float32 arrays for a tree of shapes.

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
