"""Distillation of image classifiers in JAX: KD, DKD and Decoupled Gradient Knowledge Distillation (DGKD)."""

__version__ = "0.1.0"
