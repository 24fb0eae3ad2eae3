"""Distillation of image classifiers in JAX: KD, DKD and Decoupled Gradient Knowledge Distillation (DGKD)."""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgkd_jax import losses, methods, models, torch_port
    from dgkd_jax.training.distill import Distilled, distill

__version__ = "0.1.0"
__all__ = ["Distilled", "distill", "losses", "methods", "models", "torch_port"]

# Imported when they are first asked for: `import dgkd_jax` takes no time, and the losses need little.
_WHERE = {"distill": "dgkd_jax.training.distill", "Distilled": "dgkd_jax.training.distill"}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in __all__:
        return importlib.import_module(f"dgkd_jax.{name}")
    raise AttributeError(f"module 'dgkd_jax' has no attribute {name!r}")


# `python -m dgkd_jax.main` outside the environment would end in a traceback about some package that nobody named.
if sys.argv[:1] == ["-m"] and importlib.util.find_spec("etils") is None:
    print(
        f"dgkd_jax: {sys.executable} does not have what dgkd_jax needs. Activate the environment that make set up "
        "(source .venv/bin/activate), or install it here: pip install -e .",
        file=sys.stderr,
    )
    raise SystemExit(2)
