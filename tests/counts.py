"""Counts the tests with each marker as they are collected, those included that the session leaves out."""

from collections import Counter
from pathlib import Path

import pytest

COUNTS = pytest.StashKey[Counter]()
FILES = pytest.StashKey[set[Path]]()


def count(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the counts, and the files that they are of, in the session's stash."""
    config.stash[COUNTS] = Counter(name for item in items for name in {mark.name for mark in item.iter_markers()})
    config.stash[FILES] = {item.path for item in items}
