"""`parity model` against the networks of torchvision, timm and pytorchcv: they agree, and a change is found."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from pytorchcv.models import resnet, resnet_cifar

from dgkd_jax import models, torch_port
from dgkd_jax.models import platform
from dgkd_jax.parity import __main__ as command
from dgkd_jax.parity import model as comparison
from dgkd_jax.parity import torch_networks, torch_reference


@pytest.mark.parametrize(
    ("name", "side", "package", "layers"),
    [
        # layers: convolutions, norms, linear layers, blocks and the logits.
        ("resnet14", 32, "pytorchcv", 15 + 15 + 1 + 6 + 1),
        ("resnet8x4", 40, "pytorchcv", 10 + 10 + 1 + 3 + 1),
        ("wrn_16_2", 32, "pytorchcv", 16 + 13 + 1 + 6 + 1),
        ("resnet18_cifar", 32, "torchvision", 20 + 20 + 1 + 8 + 1),
        ("resnet50", 48, "torchvision", 53 + 53 + 1 + 16 + 1),
        ("vgg8", 32, "torchvision", 5 + 1 + 1),
        ("vgg11_bn", 64, "torchvision", 8 + 8 + 1 + 1),  # at 64 pixels with another pooling
        ("shufflenet_v2_cifar", 32, "torchvision", 56 + 56 + 1 + 16 + 1),
        ("shufflenet_v2_x0_5", 64, "torchvision", 56 + 56 + 1 + 16 + 1),
        ("mobilenet_v2", 64, "torchvision", 52 + 52 + 1 + 17 + 1),
        ("efficientnet_lite0", 75, "timm", 49 + 49 + 1 + 16 + 1),
        ("vit_tiny_patch16_224", 64, "timm", 1 + 25 + 48 + 1 + 12 + 1),  # position embeddings resampled
        ("convnext_tiny", 64, "torchvision", 22 + 23 + 36 + 1 + 18 + 1),
        ("swin_s", 64, "torchvision", 1 + 53 + 48 + 3 + 1 + 27 + 1),  # without 48 that are no modules when called
    ],
)
def test_every_layer_agrees_in_float64(name, side, package, layers):
    found = comparison.run(torch_networks, name=name, image_size=side, seed=3)
    assert found.passed, found.notes
    assert found.reference.startswith(f"{package} ")
    assert len(found.rows) == layers
    assert found.rows[-1]["layer"] == "logits"
    assert max(row["relative"] for row in found.rows) < 1e-12


def test_layers_agree_in_float32_and_with_a_weight_file(tmp_path, capsys):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=7)
    torch.save(network.state_dict(), tmp_path / "seven.pth")
    output = tmp_path / "found.json"
    arguments = ["model", "--name=resnet18", f"--weights={tmp_path}/seven.pth", "--image_size=64", "--dtype=float32"]
    assert command.main([*arguments, f"--output={output}"]) == 0
    assert "no layer differs" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert content["rows"][-1]["shape"] == "2x7"
    assert content["rows"][-1]["relative"] > 0  # two programs, not one compared with itself
    assert {row["tolerance"] for row in content["rows"]} == {1e-4}


def _first_miss(monkeypatch, capsys, tmp_path, change, *arguments):
    """What the command says and writes when `change` has been done to PyTorch's network."""
    fill = torch_networks.fill

    def changed(*given):
        module = fill(*given)
        change(module)
        return module

    monkeypatch.setattr(torch_networks, "fill", changed)
    output = tmp_path / "found.json"
    assert command.main(["model", *arguments, f"--output={output}"]) == 1
    rows = json.loads(output.read_text())["rows"]
    return next(row["layer"] for row in rows if not row["passed"]), capsys.readouterr().out


def test_one_edited_weight_is_named(monkeypatch, capsys, tmp_path):
    def change(module):
        module.layer2[1].conv1.weight.data[3, 1, 2, 0] += 1e-3

    first, out = _first_miss(monkeypatch, capsys, tmp_path, change, "--name=resnet18", "--image_size=64")
    assert first == "layer2_1/conv1"
    assert "the first layer that differs: layer2_1/conv1, in PyTorch layer2.1.conv1, by" in out
    assert "the one before, layer2_0, agrees" in out


