"""Agreement with PyTorch, measured: `python -m dgkd_jax.parity --help` lists the comparisons."""
