"""Agreement with PyTorch, measured: `python -m dgkd_jax.parity losses|training|model`; `--help` says the rest."""
