"""Teacher–student pairs, chosen by what follows a configuration's name: `configs/cifar100.py:TEACHER,STUDENT`."""

import difflib

from dgkd_jax import models


def choose(argument: str | None, pairs: dict[str, dict], *, default: str, file: str) -> tuple[str, str, dict]:
    """Teacher, student and what differs for the pair from the common recipe.

    Args:
        argument: "TEACHER,STUDENT" or None for `default`.
        pairs: the published pairs.
        default: one of them.
        file: the configuration, for messages.

    Raises:
        ValueError: no such pair, or one whose model is not built yet.
    """
    pair = default if argument is None else argument.replace(" ", "")
    if pair not in pairs:
        close = difflib.get_close_matches(pair, pairs, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"{file}:{argument}: no such pair{hint} There are: {'  '.join(pairs)}. For another pair override "
            "--config.teacher.model and --config.student.model"
        )
    teacher, student = pair.split(",")
    for model in (teacher, student):
        if model not in models.NAMES:
            built = [p for p in pairs if all(name in models.NAMES for name in p.split(","))]
            raise ValueError(
                f"{file}:{pair}: model {model} is not built yet. Pairs that can be run: {'  '.join(built)}"
            )
    return teacher, student, pairs[pair]
