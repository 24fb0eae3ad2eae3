"""The command `python -m dgkd_jax.landscape`: the loss and its parts as pictures (`dgkd_jax/analysis/landscape.py`)."""

import sys

from dgkd_jax.analysis.landscape import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
