"""A teacher's logits of a few classes and one number for all others: smaller on disk, and what is lost is known.

Stored are the label's logit, always, the largest of the rest, and the log-sum of what is left, at one temperature T.
`restore` lets the classes that are left share their mass evenly. So at T, and up to the rounding to float16:

- exact: the teacher's probability of the label, hence TCKD and its gradient; the stored classes' probabilities;
- approximated: NCKD and what is made of its gradient (DGKD's coupling), by how uneven the rest is; KD likewise;
- wrong: everything at another temperature, and squared errors of logits.
"""

from typing import NamedTuple

import numpy as np


class TopClasses(NamedTuple):
    """What is stored of logits `[..., classes]`.

    Attributes:
        values: float16 `[..., count]`, the stored logits, the label's first.
        classes: uint16 or uint32 `[..., count]`, theirs.
        rest: float32 `[...]`, T·log Σ exp(v/T) over the other classes; −inf where there is none.
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
        temperature: T > 0, of the objective that will be trained with them.
    """
    logits = np.asarray(logits, np.float64)
    ranked = logits.copy()
    np.put_along_axis(ranked, labels[..., None], np.inf, axis=-1)
    # Stable, so that of equal logits the first classes are stored on every machine.
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
    """Float16 logits `[..., num_classes]`: the stored ones, and for each other class an even share of the rest.

    Args:
        stored: from `shorten`.
        num_classes: of the teacher.
        temperature: that of `shorten`.
    """
    others = max(num_classes - stored.classes.shape[-1], 1)
    share = stored.rest - temperature * np.log(others)
    logits = np.repeat(share[..., None].astype(np.float16), num_classes, axis=-1)
    np.put_along_axis(logits, stored.classes.astype(np.int64), stored.values, axis=-1)
    return logits
