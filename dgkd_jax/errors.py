"""What ends a run early, and the exit code that says so to whoever started it."""


class BadInput(ValueError):
    """The user's input cannot be used. The message is one or a few lines: what, where, what to do.

    `main` prints it on stderr without a traceback; do not retry.
    """

    exit_code = 2


class NumericFailure(ArithmeticError):
    """The numbers went bad; the message says which, where and what to try. Do not retry unchanged."""

    exit_code = 3
