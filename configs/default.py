"""The defaults of all keys; they live in the package, `dgkd_jax/runs/default.py`, with meanings and ranges."""

from dgkd_jax.runs.default import get_config

__all__ = ["get_config"]
