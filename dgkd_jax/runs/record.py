"""What a checkpoint holds besides the arrays: the run it belongs to, and the run's history."""

import math
from typing import Any, NamedTuple


class TaughtBy(NamedTuple):
    """The source of the teacher's logits that a student learns from.

    Attributes:
        fingerprint: of the teacher's weights.
        cache: description of what a cache of logits stores; None: the teacher is run. A run cannot change between the
            two, because the cache's rounding changes the numbers.
    """

    fingerprint: str
    cache: str | None = None

    def __str__(self) -> str:
        return self.fingerprint if self.cache is None else f"{self.fingerprint}, {self.cache}"

    @classmethod
    def parse(cls, text: str) -> "TaughtBy":
        """The inverse of `str`."""
        fingerprint, separator, cache = text.partition(", ")
        return cls(fingerprint, cache if separator else None)


class History(NamedTuple):
    """The history of a run so far. Accuracies are in [0, 1], NaN before the first evaluation.

    `best_accuracy` is that of the evaluation with the highest score, at `best_step`.
    """

    last_accuracy: float = math.nan
    best_accuracy: float = math.nan
    best_score: float = math.nan
    best_step: int = 0
    seconds: float = 0.0

    def after(self, *, step: int, accuracy: float, score: float) -> "History":
        later = self._replace(last_accuracy=accuracy)
        if score <= self.best_score:
            return later
        return later._replace(best_accuracy=accuracy, best_score=score, best_step=step)


class Record(NamedTuple):
    """The record saved with a checkpoint.

    Attributes:
        identity: of the config (`config.identity`).
        config: resolved.
        teacher: None where there is none.
        history: up to this step.
        seconds_by_part: of the run so far (`monitor.timing`).
        accuracy: at this step, in [0, 1]; None if it was not evaluated.
        evaluation_due: the run was stopped before or during this step's evaluation, and continues with it.
    """

    identity: dict[str, Any]
    config: dict[str, Any]
    teacher: TaughtBy | None
    history: History
    seconds_by_part: dict[str, float]
    accuracy: float | None
    evaluation_due: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "config": self.config,
            "teacher": self.teacher and str(self.teacher),
            "history": self.history._asdict(),
            "goodput": self.seconds_by_part,
            "accuracy": self.accuracy,
            "evaluation_due": self.evaluation_due,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Record":
        return cls(
            identity=content["identity"],
            config=content["config"],
            teacher=TaughtBy.parse(content["teacher"]) if content["teacher"] else None,
            history=History(**content["history"]),
            seconds_by_part=content["goodput"],
            accuracy=content["accuracy"],
            evaluation_due=content["evaluation_due"],
        )


def duration(seconds: float) -> str:
    """Seconds as minutes:seconds, or hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
