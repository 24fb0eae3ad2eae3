"""Networks of torchvision and timm with our converted weights, and BatchNorm's training mode, all in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import torchvision

from dgkd_jax import losses, models, torch_port
from dgkd_jax.parity import torch_reference

CLASSES = 10


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


# Each program runs once, so that optimising it costs more than it saves.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Weights as PyTorch draws them from a fixed seed, and running statistics other than 0 and 1."""
    torch.manual_seed(0)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.to(torch.float64)


def entries_of(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: entry.numpy(force=True).copy() for name, entry in network.state_dict().items()}


def ours_of(name: str, network: torch.nn.Module):
    model = models.create(name, num_classes=CLASSES, dtype=jnp.float64)
    return model, jax.tree.map(jnp.asarray, torch_port.from_torch(entries_of(network), model, name))


def largest_error(found, expected) -> float:
    return float(np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected)))


@pytest.mark.parametrize(
    ("name", "side", "make"),
    [
        ("resnet18", 64, torchvision.models.resnet18),
        ("resnet50", 64, torchvision.models.resnet50),
        ("mobilenet_v2", 64, torchvision.models.mobilenet_v2),
        ("convnext_tiny", 64, torchvision.models.convnext_tiny),
        ("vit_tiny_patch16_224", 224, functools.partial(timm.create_model, "vit_tiny_patch16_224")),
    ],
)
def test_logits_in_evaluation_mode(name, side, make):
    network = randomised(make(num_classes=CLASSES)).eval()
    images = np.random.default_rng(0).standard_normal((2, 3, side, side))
    with torch.no_grad():
        expected = network(torch.tensor(images)).numpy()
    model, variables = ours_of(name, network)
    found = compiled(model.apply)(variables, images.transpose(0, 2, 3, 1))
    # Sums of thousands of terms in another order, through up to fifty layers.
    assert largest_error(found, expected) < 1e-10


def test_batch_norm_in_training_logits_statistics_and_all_gradients():
    model = models.create("resnet14", num_classes=CLASSES, dtype=jnp.float64)
    structure = {key: getattr(model, key) for key in ("stage_sizes", "widths", "stem_width", "num_classes")}
    network = randomised(torch_reference.ThinResNet(**structure)).train()
    model, variables = ours_of("resnet14", network)
    rng = np.random.default_rng(1)
    images, labels = rng.standard_normal((8, 3, 32, 32)), rng.integers(0, CLASSES, 8)

    expected = network(torch.tensor(images))
    torch.nn.functional.cross_entropy(expected, torch.tensor(labels)).backward()
    after = entries_of(network)
    gradients = {name: parameter.grad.numpy() for name, parameter in network.named_parameters()}

    def loss(params):
        logits, updates = model.apply(
            {**variables, "params": params}, images.transpose(0, 2, 3, 1), train=True, mutable=["batch_stats"]
        )
        return jnp.mean(losses.cross_entropy(logits, labels)), (logits, updates["batch_stats"])

    (_, (logits, statistics)), found = compiled(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert largest_error(logits, expected.detach().numpy()) < 1e-12
    as_entries = functools.partial(torch_port.to_torch, model=model, name="resnet14")
    moved = as_entries({"params": variables["params"], "batch_stats": statistics})
    running = [name for name in after if "running" in name]
    assert len(running) == 2 * 15  # thirteen convolutions and two shortcuts, each with its norm
    for name in running:
        assert largest_error(moved[name], after[name]) < 1e-12, name
    ours = as_entries({"params": found, "batch_stats": statistics})
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # A gradient that cancels, as behind a norm, has the rounding of the largest one.
        np.testing.assert_allclose(ours[name], gradient, rtol=1e-9, atol=1e-13 * largest, err_msg=name)
