"""A network without variables, whoever wrote it: one of `models.NAMES`, or a user's own (`foreign.py`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# (variables, normalised images, train=False, mutable=False) -> logits, or (logits, updated collections) if `mutable` is
# given. With `features=True`, where the network gives them, (logits, features) in place of the logits. Where the
# network is random in training, `key` is the random key of the step.
Apply = Callable[..., Any]


def as_they_are(variables: Any) -> Any:
    return variables


class Architecture(NamedTuple):
    """A network without variables.

    Attributes:
        name: of `models.NAMES`, an import path, or a name for a Python object.
        apply: its function. Variables are {"params": …, "batch_stats": …}: what is trained, and all else that changes
            in training; both are nested dictionaries with text as keys.
        shapes: (height, width, channels) -> the variables as `jax.ShapeDtypeStruct`s.
        initialise: (height, width, channels), seed -> the variables as numpy arrays.
        gives_features: whether `apply` takes `features=True`, and `models.classifier` finds its head.
        random: whether `apply` needs `key` in training, for dropout and the like.
        unpacked: the variables in the form in which the network's author knows them.
        begins_from: the values that `initialise` gives whatever the seed; None: it draws them.
    """

    name: str
    apply: Apply
    shapes: Callable[[tuple[int, int, int]], dict[str, Any]]
    initialise: Callable[[tuple[int, int, int], int], dict[str, Any]]
    gives_features: bool = True
    random: bool = False
    unpacked: Callable[[dict[str, Any]], Any] = as_they_are
    begins_from: Any = None

    def parameters(self, image_shape: tuple[int, int, int]) -> int:
        """How many numbers are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes(image_shape)["params"]))
