"""The weights and images that the recorded figures of tests/golden belong to, drawn from names: no file is needed.

A fixture names every entry of a PyTorch `state_dict` with its shape. `weights(fixture)` fills them from the entry's own
name, so that both sides of a comparison hold the same numbers. A change here makes every recorded figure wrong.
"""

import zlib

import numpy as np


def _rng(name: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[zlib.crc32(name.encode()), seed]))


def weight(name: str, shape, seed: int = 0) -> np.ndarray:
    """One `state_dict` entry as float64 (int64 for `num_batches_tracked`), in PyTorch's layout."""
    shape = tuple(shape)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    noise = _rng(name, seed).standard_normal(shape)
    if name.endswith("running_var"):
        return 1.0 + 0.2 * np.abs(noise)
    if name.endswith("running_mean"):
        return 0.1 * noise
    if len(shape) >= 2 and name.endswith("weight"):  # convolution [out, in/groups, kh, kw] or linear [out, in]
        return noise * np.sqrt(2.0 / np.prod(shape[1:]))
    if name.endswith("weight"):  # BatchNorm or LayerNorm scale
        return 1.0 + 0.1 * noise
    return 0.1 * noise  # biases, class tokens, position embeddings, layer scales


def weights(fixture: dict) -> dict:
    """The whole `state_dict` of a model fixture: entry name -> array."""
    return {name: weight(name, shape, fixture["seed"]) for name, shape in fixture["state_dict"].items()}


def images(fixture: dict) -> np.ndarray:
    """The fixture's input batch, [N, C, H, W] float64 (PyTorch's layout), already normalised."""
    return _rng("images", fixture["seed"]).standard_normal(fixture["input_shape"])
