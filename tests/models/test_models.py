"""The networks against PyTorch's numbers (golden/), the layers against numpy written separately."""

import contextlib
import zlib
from functools import partial

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dgkd_jax import models
from dgkd_jax.models import layers
from dgkd_jax.models.network import normalize

# Each program runs once, so that optimising it costs far more than it saves.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _paths(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


@contextlib.contextmanager
def compilations():
    """The names of what JAX compiles, as it compiles them."""
    names = []

    def listen(event, _, *, fun_name="", **more):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# ---------------------------------------------------------------------------------------------- agreement with PyTorch


# The list of all is in tests/torch/test_golden_networks.py: `make test-torch`.
@pytest.mark.slow
@pytest.mark.parametrize("record", golden_networks.ONE_OF_EACH_KIND)
def test_logits_and_features_equal_those_of_pytorch(record):
    golden_networks.assert_logits_and_features_are_pytorchs(record, dtype="float64")


def test_logits_and_features_in_float32_equal_those_of_pytorch():
    golden_networks.assert_logits_and_features_are_pytorchs("dgkd_resnet20", dtype="float32")


@pytest.mark.parametrize("record", golden_networks.NAMES)
def test_parameter_count_equals_that_of_pytorch(record):
    golden = golden_networks.read(record)
    model = models.create(golden_networks.NAMES[record], num_classes=len(golden["logits"][0]))
    params = models.shapes(model, model.image_shape)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == golden["num_params"]


# ------------------------------------------------------------------------------------------------------------- by name


@pytest.mark.parametrize("name", models.NAMES)
def test_every_name_gives_logits_and_features_in_float32(name):
    model = models.create(name, num_classes=7, dtype=jnp.bfloat16)
    variables = models.shapes(model, model.image_shape)
    images = jax.ShapeDtypeStruct((2, *model.image_shape), jnp.uint8)
    logits, features = jax.eval_shape(lambda v, x: model.apply(v, x, features=True), variables, images)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    assert (features.shape[0], features.ndim, features.dtype) == (2, 2, jnp.float32)
    assert models.classifier(variables).shape == (features.shape[1], 7)


def test_names_are_those_of_the_families():
    thin = {f"resnet{kind}" for kind in ("8", "14", "20", "32", "44", "56", "110", "8x4", "32x4")}
    wide = {f"resnet{depth}{stem}" for depth in (18, 34, 50, 101) for stem in ("", "_cifar")}
    vgg = {f"vgg{depth}{norm}" for depth in (8, 11, 13, 16, 19) for norm in ("", "_bn")}
    wrn = {"wrn_16_2", "wrn_40_1", "wrn_40_2"}
    shufflenet = {f"shufflenet_{kind}" for kind in ("v1_cifar", "v2_cifar", "v2_x0_5", "v2_x1_0")}
    mobilenet = {"mobilenet_v2", "mobilenet_v2_half_cifar"}
    transformers = {f"{kind}_patch16_224" for kind in ("vit_tiny", "vit_small", "deit_small")} | {"swin_s"}
    small = {"small_cnn_w4", "small_cnn_w8", "small_cnn_w24", "convnext_tiny", "efficientnet_lite0"}
    assert set(models.NAMES) == thin | wide | vgg | wrn | shufflenet | mobilenet | transformers | small


@pytest.mark.parametrize(
    ("name", "num_params"),
    # 6n+2 layers by hand: resnet14 = resnet8 + one block a stage (18·w² + 4·w for w = 16, 32, 64), and so on.
    [
        ("resnet14", 83_892 + 18 * (16**2 + 32**2 + 64**2) + 4 * (16 + 32 + 64)),
        ("resnet110", 83_892 + 17 * (18 * (16**2 + 32**2 + 64**2) + 4 * (16 + 32 + 64))),
        # as published with torchvision, 1000 classes there: 21,797,672 and 44,549,160
        ("resnet34", 21_797_672 - 900 * 513),
        ("resnet101", 44_549_160 - 900 * 2049),
    ],
)
def test_depths_without_a_fixture_have_the_right_number_of_parameters(name, num_params):
    model = models.create(name, num_classes=100)
    params = models.shapes(model, model.image_shape)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params


