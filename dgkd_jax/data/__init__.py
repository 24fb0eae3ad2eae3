"""Data sets, as batches that are pure functions of (seed, step)."""
