"""Distillation of image classifiers in JAX: KD, DKD and Decoupled Gradient Knowledge Distillation (DGKD)."""

import importlib.util
import sys

__version__ = "0.1.0"

# `python -m dgkd_jax.main` outside the environment would end in a traceback about some package that nobody named.
if sys.argv[:1] == ["-m"] and importlib.util.find_spec("etils") is None:
    print(
        f"dgkd_jax: {sys.executable} does not have what dgkd_jax needs. Activate the environment that make set up "
        "(source .venv/bin/activate), or install it here: pip install -e .",
        file=sys.stderr,
    )
    raise SystemExit(2)
