"""Chooses a teacher–student pair by the argument after a config's name: `configs/cifar100.py:TEACHER,STUDENT`."""

from dgkd_jax.errors import BadInput, did_you_mean


def choose(argument: str | None, pairs: dict[str, dict], *, default: str, file: str) -> tuple[str, str, dict]:
    """Teacher, student, and the pair's changes to the common recipe.

    Args:
        argument: "TEACHER,STUDENT" or None for `default`.
        pairs: the published pairs.
        default: the pair to use without an argument.
        file: the config, for messages.

    Raises:
        BadInput: no such pair.
    """
    pair = default if argument is None else argument.replace(" ", "")
    if pair not in pairs:
        raise BadInput(
            f"{file}:{argument}: no such pair{did_you_mean(pair, pairs)} There are: {'  '.join(pairs)}. "
            "For another pair override --config.teacher.model and --config.student.model"
        )
    teacher, student = pair.split(",")
    return teacher, student, pairs[pair]
