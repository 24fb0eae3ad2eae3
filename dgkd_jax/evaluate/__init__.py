"""Evaluation: exact on any number of devices, per example if wanted, and on other test sets."""