def test_small_pair_has_the_promised_sizes():
    sizes = {}
    for name in ("small_cnn_w4", "small_cnn_w8", "small_cnn_w24"):
        model = models.create(name, num_classes=10)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(models.shapes(model, (28, 28, 1))["params"]))
    assert 4_000 <= sizes["small_cnn_w8"] <= 6_000
    assert 115_000 <= sizes["small_cnn_w24"] <= 125_000


def test_unknown_name_offers_the_nearest_spelling():
    with pytest.raises(ValueError, match=r"'resnet_18'.*resnet18.*dgkd_jax\.models\.NAMES"):
        models.create("resnet_18", num_classes=10)


@pytest.mark.parametrize("knob", ["num_classes", "batch_norm_groups"])
def test_counts_below_one_are_refused_by_name(knob):
    with pytest.raises(ValueError, match=f"{knob} must be at least 1, got 0"):
        models.create("resnet8", **{"num_classes": 10, knob: 0})


@pytest.mark.parametrize(
    ("name", "image_shape"),
    [
        ("resnet8", (40, 25, 3)),
        ("resnet18", (65, 97, 3)),
        ("resnet50_cifar", (64, 64, 3)),
        ("small_cnn_w8", (16, 16, 1)),
        ("small_cnn_w24", (33, 32, 3)),
    ],
)
def test_other_image_sizes_work(name, image_shape):
    model = models.create(name, num_classes=5)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    assert jax.eval_shape(model.apply, models.shapes(model, image_shape), images).shape == (2, 5)


# ------------------------------------------------------------------------------------------------------ initial values


def test_initial_values_depend_on_seed_path_and_shape_only():
    model = models.create("resnet8", num_classes=10)
    first, again, other = (_paths(models.initialise(model, (32, 32, 3), seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(first[path], again[path]) for path in first)
    assert not np.array_equal(first["params/conv1/kernel"], other["params/conv1/kernel"])
    # the documented recipe, written out: a change here changes every published run
    path = "params/layer2_0/conv2/kernel"
    rng = np.random.Generator(np.random.Philox(key=[1, zlib.crc32(path.encode())]))
    expected = rng.standard_normal((3, 3, 32, 32), dtype=np.float32) * np.float32(np.sqrt(2 / (9 * 32)))
    np.testing.assert_allclose(first[path], expected, rtol=1e-6)


def test_initial_values_follow_the_familys_rules():
    leaves = _paths(models.initialise(models.create("resnet18", num_classes=10), (64, 64, 3), seed=0))
    assert all(leaf.dtype == np.float32 for leaf in leaves.values())
    for path, leaf in leaves.items():
        if path.startswith("params/fc/"):
            bound = 1 / np.sqrt(512)  # of torch.nn.Linear: 1/sqrt(fan_in), weight and bias alike
            assert np.abs(leaf).max() <= bound
        elif path.endswith("/kernel"):
            expected = np.sqrt(2 / (leaf.shape[0] * leaf.shape[1] * leaf.shape[3]))
            # the standard deviation of n normals is known to 1/sqrt(2n); 5 of these never happen by chance
            assert abs(leaf.std() / expected - 1) < 5 / np.sqrt(2 * leaf.size), path
            assert abs(leaf.mean()) < 5 * expected / np.sqrt(leaf.size), path
        else:
            assert np.all(leaf == (1.0 if path.endswith(("/scale", "/var")) else 0.0)), path
    uniform = leaves["params/fc/kernel"]
    assert abs(uniform.std() * np.sqrt(3) * np.sqrt(512) - 1) < 0.03  # 5120 values


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "small_cnn_w24"])
def test_initialising_fills_every_leaf_and_compiles_nothing(name):
    model = models.create(name, num_classes=10)
    with compilations() as names:
        variables = models.initialise(model, model.image_shape, seed=0)
        assert names == []
        jax.jit(lambda x: x * 3.25)(1.0)
        assert names == ["jit(<lambda>)"]  # compilations are counted
    assert set(variables) == {"params", "batch_stats"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def test_leaf_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule gives the initial value of params/token"):
        models.initial_values.fill(
            {"params": {"token": jax.ShapeDtypeStruct((3,), jnp.float32)}}, models.initial_values.TORCHVISION_CNN, 0
        )


@pytest.mark.slow
def test_flax_init_cannot_be_mistaken_for_initial_values():
    model = models.create("small_cnn_w8", num_classes=10)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(variables))


