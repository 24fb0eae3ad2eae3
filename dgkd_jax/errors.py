"""Errors that end a run early, their exit codes, and how a command prints them.

Exit code 0: done. After 2 or 3 do not retry: the same command would fail again. After 143 or any other code give the
same command again.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class BadInput(ValueError):
    """The user's input cannot be used. The message says in a few lines what is wrong, where, and what to do.

    A command prints it on stderr without a traceback; do not retry.
    """

    exit_code = 2


class NumericFailure(ArithmeticError):
    """A number became NaN, infinite or too large. The message says which, where and what to try. Do not retry."""

    exit_code = 3


class StorageFailure(OSError):
    """A write failed, for example because the disk is full; everything committed before is intact. Retry."""

    exit_code = 1


class Preempted(Exception):
    """The run received SIGTERM or SIGINT and has saved its work. Retry."""

    exit_code = 143


EXPECTED = (BadInput, NumericFailure, StorageFailure, Preempted, PermissionError)


def report(error: Exception, *, command: str = "dgkd_jax") -> int:
    """Print one of the `EXPECTED` errors on stderr; returns its exit code."""
    if isinstance(error, PermissionError):
        place, reason = error.filename or "a file", error.strerror or error
        error = BadInput(f"{place}: {reason}. Give this user the right to it, or name another place")
    print(f"{command}: {error}", file=sys.stderr, flush=True)
    return error.exit_code


def exit_code_of(work: Callable[[], object], *, command: str = "dgkd_jax") -> int:
    """Run `work`; returns 0. Where an expected error ends it, print that error and return its exit code."""
    try:
        work()
    except EXPECTED as error:
        return report(error, command=command)
    return 0


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser that raises `BadInput` on an error instead of exiting; its help ends with an example."""

    def __init__(self, *, example: str = "", **options):
        if example:
            options["epilog"] = f"Example: {example}"
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; try: {self.prog} --help")


def closest(name: object, names: Iterable[str], *, count: int = 1) -> list[str]:
    """Up to `count` of `names` with the spelling most similar to `name`, the most similar first."""
    return difflib.get_close_matches(str(name), list(names), n=count, cutoff=0.5)


def did_you_mean(name: object, names: Iterable[str], *, count: int = 1) -> str:
    """`; did you mean 'X'?` for the most similar of `names`, or "" where none is similar."""
    close = closest(name, names, count=count)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