def test_another_epsilon_is_named(monkeypatch, capsys, tmp_path):
    def change(module):
        module.features.stage3.unit1.body.conv1.bn.eps = 1e-3

    first, out = _first_miss(monkeypatch, capsys, tmp_path, change, "--name=wrn_16_2")
    assert first == "block3_0/bn1"
    assert "in PyTorch features.stage3.unit1.body.conv1.bn" in out


def test_in_a_tpus_form_attention_shows_in_its_block(capsys):
    """There its linear layers have no output of their own; everywhere else a layer without one is an error."""
    with platform.on("tpu"):
        assert command.main(["model", "--name=vit_tiny_patch16_224", "--image_size=64"]) == 0
    note = "24 layers are no modules that both call, and show in the next one: blocks_0/attn/proj"
    assert note in capsys.readouterr().out


def test_what_is_no_module_shows_in_its_block(monkeypatch, capsys, tmp_path):
    def change(module):
        module.features[1][1].attn.qkv.bias.data[0] += 0.1

    first, out = _first_miss(monkeypatch, capsys, tmp_path, change, "--name=swin_s", "--image_size=32")
    assert first == "features_1_1/norm2"  # the first thing behind the attention that is a module of both
    assert "48 layers are no modules that both call, and show in the next one: features_1_0/attn/proj" in out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shufflenet_v1_cifar", "no package has a PyTorch implementation of shufflenet_v1_cifar"),
        ("resnet8", "pytorchcv, which has a PyTorch implementation of resnet8, is not installed: python -m pip"),
    ],
)
def test_a_network_that_cannot_be_imported_is_said_and_compared_with_the_record(name, said, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorchcv", None)
    assert command.main(["model", f"--name={name}"]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert "these are recorded logits" in out


# ---------------------------------------------------------------------------------------------------------- pytorchcv


def _in_order(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Give `theirs` the entries of `ours`: both define the same layers in the same order under their own names."""
    pairs = zip(theirs.state_dict(), ours.state_dict().values(), strict=True)
    theirs.load_state_dict(dict(pairs), strict=True)  # which compares the shapes


def _thin(name):
    model = models.create(name, num_classes=10)
    structure = {key: getattr(model, key) for key in ("stage_sizes", "widths", "stem_width", "num_classes")}
    channels = [[width] * size for size, width in zip(model.stage_sizes, model.widths, strict=True)]
    theirs = resnet_cifar.CIFARResNet(channels, model.stem_width, bottleneck=False, num_classes=10)
    return torch_reference.ThinResNet(**structure), theirs


@pytest.mark.parametrize(
    ("name", "side", "make"),
    [
        *((f"resnet{kind}", 32, None) for kind in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")),
        ("resnet18", 224, resnet.resnet18),
        ("resnet50", 224, resnet.resnet50b),  # b: the stride is on the 3x3 convolution, as in torchvision
    ],
)
def test_logits_equal_those_of_pytorchcv(name, side, make):
    torch.manual_seed(1)
    # A network with our entries' names gives them their order; its values go to both sides.
    named, theirs = _thin(name) if make is None else (getattr(torchvision.models, name)(num_classes=10), make())
    if make is not None:
        theirs.output = torch.nn.Linear(theirs.output.in_features, 10)
    for module in named.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for entry, low, high in (("running_mean", -0.2, 0.2), ("running_var", 0.5, 1.5), ("weight", 0.5, 1.5)):
                torch.nn.init.uniform_(getattr(module, entry), low, high)
    _in_order(theirs, named)
    images = np.random.default_rng(0).standard_normal((1, 3, side, side))
    with torch.no_grad():
        expected = theirs.double().eval()(torch.tensor(images)).numpy()
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        model = models.create(name, num_classes=10, dtype=jnp.float64)
        entries = {entry: tensor.numpy() for entry, tensor in named.double().state_dict().items()}
        run = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})
        found = run(torch_port.from_torch(entries, model, name), jnp.asarray(images.transpose(0, 2, 3, 1)))
    assert np.max(np.abs(np.asarray(found) - expected)) < 1e-10 * np.max(np.abs(expected))
