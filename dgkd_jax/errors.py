"""What ends a run early, and the exit code that says so to whoever started it."""

EXIT_BAD_INPUT = 2


class BadInput(ValueError):
    """The user's input cannot be used. The message is one or a few lines: what, where, what to do.

    `main` prints it on stderr without a traceback and exits with `EXIT_BAD_INPUT`; do not retry.
    """
