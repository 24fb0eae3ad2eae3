"""Every recorded network against PyTorch's numbers (tests/golden); `make test-all` has one of each kind of block."""

import golden_networks
import pytest


# float64 shows that a network is the same; that float32 is computed as well, one of each kind of layers does.
@pytest.mark.parametrize(
    ("record", "dtype"),
    [(record, "float64") for record in (*golden_networks.NAMES, *golden_networks.SMALL)]
    + [(record, "float32") for record in ("dgkd_resnet56", "dgkd_ShuffleV2", "timm_vit_tiny_patch16_224")],
)
def test_logits_and_features_equal_those_of_pytorch(record, dtype):
    golden_networks.assert_logits_and_features_are_pytorchs(record, dtype=dtype)
