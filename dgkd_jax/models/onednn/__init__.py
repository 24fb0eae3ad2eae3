"""oneDNN's convolutions on CPUs, as an optional extra: `pip install -e '.[onednn]'`.

`library` finds oneDNN, builds `conv.cc` against it once and loads it; `convolution` makes it known to JAX.
`layers.Conv` uses both; where anything is missing, convolutions are XLA's. `python -m dgkd_jax.models.onednn` says what
is used, and why.
"""
