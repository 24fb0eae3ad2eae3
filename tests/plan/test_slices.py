"""Slices by their several names; an unknown one is answered with the nearest."""

import pytest

from dgkd_jax.errors import BadInput
from dgkd_jax.plan import slices


@pytest.mark.parametrize(
    ("text", "name", "chips", "hosts"),
    [
        ("v5e:4x4", "v5e:4x4", 16, 4),
        ("v5e-16", "v5e:4x4", 16, 4),  # chips
        ("v5litepod-16", "v5e:4x4", 16, 4),
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5e-256", "v5e:16x16", 256, 64),
        ("v6e-8", "v6e:2x4", 8, 2),
        ("tpu-v6e-slice:4x4", "v6e:4x4", 16, 4),  # GKE's label
        ("tpu-v5-lite-podslice:2x4", "v5e:2x4", 8, 2),
        ("v4-8", "v4:2x2x1", 4, 1),  # cores, two in a chip
        ("v4-32", "v4:2x2x4", 16, 4),
        ("v5p-8", "v5p:2x2x1", 4, 1),
        ("v5p-1024", "v5p:8x8x8", 512, 128),
        ("v5e:2x8", "v5e:2x8", 16, 4),  # not rented, but the compiler takes it
    ],
)
def test_every_name_of_a_slice(text, name, chips, hosts):
    found = slices.named(text)
    assert (found.name, found.chips, found.hosts) == (name, chips, hosts)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e-17", r"v5e-N counts chips.*nearest is v5e:4x4 \(v5e-16\)"),
        ("v5p-9", r"v5p-N counts cores, two in a chip.*nearest is v5p:2x2x1 \(v5p-8\)"),
        ("v5e:3x3", r"no such slice; the nearest is v5e:2x4 \(v5e-8\)"),
        ("v5e:2x2x2", r"no such slice; the nearest is v5e:2x4"),
        ("v6e:32x32", r"no such slice; the nearest is v6e:16x16 \(v6e-256\)"),
        ("v5e-0", r"nearest is v5e:1x1"),
        ("v5:4x4", r"'v5' is no chip.*nearest is v5p:4x4|'v5' is no chip.*nearest is v5e:4x4"),
        ("h100-8", r"'h100' is no chip.*there are v4, v5e, v5p, v6e"),
        ("v5e", r"no name of a slice: write v5e:4x4 or v5e-16"),
    ],
)
def test_an_unknown_slice_is_answered_with_the_nearest(text, message):
    with pytest.raises(BadInput, match=message):
        slices.named(text)
