"""Shortens a teacher's logits to the top K classes and one number for the rest: smaller on disk, at a known error.

Stored are the label's logit, the K−1 largest others, and the log-sum of the rest at one temperature T. `restore`
spreads the mass of the rest evenly over its classes. So at T, up to rounding to float16:

- exact: the teacher's probability of the label, hence TCKD and its gradient; the probabilities of the stored classes;
- approximate: NCKD, its gradient, DGKD's coupling and KD; the error grows with how uneven the rest is;
- wrong: everything at another temperature, and squared errors of logits.
"""

from typing import NamedTuple

import numpy as np


class TopClasses(NamedTuple):
    """What is stored of logits `[..., classes]`.

    Attributes:
        values: float16 `[..., count]`, the stored logits, the label's first.
        classes: uint16 or uint32 `[..., count]`, the class of each stored logit.
        rest: float32 `[...]`, T·log Σ exp(v/T) over the classes that are not stored; −inf where there are none.
    """

    values: np.ndarray
    classes: np.ndarray
    rest: np.ndarray


def shorten(logits: np.ndarray, labels: np.ndarray, *, count: int, temperature: float) -> TopClasses:
    """The label's logit, the `count` − 1 largest others and the log-sum of the rest.

    Args:
        logits: float `[..., classes]`.
        labels: int `[...]`.
        count: 1 … classes.
        temperature: T > 0, the one that training will use.
    """
    logits = np.asarray(logits, np.float64)
    ranked = logits.copy()
    np.put_along_axis(ranked, labels[..., None], np.inf, axis=-1)
    # A stable sort: where logits are equal, every machine stores the same classes.
    order = np.argsort(-ranked, axis=-1, kind="stable")
    classes, others = order[..., :count], order[..., count:]
    scaled = np.take_along_axis(logits, others, axis=-1) / temperature
    largest = scaled.max(axis=-1, keepdims=True, initial=-np.inf)
    if others.size:
        rest = temperature * (np.log(np.exp(scaled - largest).sum(axis=-1)) + largest[..., 0])
    else:
        rest = largest[..., 0]
    return TopClasses(
        values=np.take_along_axis(logits, classes, axis=-1).astype(np.float16),
        classes=classes.astype(np.uint16 if logits.shape[-1] <= 2**16 else np.uint32),
        rest=rest.astype(np.float32),
    )


def restore(stored: TopClasses, *, num_classes: int, temperature: float) -> np.ndarray:
    """Float16 logits `[..., num_classes]`: stored ones as stored; each other class has an equal share of the rest.

    Args:
        stored: from `shorten`.
        num_classes: of the teacher.
        temperature: as given to `shorten`.
    """
    others = max(num_classes - stored.classes.shape[-1], 1)
    share = stored.rest - temperature * np.log(others)
    logits = np.repeat(share[..., None].astype(np.float16), num_classes, axis=-1)
    np.put_along_axis(logits, stored.classes.astype(np.int64), stored.values, axis=-1)
    return logits
