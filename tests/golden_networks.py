"""The recorded networks of tests/golden: which of ours each of them is, and whether ours computes the same."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dgkd_jax import models, torch_port
from dgkd_jax.models import efficientnet_lite, swin, vit
from dgkd_jax.parity import golden_weights

FOLDER = Path(__file__).parent / "golden" / "models"

# A record of PyTorch's logits -> the name of our network.
NAMES = {
    "dgkd_resnet8": "resnet8",
    "dgkd_resnet20": "resnet20",
    "dgkd_resnet56": "resnet56",
    "dgkd_resnet8x4": "resnet8x4",
    "dgkd_resnet32x4": "resnet32x4",
    "torchvision_resnet18": "resnet18",
    "torchvision_resnet50": "resnet50",
    "mdistiller_ResNet50": "resnet50_cifar",
    "dgkd_vgg8": "vgg8",
    "dgkd_vgg13_bn": "vgg13_bn",
    "mdistiller_wrn_16_2": "wrn_16_2",
    "mdistiller_wrn_40_2": "wrn_40_2",
    "mdistiller_ShuffleV1": "shufflenet_v1_cifar",
    "dgkd_ShuffleV2": "shufflenet_v2_cifar",
    "torchvision_shufflenet_v2_x1_0": "shufflenet_v2_x1_0",
    "torchvision_mobilenet_v2": "mobilenet_v2",
    "mdistiller_MobileNetV2": "mobilenet_v2_half_cifar",
    "efficientnet_lite0": "efficientnet_lite0",
    "timm_vit_tiny_patch16_224": "vit_tiny_patch16_224",
    "timm_vit_small_patch16_224": "vit_small_patch16_224",
    "torchvision_convnext_tiny": "convnext_tiny",
    "torchvision_swin_s": "swin_s",
}

FIXTURE_VIT = functools.partial(
    vit.VisionTransformer, num_classes=5, width=24, heads=3, depth=2, image_shape=(64, 64, 3)
)
FIXTURE_SWIN = functools.partial(swin.Swin, num_classes=5, stage_sizes=(2, 2, 2), heads=(1, 2, 4), width=16)
FIXTURE_LITE = functools.partial(
    efficientnet_lite.EfficientNetLite, num_classes=5, stages=((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2))
)


class Small(NamedTuple):
    """A network with few narrow blocks and images of another size; its weights are named as those of `like`."""

    create: Callable[..., Any]
    like: str


SMALL = {
    "timm_vit_32x112": Small(FIXTURE_VIT, "vit_tiny_patch16_224"),  # resampled position embeddings: 4x4 to 2x7
    # 12x23, 6x12, 3x6 tokens: padded, shifted along 2, 1, 0 axes
    "torchvision_swin_50x94": Small(FIXTURE_SWIN, "swin_s"),
    "efficientnet_lite_75x50": Small(FIXTURE_LITE, "efficientnet_lite0"),
}

# One of each kind of block; all the others are computed by `make test-torch`.
ONE_OF_EACH_KIND = (
    "dgkd_resnet8",
    "dgkd_resnet8x4",
    "mdistiller_ResNet50",  # bottlenecks
    "dgkd_vgg8",
    "mdistiller_wrn_16_2",
    "mdistiller_ShuffleV1",
    "dgkd_ShuffleV2",
    "mdistiller_MobileNetV2",
    "torchvision_convnext_tiny",
    *SMALL,
)


def read(record: str) -> dict[str, Any]:
    """The content of a record: PyTorch's entries by name and shape, its logits, and what these were computed from."""
    return json.loads((FOLDER / f"{record}.json").read_text())


def state_dict(record: str) -> dict[str, np.ndarray]:
    """The weights that a record belongs to, under PyTorch's names."""
    return golden_weights.weights(read(record))


def assert_logits_and_features_are_pytorchs(record: str, *, dtype: str) -> None:
    """Of our network with the record's weights, on the record's images."""
    golden = read(record)
    entries = {
        entry: array.astype(dtype) if array.dtype == np.float64 else array
        for entry, array in golden_weights.weights(golden).items()
    }
    # float64: rounding of some 10^5 additions stays far below 1e-10. float32: 53 layers at 6e-8 each, with room.
    tolerance = {"float64": 1e-10, "float32": 1e-4}[dtype]
    with jax.enable_x64(dtype == "float64"):
        if record in SMALL:
            model, name = SMALL[record].create(dtype=np.dtype(dtype)), SMALL[record].like
        else:
            name = NAMES[record]
            model = models.create(name, num_classes=len(golden["logits"][0]), dtype=dtype)
        variables = torch_port.from_torch(entries, model, name)
        images = golden_weights.images(golden).transpose(0, 2, 3, 1).astype(dtype)
        # It runs once, so that optimising it costs more than it saves.
        compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
        logits, features = compiled(functools.partial(model.apply, features=True))(variables, images)
    assert logits.dtype == features.dtype == dtype
    for ours, theirs in [(logits, golden["logits"]), (features, golden.get("features"))]:
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