# ----------------------------------------------------------------------------------------------- training and precision


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", "small_cnn_w8"])
def test_training_moves_statistics_and_reaches_every_parameter(name):
    model = models.create(name, num_classes=10)
    variables = models.initialise(model, model.image_shape, seed=0)
    images = _normal(8, *model.image_shape).astype(np.float32)

    def loss(params):
        logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(logits - jnp.arange(10))), updates["batch_stats"]

    gradients, statistics = compiled(jax.grad(loss, has_aux=True))(variables["params"])
    for path, gradient in _paths(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient != 0), path
    for path, statistic in _paths(statistics).items():
        assert statistic.dtype == np.float32, path
        assert np.any(statistic != _paths(variables["batch_stats"])[path]), path


def test_updating_the_statistics_of_a_frozen_model_is_an_error():
    model = models.create("small_cnn_w8", num_classes=10)
    variables = models.initialise(model, (28, 28, 1), seed=0)
    images = np.zeros((4, 28, 28, 1), np.float32)
    with pytest.raises(nn.module.errors.ModifyScopeVariableError):
        model.apply(variables, images, train=True)


def test_bfloat16_compute_leaves_float32_logits_and_statistics():
    variables = models.initialise(models.create("resnet8", num_classes=10), (32, 32, 3), seed=0)
    images = _normal(4, 32, 32, 3).astype(np.float32)
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        model = models.create("resnet8", num_classes=10, dtype=dtype)
        apply = compiled(partial(model.apply, train=True, features=True, mutable=["batch_stats"]))
        outputs[dtype] = apply(variables, images)
    (logits, features), updates = outputs["bfloat16"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves([logits, features, updates]))
    exact = outputs["float32"][0][0]
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.1  # bfloat16 has 8 bits, so about 1/256 a layer: neither float32 in disguise nor broken


@pytest.mark.slow
def test_head_and_features_are_exact_in_float32_under_bfloat16():
    model = models.create("small_cnn_w24", num_classes=10, dtype=jnp.bfloat16)
    variables = models.initialise(model, (28, 28, 1), seed=0)
    logits, features = model.apply(variables, _normal(4, 28, 28, 1).astype(np.float32), features=True)
    head = variables["params"]["fc"]
    expected = np.asarray(features, np.float64) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-6 * np.abs(expected).max())  # float32: 120 products
    assert models.classifier(variables) is head["kernel"]


def test_variables_without_a_head_have_no_classifier():
    with pytest.raises(ValueError, match="expected one linear layer outside the blocks, the head, found 0"):
        models.classifier({"params": {"bn": {"scale": np.ones(3)}}})


@pytest.mark.slow
def test_groups_of_a_model_equal_separate_batches():
    with jax.enable_x64(True):
        whole = models.create("resnet8", num_classes=10, dtype=jnp.float64, batch_norm_groups=2)
        parts = models.create("resnet8", num_classes=10, dtype=jnp.float64)
        variables = jax.tree.map(np.float64, models.initialise(parts, (32, 32, 3), seed=0))
        images = _normal(8, 32, 32, 3)
        train = {
            model: jax.jit(lambda v, x, model=model: model.apply(v, x, train=True, mutable=["batch_stats"]))
            for model in (whole, parts)
        }
        logits, updates = train[whole](variables, images)
        halves = [train[parts](variables, half) for half in np.split(images, 2)]
        np.testing.assert_allclose(logits, np.concatenate([half[0] for half in halves]), rtol=1e-11, atol=1e-11)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, halves[0][1], halves[1][1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), updates, mean)


# ---------------------------------------------------------------------------------------- layers, against numpy oracles


def _batch_norm_oracle(x, scale, bias, epsilon=1e-5):
    flat = x.reshape(-1, x.shape[-1])
    mean, var = flat.mean(0), flat.var(0)
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias, mean, flat.var(0, ddof=1)


