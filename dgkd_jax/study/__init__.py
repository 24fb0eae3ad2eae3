"""Studies: many runs to answer one question, and their results. A file in configs/study defines a `Study`."""

from dgkd_jax.study.plan import Study

__all__ = ["Study"]
