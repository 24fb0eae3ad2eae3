"""A trained student in the forms that people deploy; `python -m dgkd_jax.export --help`. One file per format."""
