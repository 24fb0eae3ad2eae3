"""docs/reliability.md says how many wrong inputs and faults are tried: as many as there are tests of them."""

import re
from pathlib import Path

import pytest
from counts import COUNTS, FILES

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "reliability.md"


@pytest.mark.parametrize(
    ("marker", "sentence"),
    [
        ("wrong_input", r"(\d+) wrong inputs are tried by the tests, and all are answered"),
        ("faults", r"(\d+) times a whole run is broken by `make test-faults`"),
    ],
)
def test_the_count_in_the_document_is_that_of_the_tests(request, marker, sentence):
    every_file = {path for path in HERE.rglob("test_*.py") if "torch" not in path.relative_to(HERE).parts}
    if every_file - request.config.stash[FILES]:
        pytest.skip("counted only where all tests are collected: give pytest no file")
    text = " ".join(DOCUMENT.read_text().split())
    assert int(re.search(sentence, text)[1]) == request.config.stash[COUNTS][marker]
