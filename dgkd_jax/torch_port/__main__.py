"""Writes the student of a work directory for PyTorch: `python -m dgkd_jax.torch_port export …`."""

import sys

from dgkd_jax.torch_port.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
