"""Images, parameters and what torchvision made of them (tests/golden/augment), and the distances allowed."""

import math
from pathlib import Path

import jax
import numpy as np

from dgkd_jax.data import trivial_augment


def recorded() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "augment" / "torchvision.npz") as file:
        return dict(file)


def assert_as_torchvision(found: np.ndarray, expected: np.ndarray, operation: str, level: int):
    """The same pixels; the exceptions are those that `trivial_augment` states."""
    difference = found.astype(int) - expected
    if operation in trivial_augment.BLENDS:
        assert set(np.unique(difference)) <= {0, 1}
        assert np.mean(difference) < 0.03
    elif operation == "rotate" and level % 10 == 0:
        assert not difference[~_halfway(*found.shape[:2], math.radians(4.5 * level))].any()
    else:
        assert not difference.any()


def _halfway(height: int, width: int, angle: float) -> np.ndarray:
    """The pixels that a turn fetches from halfway between two others; with an angle of either sign."""
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height)[:, None] - (height - 1) / 2
    tie = np.zeros((height, width), bool)
    for turn in (angle, -angle):
        for place, side in (
            (math.cos(turn) * x - math.sin(turn) * y, width),
            (math.sin(turn) * x + math.cos(turn) * y, height),
        ):
            tie |= np.abs((place + side / 2) - np.round(place + side / 2)) < 1e-5
    return tie


def trivially_augmented(image: np.ndarray, operations, levels, negative) -> np.ndarray:
    """An image after each of these choices."""
    operations, levels, negative = (np.asarray(values) for values in (operations, levels, negative))
    choice = trivial_augment.Choice(operations, levels, negative.astype(bool))
    images = np.repeat(image[None], len(operations), axis=0)
    return np.asarray(jax.jit(trivial_augment.apply)(images, choice))
