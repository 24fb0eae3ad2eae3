"""How large the gradients of TCKD and NCKD are along the trainings of a study, and whether accuracy follows."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

NAMES = {"target_gradmag": "TCKD", "nontarget_gradmag": "NCKD"}
_FEWEST = 4  # arms of which ranks are compared


class ArmNorms(NamedTuple):
    """Means over an arm's runs.

    Attributes:
        progress: share of the training that is done at each point, 0 … 1.
        norms: of `NAMES`, at each point: Frobenius norm of the gradient of the batch's mean with respect to the logits.
        accuracy: after the last epoch, in percent.
    """

    arm: str
    progress: np.ndarray
    norms: dict[str, np.ndarray]
    accuracy: float

    @property
    def last(self) -> float:
        """The norm of both gradients together at the end."""
        return float(np.hypot(*(self.norms[name][-1] for name in NAMES)))


def of_regime(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[ArmNorms]:
    """Of the finished runs of one regime, those arms that have such curves.

    A run whose curves have other steps than most of its arm's, because lines of its log are lost, is not among the
    norms.

    Args:
        rows: of `rows.read`, of one regime.
        arms: to look at; their norms must be of one temperature, or they cannot be compared.
    """
    found = []
    for arm in arms:
        these = [row for row in rows if row["arm"] == arm and row.get("curves", {}).keys() >= NAMES.keys()]
        if these:
            ((most, _),) = Counter(tuple(row["curves"]["step"]) for row in these).most_common(1)
            curves = [row["curves"] for row in these if tuple(row["curves"]["step"]) == most]
            steps = np.asarray(most, np.float64)
            norms = {name: np.mean([curve[name] for curve in curves], axis=0) for name in NAMES}
            accuracy = 100 * float(np.mean([row["student"]["last_accuracy"] for row in these]))
            found.append(ArmNorms(arm, steps / steps[-1], norms, accuracy))
    return found


def rank_correlation(arms: Sequence[ArmNorms]) -> float | None:
    """Spearman's ρ of the norm at the end and the accuracy, over arms; None for fewer than four."""
    if len(arms) < _FEWEST:
        return None
    return float(stats.spearmanr([arm.last for arm in arms], [arm.accuracy for arm in arms]).statistic)
