"""What the tests of the losses share: 64 bits, and the figures recorded from PyTorch."""

from pathlib import Path

import jax
import numpy as np
import pytest

RECORDS = sorted((Path(__file__).parents[1] / "golden" / "losses").glob("*.npz"))
assert RECORDS, "tests/golden/losses is empty"


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", params=RECORDS, ids=lambda path: path.stem)
def recorded(request):
    """A batch of logits and what PyTorch computed of it, by the names of tests/golden/README.md; not to be changed."""
    with np.load(request.param) as file:
        return dict(file)
