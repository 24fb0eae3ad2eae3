"""BatchNorm folded into convolutions: the same network, with less to compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from dgkd_jax import models
from dgkd_jax.models import folding, layers


def _random(model, image_shape):
    """Variables far from those at the start: every scale, bias and statistic its own."""
    random = np.random.default_rng(0)
    leaves = flatten_dict(models.initialise(model, image_shape, seed=0))
    for path, leaf in leaves.items():
        value = leaf.astype(np.float64)
        if path[-1] in ("scale", "var"):
            value = random.uniform(0.5, 2.0, leaf.shape)
        elif path[-1] in ("bias", "mean"):
            value = random.normal(0, 0.3, leaf.shape)
        leaves[path] = value
    return unflatten_dict(leaves)


def _norms(variables):
    return {path[1:-1] for path in flatten_dict(variables) if path[0] == "batch_stats"}


@pytest.mark.parametrize(
    ("name", "image_shape"),
    [
        ("small_cnn_w8", (28, 28, 1)),
        ("resnet8", (16, 16, 3)),
        ("vgg8_bn", (16, 16, 3)),  # its convolutions have biases
        ("wrn_16_2", (16, 16, 3)),
        ("wrn_40_1", (8, 8, 3)),  # the stem's result goes to a BatchNorm and, beside it, into a sum
        ("shufflenet_v1_cifar", (16, 16, 3)),
        ("efficientnet_lite0", (32, 32, 3)),  # epsilon 1e-3, depthwise
        ("vit_tiny_patch16_224", (16, 16, 3)),  # none to fold
    ],
)
def test_logits_and_features_stay_the_same(name, image_shape):
    with jax.enable_x64(True):
        model = models.create(name, num_classes=7, dtype="float64")
        variables = _random(model, image_shape)
        images = np.random.default_rng(1).standard_normal((2, *image_shape))
        found = folding.pairs(model, variables, image_shape)
        before = jax.jit(lambda v, x: model.apply(v, x, features=True))(variables, images)
        apply = folding.folded_apply(model, found)
        after = jax.jit(lambda v, x: apply(v, x, features=True))(folding.fold(found, variables), images)
    for one, other in zip(after, before, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.abs(other).max())


# One of each family: what is found follows from the traced network, not from its size.
@pytest.mark.parametrize(
    "name",
    [
        "resnet20", "resnet50", "vgg8_bn", "wrn_16_2", "shufflenet_v1_cifar", "shufflenet_v2_cifar", "mobilenet_v2",
        "efficientnet_lite0", "vit_tiny_patch16_224", "small_cnn_w8",
    ],
)  # fmt: skip
def test_every_batch_norm_behind_a_convolution_is_found(name):
    model = models.create(name, num_classes=7)
    shapes = models.shapes(model, model.image_shape)
    norms = _norms(shapes)
    found = folding.pairs(model, shapes, model.image_shape)
    if not name.startswith("wrn"):
        assert {pair.batch_norm for pair in found} == norms
        return
    # Pre-activation: the second of each block; and the first of all where no shortcut goes round it.
    expected = {norm for norm in norms if norm[-1] == "bn2"}
    if name != "wrn_40_1":
        expected |= {("block1_0", "bn1")}
    assert {pair.batch_norm for pair in found} == expected


def test_what_is_folded_leaves_only_a_shift():
    model = models.create("resnet8", num_classes=7)
    variables = models.initialise(model, (16, 16, 3), seed=0)
    found = folding.pairs(model, variables, (16, 16, 3))
    folded = folding.fold(found, variables)
    assert "batch_stats" not in folded
    assert "scale" not in {path[-1] for path in flatten_dict(folded)}
    program = str(jax.make_jaxpr(folding.folded_apply(model, found))(folded, jnp.ones((1, 16, 16, 3))))
    assert "rsqrt" not in program
    assert "sqrt" in str(jax.make_jaxpr(model.apply)(variables, jnp.ones((1, 16, 16, 3))))


class _Shared(nn.Module):
    """One convolution used twice, a BatchNorm behind each use."""

    @nn.compact
    def __call__(self, x, *, train=False, features=False):
        conv = layers.Conv(3, 1, name="conv")
        for index in range(2):
            x = layers.BatchNorm(name=f"bn{index}")(conv(x), train=train)
        return (x, x) if features else x


def test_a_convolution_that_serves_twice_is_left_alone():
    model = _Shared()
    assert folding.pairs(model, models.shapes(model, (4, 4, 3)), (4, 4, 3)) == ()


def test_folded_network_has_no_training_mode():
    model = models.create("small_cnn_w8", num_classes=7)
    with pytest.raises(TypeError, match="train"):
        folding.folded_apply(model, ())({}, jnp.ones((1, 28, 28, 1)), train=True)
