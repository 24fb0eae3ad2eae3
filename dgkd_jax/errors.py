"""What ends a run early, and the exit code that says so to whoever started it.

0 is done; 2 and 3 would only fail again: do not retry; after 143 and every other code start the same command again.
"""


class BadInput(ValueError):
    """The user's input cannot be used. The message is one or a few lines: what, where, what to do.

    `main` prints it on stderr without a traceback; do not retry.
    """

    exit_code = 2


class NumericFailure(ArithmeticError):
    """The numbers went bad; the message says which, where and what to try. Do not retry unchanged."""

    exit_code = 3


class StorageFailure(OSError):
    """Something could not be written, such as to a full disk; what was committed before is intact. Retry."""

    exit_code = 1


class Preempted(Exception):
    """The run was told to stop (SIGTERM or SIGINT) and has saved what it had done. Retry."""

    exit_code = 143
