"""What CPUs compute quicker than by XLA, as an optional extra: `pip install -e '.[onednn]'`.

Convolutions are oneDNN's (`convolution`, `conv.cc`); BatchNorm in training is our own C++ (`batch_norm`,
`batch_norm.cc`). `library` finds oneDNN, compiles both once and loads them. `layers.Conv` and `layers.BatchNorm` use
them; where anything is missing, all is XLA's. `python -m dgkd_jax.models.onednn` says what is used, and why.
"""
