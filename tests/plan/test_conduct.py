"""The search for the largest batch, with a stand-in for the compiler that takes up to a given number of images."""

import pytest
from in_memory import tiny

from dgkd_jax.errors import BadInput
from dgkd_jax.plan import conduct, slices


@pytest.mark.parametrize(
    ("most", "guess", "found"),
    [(200, 128, 192), (64, 128, 64), (1000, 300, 888), (7, 7, 7), (0, 16, None), (5000, 900, 1200)],
)
def test_the_largest_batch_is_the_most_that_was_compiled_and_fitted(monkeypatch, most, guess, found):
    tried = []

    def compiled(config, on, target):
        assert target == "train"
        tried.append(config.batch_size // on.chips)
        return conduct.TooLarge(None, None, 0.0) if tried[-1] > most else conduct.Compiled(None, 0.0)

    monkeypatch.setattr(conduct, "_compiled", compiled)
    assert conduct._largest(tiny(), slices.named("v5e-4"), "train", fits=0, guess=guess, ceiling=1200) == found
    assert len(tried) <= 5
    assert max(tried) <= 1200  # there are no more images
    assert len(set(tried)) == len(tried)


@pytest.mark.wrong_input
def test_a_batch_that_another_key_does_not_go_with_is_refused_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(conduct, "_compiled", lambda *_: pytest.fail("it was compiled"))
    with pytest.raises(BadInput, match="config.batch_norm_groups=8 must divide batch_size=12"):
        conduct.plan(tiny(batch_norm_groups=8), slices.named("v5e-4"), target="train", per_chip=3)