def _batch_norm_variables(channels):
    rng = np.random.default_rng(9)
    scale, bias, mean, var = rng.uniform(0.5, 2.0, (4, channels))
    return {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}


@pytest.mark.parametrize("groups", [1, 3])
def test_batch_norm_in_training_equals_numpy_group_by_group(groups):
    x = 3 * _normal(6, 5, 4, 2) + 7
    variables = _batch_norm_variables(2)
    old = variables["batch_stats"]
    with jax.enable_x64(True):
        norm = layers.BatchNorm(groups=groups, dtype=jnp.float64)
        y, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    parts = [_batch_norm_oracle(part, **variables["params"]) for part in np.split(x, groups)]
    new = {
        "mean": 0.9 * old["mean"] + 0.1 * np.mean([mean for _, mean, _ in parts], 0),
        "var": 0.9 * old["var"] + 0.1 * np.mean([unbiased for _, _, unbiased in parts], 0),
    }
    np.testing.assert_allclose(y, np.concatenate([part for part, _, _ in parts]), rtol=0, atol=1e-13)
    for key, expected in new.items():
        np.testing.assert_allclose(updates["batch_stats"][key], expected, rtol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_gradients_equal_finite_differences_of_the_oracle(groups):
    x, weights = _normal(4, 3, 3, 2), _normal(4, 3, 3, 2, seed=1)
    variables = _batch_norm_variables(2)
    at = (x, variables["params"]["scale"], variables["params"]["bias"])
    direction = tuple(_normal(*value.shape, seed=2 + index) for index, value in enumerate(at))

    def oracle(x, scale, bias):
        parts = [_batch_norm_oracle(part, scale, bias)[0] for part in np.split(x, groups)]
        return np.sum(weights * np.concatenate(parts))

    def ours(x, scale, bias):
        changed = variables | {"params": {"scale": scale, "bias": bias}}
        norm = layers.BatchNorm(groups=groups, dtype=jnp.float64)
        return jnp.sum(weights * norm.apply(changed, x, train=True, mutable=["batch_stats"])[0])

    with jax.enable_x64(True):
        gradients = jax.grad(ours, (0, 1, 2))(*map(jnp.asarray, at))
    gradients = [np.asarray(gradient) for gradient in gradients]
    h = 1e-5  # central differences: error h² ≈ 1e-10 times the third derivative
    ahead, behind = (oracle(*(a + s * h * d for a, d in zip(at, direction, strict=True))) for s in (1, -1))
    along = sum(np.sum(g * d) for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(along, (ahead - behind) / (2 * h), rtol=1e-7)


def test_batch_norm_in_evaluation_uses_the_running_statistics_and_writes_nothing():
    x = _normal(1, 1, 1, 3)  # a batch of one: no statistics of its own
    variables = _batch_norm_variables(3)
    statistics = variables["batch_stats"]
    with jax.enable_x64(True):
        norm = layers.BatchNorm(groups=5, dtype=jnp.float64)
        y = norm.apply(variables, x, train=False)
        _, updates = norm.apply(variables, x, train=False, mutable=["batch_stats"])
    normalised = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    expected = normalised * variables["params"]["scale"] + variables["params"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-13)
    assert all(np.array_equal(updates["batch_stats"][key], statistics[key]) for key in statistics)


def test_batch_norm_keeps_its_digits_where_the_mean_is_large():
    x = (1e3 + _normal(32, 4, 4, 2)).astype(np.float32)
    variables = jax.tree.map(np.float32, _batch_norm_variables(2))
    y, _ = layers.BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
    expected, _, _ = _batch_norm_oracle(x.astype(np.float64), **variables["params"])
    # The mean is a sum of 512 numbers up to 5e5, where half a unit in the last place is 0.016. How the roundings add up
    # depends on the order in which a processor's vectors take it: √512·0.016/512 = 7e-4 is usual, three times that
    # the bound (8e-4 seen). mean(x²) − mean(x)² would be off by 0.1 at 1e6.
    np.testing.assert_allclose(y, expected, atol=2.1e-3)


def test_batch_norm_of_bfloat16_takes_its_statistics_in_float32():
    x = jnp.asarray(10 + _normal(64, 8, 8, 2), jnp.bfloat16)
    variables = jax.tree.map(np.float32, _batch_norm_variables(2))
    y, updates = layers.BatchNorm(dtype=jnp.bfloat16).apply(variables, x, train=True, mutable=["batch_stats"])
    expected, mean, unbiased = _batch_norm_oracle(np.asarray(x, np.float64), **variables["params"])
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=2**-8 * np.abs(expected).max())
    for key, statistic in {"mean": mean, "var": unbiased}.items():
        moved = 0.9 * variables["batch_stats"][key] + 0.1 * statistic
        np.testing.assert_allclose(updates["batch_stats"][key], moved, rtol=1e-5)  # float32, not bfloat16's 4e-3


@pytest.mark.parametrize(
    ("groups", "shape", "message"),
    [(4, (6, 2, 2, 3), "groups=4.*batch of 6"), (6, (6, 1, 1, 3), "at least 2 values per channel and group, got 1")],
)
def test_batch_norm_refuses_groups_that_cannot_be_normalised(groups, shape, message):
    with pytest.raises(ValueError, match=message):
        layers.BatchNorm(groups=groups).apply(
            _batch_norm_variables(3), np.ones(shape), train=True, mutable=["batch_stats"]
        )


def _windows(x, side, stride, padding, fill):
    """[batch, out height, out width, side, side, channels] of x framed by `padding` pixels of `fill`."""
    framed = np.full((x.shape[0], x.shape[1] + 2 * padding, x.shape[2] + 2 * padding, x.shape[3]), fill)
    framed[:, padding : padding + x.shape[1], padding : padding + x.shape[2]] = x
    rows, columns = ((framed.shape[axis] - side) // stride + 1 for axis in (1, 2))
    cut = [
        [framed[:, r * stride : r * stride + side, c * stride : c * stride + side] for c in range(columns)]
        for r in range(rows)
    ]
    return np.stack([np.stack(row, 1) for row in cut], 1)


@pytest.mark.parametrize("size", [(5, 6), (7, 8), (9, 9)])
@pytest.mark.parametrize(
    ("side", "stride", "padding", "groups"), [(3, 2, 1, 1), (7, 2, 3, 1), (3, 1, 1, 2), (1, 2, 0, 1), (2, 2, 0, 4)]
)
def test_convolution_pads_both_sides_alike(size, side, stride, padding, groups):
    x, kernel, bias = _normal(2, *size, 4), _normal(side, side, 4 // groups, 8, seed=1), _normal(8, seed=2)
    windows = _windows(x, side, stride, padding, 0.0)
    # output channels and input channels are cut alike: group g maps inputs g·4/G … to outputs g·8/G …
    expected = np.concatenate(
        [
            np.einsum("nrcijk,ijko->nrco", window, part)
            for window, part in zip(np.split(windows, groups, -1), np.split(kernel, groups, -1), strict=True)
        ],
        -1,
    )
    with jax.enable_x64(True):
        conv = layers.Conv(8, side, stride, padding, groups=groups, use_bias=True, dtype=jnp.float64)
        y = conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(y, expected + bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(5, 6), (7, 8)])
def test_max_pool_frames_with_minus_infinity(size):
    x = -1 - np.abs(_normal(2, *size, 3))  # all negative: a frame of zeros would win
    with jax.enable_x64(True):
        y = layers.max_pool(jnp.asarray(x), window=3, stride=2, padding=1)
    np.testing.assert_array_equal(y, _windows(x, 3, 2, 1, -np.inf).max((3, 4)))


def test_normalize_is_pixel_over_255_minus_mean_over_std():
    images = np.array([[[[0, 255, 51]]]], np.uint8)
    found = normalize(jnp.asarray(images), mean=(0.5, 0.4, 0.2), std=(0.25, 0.3, 0.1))
    np.testing.assert_allclose(found, [[[[-2.0, 2.0, 0.0]]]], atol=1e-6)
    already = jnp.full((1, 1, 1, 3), 7.5)
    assert normalize(already, mean=(0.5, 0.4, 0.2), std=(0.25, 0.3, 0.1)) is already
