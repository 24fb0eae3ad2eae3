"""VGG, wide ResNet, ShuffleNet and MobileNet: what their fixtures (test_models.py) do not show."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dgkd_jax import models
from dgkd_jax.models import layers, mobilenet_v2, shufflenet_cifar, shufflenet_v2, vgg, wrn

NAMES = (
    "vgg8",
    "vgg8_bn",
    "wrn_16_2",
    "shufflenet_v1_cifar",
    "shufflenet_v2_x0_5",
    "mobilenet_v2",
    "mobilenet_v2_half_cifar",
)


# Each program runs once, so that optimising it costs far more than it saves.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _paths(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


# ----------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        # published: the convolutions of torchvision's VGGs without their heads; here the head is 512·100 + 100
        ("vgg11", 9_220_480 + 51_300),
        ("vgg13", 9_404_992 + 51_300),
        ("vgg16", 14_714_688 + 51_300),
        ("vgg19", 20_024_384 + 51_300),
        # scale and bias for each of the channels of all convolutions
        ("vgg8_bn", 3_962_084 + 2 * (64 + 128 + 256 + 2 * 512)),
        ("vgg11_bn", 9_220_480 + 51_300 + 2 * (64 + 128 + 2 * 256 + 4 * 512)),
        ("vgg16_bn", 14_714_688 + 51_300 + 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512)),
        ("vgg19_bn", 20_024_384 + 51_300 + 2 * (2 * 64 + 2 * 128 + 4 * 256 + 8 * 512)),
        # published for CIFAR-10 (pytorchcv, wrn40_1): 563,930; the head has 90 classes more
        ("wrn_40_1", 563_930 + 90 * 65),
        # published with torchvision for 1000 classes: 1,366,792
        ("shufflenet_v2_x0_5", 1_366_792 - 900 * 1025),
    ],
)
def test_networks_without_a_fixture_have_the_right_number_of_parameters(name, num_params):
    model = models.create(name, num_classes=100)
    params = models.shapes(model, model.image_shape)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params


def _interceptor(record):
    def intercept(next_method, args, kwargs, context):
        if context.method_name == "__call__":
            record(context.module, args, kwargs)
        return next_method(*args, **kwargs)

    return nn.intercept_methods(intercept)


@pytest.mark.parametrize("name", NAMES)
def test_knobs_and_training_mode_reach_every_layer(name):
    norms, convolutions = [], []

    def record(module, _args, kwargs):
        if isinstance(module, layers.BatchNorm):
            norms.append((module.groups, module.dtype, kwargs["train"]))
        elif isinstance(module, layers.Conv):
            convolutions.append(module.dtype)

    model = models.create(name, num_classes=5, dtype=jnp.bfloat16, batch_norm_groups=3)
    variables = models.shapes(model, model.image_shape)
    images = jax.ShapeDtypeStruct((6, *model.image_shape), jnp.uint8)
    with _interceptor(record):
        _, updates = jax.eval_shape(partial(model.apply, train=True, mutable=["batch_stats"]), variables, images)
    without_norm = name.startswith("vgg") and not name.endswith("_bn")
    assert set(convolutions) == {jnp.dtype(jnp.bfloat16)}
    assert set(norms) == (set() if without_norm else {(3, jnp.dtype(jnp.bfloat16), True)})
    assert jax.tree.structure(updates.get("batch_stats")) == jax.tree.structure(variables.get("batch_stats"))
    assert len(norms) == len(jax.tree.leaves(updates)) / 2


@pytest.mark.parametrize(
    ("name", "image_shape"),
    [
        ("vgg8", (8, 9, 3)),
        ("vgg11_bn", (64, 50, 1)),
        ("wrn_16_2", (40, 25, 3)),
        ("shufflenet_v1_cifar", (33, 47, 3)),
        ("shufflenet_v2_cifar", (64, 64, 3)),
        ("shufflenet_v2_x0_5", (65, 97, 3)),
        ("mobilenet_v2", (65, 97, 3)),
        ("mobilenet_v2_half_cifar", (40, 25, 3)),
    ],
)
def test_other_image_sizes_work(name, image_shape):
    model = models.create(name, num_classes=5)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    assert jax.eval_shape(model.apply, models.shapes(model, image_shape), images).shape == (2, 5)


@pytest.mark.parametrize(
    ("size", "message"),
    [((7, 32), "images of 7x32 pixels 3 times; .* at least 8 pixels"), ((64, 12), "64x12 pixels 4 times; .* 16")],
)
def test_vgg_refuses_images_that_its_poolings_would_use_up(size, message):
    model = models.create("vgg8", num_classes=5)
    with pytest.raises(ValueError, match=message):
        models.shapes(model, (*size, 3))


@pytest.mark.parametrize(("height", "left"), [(32, 4), (64, 4), (72, 9)])
def test_vgg_pools_once_more_where_images_are_64_pixels_high(height, left):
    seen = {}
    model = models.create("vgg8", num_classes=5)
    with _interceptor(lambda module, args, _: seen.update({module.name: args[0].shape})):
        models.shapes(model, (height, height, 3))
    assert seen["block4_0"] == (1, left, left, 512)


# -------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize(
    ("groups", "order"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 3, 1, 4, 2, 5]), (3, [0, 2, 4, 1, 3, 5])]
)
def test_shuffle_deals_the_groups_round(groups, order):
    shuffled = shufflenet_v2.channel_shuffle(jnp.arange(6).reshape(1, 1, 1, 6), groups=groups)
    assert shuffled.ravel().tolist() == order


# ------------------------------------------------------------------------------------------------------------ training

# Each family with every kind of its blocks but few of them: compiling the gradients of a whole network takes long.
SHALLOW = {
    "vgg_bn": vgg.VGG(num_classes=5, depths=(2, 1, 1, 1, 1), batch_norm=True),
    "vgg": vgg.VGG(num_classes=5, depths=(1, 1, 1, 1, 2), batch_norm=False),
    "wrn": wrn.WideResNet(num_classes=5, blocks=2, widen=1),
    "shufflenet_v1": shufflenet_cifar.ShuffleNetV1(num_classes=5, widths=(48, 96), sizes=(2, 1)),
    "shufflenet_v2": shufflenet_v2.ShuffleNetV2(num_classes=5, widths=(32,), sizes=(2,)),
    "mobilenet_v2": mobilenet_v2.MODELS["mobilenet_v2"](num_classes=5, stages=((8, 1, 1), (12, 2, 2))),
    "mobilenet_v2_half": mobilenet_v2.MODELS["mobilenet_v2_half_cifar"](num_classes=5, stages=((8, 2, 1),)),
}
# Biases between which and a BatchNorm only unpadded linear layers lie: they leave with the mean, the gradient is 0.
SUBTRACTED = {
    "vgg_bn": r"block\d_[03]/bias$",
    "shufflenet_v2": r"(left_bn1|right_bn2)/bias$",
    "mobilenet_v2": r"project_bn/bias$",
    "mobilenet_v2_half": r"project_bn/bias$",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHALLOW)
def test_training_moves_statistics_and_reaches_every_parameter(kind):
    model = SHALLOW[kind]
    rng = np.random.default_rng(0)
    variables = models.initialise(model, (16, 16, 3), seed=0)
    # Off their first values: with bias 0 before a ReLU, the BatchNorm after a depthwise convolution undoes each scale.
    shaken = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), variables["params"])
    images = rng.standard_normal((8, 16, 16, 3), np.float32)

    def loss(params):
        logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(logits - jnp.arange(5))), updates

    gradients, updates = compiled(jax.grad(loss, has_aux=True))(shaken)
    largest = {path: np.abs(gradient).max() for path, gradient in _paths(gradients).items()}
    assert np.isfinite(list(largest.values())).all()
    # Rounding leaves about 1e-8 of a gradient that is 0; all others are above 1e-3.
    silent = {path for path, size in largest.items() if size < 1e-5}
    assert silent == {path for path in largest if re.search(SUBTRACTED.get(kind, "$^"), path)}
    moved = _paths(updates.get("batch_stats", {}))
    assert moved.keys() == _paths(variables.get("batch_stats", {})).keys()
    for path, old in _paths(variables.get("batch_stats", {})).items():
        assert np.all(np.isfinite(moved[path])), path
        assert np.any(moved[path] != old), path


# ------------------------------------------------------------------------------------------------------ initial values


def _expected(name, path, shape):
    """What the repositories start from, as (distribution, its width), written apart from the tables."""
    leaf = path.rsplit("/", 1)[1]
    head = path.startswith("params/fc/")
    torch_default = "shufflenet" in name
    if leaf in ("scale", "var"):
        return "constant", 1.0
    if leaf in ("mean", "bias") and not (head and torch_default):
        return "constant", 0.0
    if head and name.startswith(("vgg", "mobilenet")):
        return "normal", 0.01
    if head:
        pooled = {"wrn_16_2": 128, "shufflenet_v1_cifar": 960, "shufflenet_v2_x0_5": 1024}[name]
        return "uniform", 1 / np.sqrt(pooled)
    height, width, group_in, out = shape
    if torch_default:
        return "uniform", 1 / np.sqrt(height * width * group_in)
    return "normal", np.sqrt(2 / (height * width * out))


@pytest.mark.parametrize("name", NAMES)
def test_initial_values_are_those_of_the_repositories(name):
    model = models.create(name, num_classes=10)
    for path, values in _paths(models.initialise(model, model.image_shape, seed=0)).items():
        distribution, width = _expected(name, path, values.shape)
        if distribution == "constant":
            assert np.all(values == width), path
            continue
        deviation = width if distribution == "normal" else width / np.sqrt(3)
        if distribution == "uniform":
            assert np.abs(values).max() <= width, path
        # the standard deviation of n numbers is known to 1/sqrt(2n); 6 of these do not happen by chance
        assert abs(values.std() / deviation - 1) < 6 / np.sqrt(2 * values.size), path
        assert abs(values.mean()) < 6 * deviation / np.sqrt(values.size), path
