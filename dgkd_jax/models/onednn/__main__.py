"""Compile what calls oneDNN if need be, and say what computes the convolutions on this machine, and why.

    python -m dgkd_jax.models.onednn

Exit code 0: oneDNN. 1: XLA.
"""

import sys

from dgkd_jax.models.onednn import library

if __name__ == "__main__":
    print(library.status() or "convolutions by XLA; on a CPU oneDNN's are an extra: pip install -e '.[onednn]'")
    sys.exit(0 if library.find() else 1)
