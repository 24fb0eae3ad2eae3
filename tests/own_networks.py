"""Networks that are not of `models.NAMES`, as a user would write them; small enough to compile in a second."""

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

SIDE, CLASSES = 6, 3
SHAPE = (SIDE, SIDE, 3)


class Linen(nn.Module):
    """BatchNorm and dropout, whose stream of random keys has a name of its own."""

    classes: int = CLASSES

    @nn.compact
    def __call__(self, images, train: bool = False):
        x = nn.Dense(5)(images.mean((1, 2)))
        x = nn.BatchNorm(use_running_average=not train)(x)
        self.sow("intermediates", "normal", x)
        x = nn.Dropout(0.5, deterministic=not train, rng_collection="noise")(x)
        return nn.Dense(self.classes)(x)


class Plain(nn.Module):
    """No state, no randomness, no argument for training."""

    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.num_classes)(images.reshape(images.shape[0], -1))


class NNX(nnx.Module):
    """The same as `Linen`, in NNX, with a list of layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(5, 5, rngs=rngs), nnx.Linear(5, CLASSES, rngs=rngs)])

    def __call__(self, images):
        x = self.drop(self.norm(self.first(images.mean((1, 2)))))
        for layer in self.rest:
            x = layer(x)
        return x


def linear(parameters, images):
    """A pure function; its parameters are a list with a dictionary in it."""
    kernel, beside = parameters
    return images.reshape(images.shape[0], -1) @ kernel + beside["bias"]


def parameters(seed=0):
    random = np.random.default_rng(seed)
    return [
        random.normal(0, 0.01, (SIDE * SIDE * 3, CLASSES)).astype(np.float32),
        {"bias": np.arange(CLASSES, dtype=np.float32)},
    ]


def two_results(parameters, images):
    return linear(parameters, images), images


def images_and_labels(count, *, seed=0):
    """Noise on a pattern of each class: a linear network learns them."""
    random = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).integers(0, 128, (CLASSES, *SHAPE))
    labels = random.integers(0, CLASSES, count)
    return (patterns[labels] + random.integers(0, 128, (count, *SHAPE))).astype(np.uint8), labels


def splits():
    """Data by an import path."""
    return {"train": images_and_labels(96), "evaluate": images_and_labels(40, seed=1)}


def knows_the_patterns(images):
    """A teacher outside JAX: logits from the squared distances to the patterns, with their noise's mean."""
    patterns = np.random.default_rng(99).integers(0, 128, (CLASSES, *SHAPE)) + 64.0
    distances = ((images[:, None].astype(np.float32) - patterns) ** 2).mean((2, 3, 4))
    return (-distances / 500).astype(np.float32)


def half_squared_distance(student_logits, teacher_logits, labels):
    """An objective."""
    del labels
    return 0.5 * jax.numpy.sum((student_logits - teacher_logits) ** 2, axis=-1)
