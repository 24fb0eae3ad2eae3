"""Whether a program's bits depend on how many cores compute it."""

import os
import subprocess
import sys


def digests(program: str) -> set[str]:
    """What a Python program prints on one core, and on all cores twice: one text if the bits depend on neither."""
    available = sorted(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    said = set()
    for cores in (available[:1], available, available):
        command = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {cores})\n{program}"]
        said.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    return said
