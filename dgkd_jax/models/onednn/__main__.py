"""Says what computes the convolutions on this machine's CPU, and why; compiles what calls oneDNN if need be.

    python -m dgkd_jax.models.onednn

Exit code 0: oneDNN. 1: XLA.
"""

import sys

import jax

from dgkd_jax.errors import ArgumentParser, exit_code_of
from dgkd_jax.models.onednn import library


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    return exit_code_of(lambda: _tell(argv)) or int(library.find() is None)


def _tell(argv: list[str]) -> None:
    ArgumentParser(
        prog="python -m dgkd_jax.models.onednn",
        description=f"{__doc__.splitlines()[0]} Exit code 0: oneDNN. 1: XLA.",
        example="python -m dgkd_jax.models.onednn && python -m dgkd_jax.main --config=configs/mnist5k.py",
    ).parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the question is about the CPU, also where there is something quicker
    print(library.status() or "convolutions by XLA; on a CPU oneDNN's are an extra: pip install -e '.[onednn]'")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
