"""Transformers, ConvNeXt and EfficientNet-Lite: other image sizes, first values, training, and their bricks."""

from functools import partial

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgkd_jax import models, torch_port
from dgkd_jax.errors import BadInput
from dgkd_jax.models import convnext, efficientnet_lite, layers, platform, swin
from dgkd_jax.models.attention import SelfAttention

# The networks in small; the name chooses the table of torch_port.
TINY_VIT = partial(golden_networks.FIXTURE_VIT, depth=1)
TINY_SWIN = partial(swin.Swin, num_classes=5, stage_sizes=(2, 0), heads=(1, 2), width=8)
TINY_CONVNEXT = partial(convnext.ConvNeXt, num_classes=5, stage_sizes=(1, 2), widths=(8, 16))
TINY_LITE = partial(
    efficientnet_lite.EfficientNetLite, num_classes=5, stages=((3, 1, 1, 8, 1), (5, 2, 2, 16, 2)), head_width=32
)
TINY = {
    "vit": (TINY_VIT, (32, 48, 3)),
    "swin": (TINY_SWIN, (36, 60, 3)),
    "convnext": (TINY_CONVNEXT, (19, 24, 3)),
    "efficientnet_lite": (TINY_LITE, (19, 24, 3)),
}


# Each program runs once, so that optimising it costs far more than it saves.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _paths(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# --------------------------------------------------------------------------------------------------- other image sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_shape"),
    [
        ("vit_small_patch16_224", (32, 32, 3)),
        ("deit_small_patch16_224", (384, 224, 3)),
        ("convnext_tiny", (65, 97, 3)),
        ("swin_s", (32, 70, 3)),
        ("efficientnet_lite0", (33, 48, 3)),
    ],
)
def test_variables_serve_every_image_size(name, image_shape):
    model = models.create(name, num_classes=5)
    usual, other = (models.shapes(model, shape) for shape in (model.image_shape, image_shape))
    assert usual == other
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    assert jax.eval_shape(model.apply, usual, images).shape == (2, 5)


@pytest.mark.parametrize("size", [(224, 230), (36, 32), (0, 16)])
def test_vit_refuses_images_that_do_not_divide_into_patches(size):
    model = models.create("vit_tiny_patch16_224", num_classes=5)
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels .* multiples of 16"):
        models.shapes(model, (*size, 3))


# ------------------------------------------------------------------------------------------- parameters and their start


@pytest.mark.parametrize(
    ("name", "num_params"),
    [  # with 1000 classes, as timm and torchvision document them
        ("vit_tiny_patch16_224", 5_717_416),
        ("vit_small_patch16_224", 22_050_664),
        ("deit_small_patch16_224", 22_050_664),
        ("convnext_tiny", 28_589_128),
        ("swin_s", 49_606_258),
        ("efficientnet_lite0", 4_652_008),
    ],
)
def test_number_of_parameters_is_the_documented_one(name, num_params):
    model = models.create(name, num_classes=1000)
    params = models.shapes(model, model.image_shape)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params


def _assert_like(values, *, std=0.0, mean=0.0, bound=np.inf):
    # of n independent values, mean and standard deviation are known to about std/sqrt(n): 5 of these never happen
    assert abs(values.mean() - mean) <= 5 * std / np.sqrt(values.size)
    assert abs(values.std() - std) <= 5 * std / np.sqrt(values.size)
    assert np.abs(values).max() <= bound


def test_initial_values_are_those_of_timm_and_torchvision():
    """Standard deviations as measured on fresh networks of timm 1.0.31 and torchvision 0.28.0."""
    start = {name: _paths(models.initialise(make(), shape, seed=0)) for name, (make, shape) in TINY.items()}
    linear = {"std": 0.02}
    for family, path, expected in [
        ("vit", "params/patch_embed_proj/kernel", {"std": 1 / np.sqrt(3 * 768), "bound": 1 / np.sqrt(768)}),
        ("vit", "params/patch_embed_proj/bias", {"std": 1 / np.sqrt(3 * 768), "bound": 1 / np.sqrt(768)}),
        ("vit", "params/cls_token", {"std": 1e-6}),
        ("vit", "params/pos_embed", linear),
        ("vit", "params/blocks_0/attn/qkv/kernel", linear),
        ("vit", "params/blocks_0/attn/qkv/bias", {}),
        ("vit", "params/head/kernel", linear),
        ("vit", "params/norm/scale", {"mean": 1.0}),
        ("convnext", "params/features_0_0/kernel", linear),
        ("convnext", "params/features_3_1/dwconv/kernel", linear),
        ("convnext", "params/features_3_1/layer_scale", {"mean": np.float32(1e-6)}),
        ("convnext", "params/features_3_1/norm/scale", {"mean": 1.0}),
        ("convnext", "params/classifier_2/kernel", linear),
        ("swin", "params/features_0_0/kernel", {"std": 1 / np.sqrt(3 * 48), "bound": 1 / np.sqrt(48)}),
        ("swin", "params/features_1_0/relative_position_bias_table", linear),
        ("swin", "params/features_2/reduction/kernel", linear),
        ("swin", "params/features_1_0/mlp/fc1/bias", {}),
        # the TensorFlow code: a depthwise kernel's fan_out is its own area; the head's bound is 1/sqrt(classes)
        ("efficientnet_lite", "params/blocks_1/depthwise_conv/kernel", {"std": np.sqrt(2 / 25)}),
        ("efficientnet_lite", "params/blocks_1/expand_conv/kernel", {"std": np.sqrt(2 / 16)}),
        ("efficientnet_lite", "params/fc/kernel", {"std": 1 / np.sqrt(3 * 5), "bound": 1 / np.sqrt(5)}),
    ]:
        assert start[family][path].dtype == np.float32
        _assert_like(start[family][path].astype(np.float64), **expected)


# ----------------------------------------------------------------------------------------------- training and precision


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_gradients_reach_every_parameter(family):
    make, image_shape = TINY[family]
    model = make()
    variables = models.initialise(model, image_shape, seed=0)
    images = _normal(4, *image_shape).astype(np.float32)

    def loss(params):
        logits, updates = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(logits - jnp.arange(5))), updates

    gradients, updates = compiled(jax.grad(loss, has_aux=True))(variables["params"])
    for path, gradient in _paths(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient != 0), path
    assert ("batch_stats" in updates) == ("batch_stats" in variables) == (family == "efficientnet_lite")


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_training_and_evaluation_agree_without_batch_norm(family):
    make, image_shape = TINY[family]
    variables = models.initialise(make(), image_shape, seed=0)
    assert set(variables) == {"params"}
    images = np.zeros((2, *image_shape), np.float32)
    evaluation, training = (jax.make_jaxpr(partial(make().apply, train=train))(variables, images) for train in (0, 1))
    assert str(evaluation) == str(training)  # the same program


@pytest.mark.parametrize("family", TINY)
def test_bfloat16_compute_leaves_float32_logits_and_features(family):
    make, image_shape = TINY[family]
    variables = models.initialise(make(), image_shape, seed=0)
    images = _normal(2, *image_shape).astype(np.float32)
    outputs = {
        dtype: compiled(partial(make(dtype=jnp.dtype(dtype)).apply, features=True))(variables, images)
        for dtype in ("float32", "bfloat16")
    }
    logits, features = outputs["bfloat16"]
    assert logits.dtype == features.dtype == jnp.float32
    error = np.abs(features - outputs["float32"][1]).max() / np.abs(outputs["float32"][1]).max()
    assert 1e-5 < error < 0.1  # bfloat16 has 8 bits: neither float32 in disguise nor broken
    head = next(leaves for name, leaves in variables["params"].items() if name in ("head", "classifier_2", "fc"))
    expected = np.asarray(features, np.float64) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6 * np.abs(expected).max())  # the head in float32


def test_efficientnet_lite_keeps_99_hundredths_of_its_running_statistics():
    model = TINY_LITE(stages=())
    variables = models.initialise(model, (16, 16, 3), seed=0)
    images = 1 + _normal(4, 16, 16, 3).astype(np.float32)
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    kernel = variables["params"]["conv_stem"]["kernel"]
    framed = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))  # an even map at stride 2: below and on the right only
    taps = [framed[:, r : r + 16 : 2, c : c + 16 : 2] @ kernel[r, c] for r in range(3) for c in range(3)]
    np.testing.assert_allclose(updates["batch_stats"]["bn0"]["mean"], 0.01 * sum(taps).mean((0, 1, 2)), rtol=1e-4)


# ----------------------------------------------------------------------------------------------- the bricks, by numpy


def _layer_norm(x, scale, bias, epsilon):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_layer_norm_equals_numpy(epsilon):
    x, scale, bias = 3 * _normal(4, 5, 6) + 7, _normal(6, seed=1), _normal(6, seed=2)
    with jax.enable_x64(True):
        y = layers.LayerNorm(epsilon, dtype=jnp.float64).apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(y, _layer_norm(x, scale, bias, epsilon), rtol=0, atol=1e-13)


def test_layer_norm_of_bfloat16_takes_its_statistics_in_float32():
    x = jnp.asarray(30 + _normal(8, 256), jnp.bfloat16)
    params = {"scale": np.ones(256, np.float32), "bias": np.zeros(256, np.float32)}
    y = layers.LayerNorm(1e-6, dtype=jnp.float32).apply({"params": params}, x)
    expected = _layer_norm(np.asarray(x, np.float64), 1.0, 0.0, 1e-6)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)  # a mean of bfloat16s near 30 is off by 0.1
    assert layers.LayerNorm(1e-6, dtype=jnp.bfloat16).apply({"params": params}, x).dtype == jnp.bfloat16


def _attention(x, qkv, proj, heads, bias):
    """One query, one head at a time."""
    tokens, channels = x.shape
    size = channels // heads
    q, k, v = np.split(x @ qkv["kernel"] + qkv["bias"], 3, -1)
    mixed = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for token in range(tokens):
            scores = k[:, part] @ q[token, part] / np.sqrt(size) + bias[head, token]
            weights = np.exp(scores - scores.max())
            mixed[token, part] = weights @ v[:, part] / weights.sum()
    return mixed @ proj["kernel"] + proj["bias"]


def _dense(rows, columns, seed):
    return {"kernel": _normal(rows, columns, seed=seed), "bias": _normal(columns, seed=seed + 1)}


@pytest.mark.parametrize("arranged_for", ["cpu", "tpu"])
def test_attention_equals_numpy_head_by_head(arranged_for):
    x, bias = _normal(2, 5, 6), _normal(2, 3, 5, 5, seed=1)
    params = {"qkv": _dense(6, 18, 2), "proj": _dense(6, 6, 4)}
    with jax.enable_x64(True), platform.on(arranged_for):
        attention = SelfAttention(3, dtype=jnp.float64)
        y, plain = (attention.apply({"params": params}, x, scores) for scores in (jnp.asarray(bias), None))
    for i in range(2):
        np.testing.assert_allclose(y[i], _attention(x[i], **params, heads=3, bias=bias[i]), rtol=0, atol=1e-12)
        np.testing.assert_allclose(plain[i], _attention(x[i], **params, heads=3, bias=0 * bias[i]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("arranged_for", ["cpu", "tpu"])
def test_attention_takes_its_softmax_in_float32_under_bfloat16(arranged_for):
    """Scores near 300 that differ by 1/2: bfloat16 has them in steps of 2 and would see a tie."""
    identity = np.eye(2, dtype=np.float32)
    qkv = np.concatenate([identity, identity, identity], 1)
    params = {
        "qkv": {"kernel": qkv, "bias": np.zeros(6, np.float32)},
        "proj": {"kernel": identity, "bias": np.zeros(2, np.float32)},
    }
    x = np.asarray([[[1.0, 0.0], [0.0, 1.0]]], np.float32)
    bias = np.asarray(
        [[[300.0, 300.5 + np.sqrt(0.5)], [0.0, 0.0]]], np.float32
    )  # the first token's scores: +sqrt(1/2), 0
    with platform.on(arranged_for):
        y = SelfAttention(1, dtype=jnp.bfloat16).apply({"params": params}, x, bias)
    np.testing.assert_allclose(y[0, 0].astype(np.float32), 1 / (1 + np.exp([0.5, -0.5])), atol=2**-8)


@pytest.mark.parametrize(("side", "stride"), [(3, 2), (1, 1), (5, 2)])
def test_convolution_takes_a_padding_of_its_own_for_each_side(side, stride):
    x, kernel = _normal(2, 8, 9, 4), _normal(side, side, 4, 6, seed=1)
    pairs = ((0, 1), (2, 3))
    with jax.enable_x64(True):
        framed = jnp.pad(x, ((0, 0), *pairs, (0, 0)))
        y, expected = (
            layers.Conv(6, side, stride, padding, dtype=jnp.float64).apply({"params": {"kernel": kernel}}, images)
            for images, padding in ((x, pairs), (framed, 0))
        )
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------- Swin's buffers in PyTorch


def _tiny_swin_state_dict():
    return golden_networks.state_dict("torchvision_swin_50x94")


def test_relative_position_index_numbers_the_offsets_of_two_tokens():
    index = swin.relative_position_index()
    assert (index.dtype, index.shape) == (np.int64, (2401,))
    assert index[:10].tolist() == [84, 83, 82, 81, 80, 79, 78, 71, 70, 69]  # of torchvision 0.28.0's swin_s
    offsets = {}
    for query in range(49):
        for key in range(49):
            offset = (query // 7 - key // 7, query % 7 - key % 7)
            offsets.setdefault(offset, set()).add(int(index[49 * query + key]))
    assert len(offsets) == 169
    assert sorted(row for rows in offsets.values() for row in rows) == list(range(169))


def test_swin_entries_survive_both_ways_with_pytorchs_buffers():
    state_dict, model = _tiny_swin_state_dict(), golden_networks.FIXTURE_SWIN()
    variables = torch_port.from_torch(state_dict, model, "swin_s")
    back = torch_port.to_torch(variables, model, "swin_s")
    buffers = {f"features.{s}.{i}.attn.relative_position_index" for s in (1, 3, 5) for i in (0, 1)}
    assert back.keys() == state_dict.keys() | buffers
    for entry, array in state_dict.items():
        np.testing.assert_array_equal(back[entry], array, err_msg=entry)
    for entry in buffers:
        np.testing.assert_array_equal(back[entry], swin.relative_position_index(), err_msg=entry)
    again = torch_port.from_torch(back, model, "swin_s")
    jax.tree.map(np.testing.assert_array_equal, again, variables)


@pytest.mark.parametrize("wrong", [np.zeros(2401, np.int64), np.arange(16), swin.relative_position_index()[::-1]])
def test_windows_of_another_kind_are_refused(wrong):
    state_dict = _tiny_swin_state_dict() | {"features.3.1.attn.relative_position_index": wrong}
    with pytest.raises(BadInput, match=r"features\.3\.1\.attn\.relative_position_index is not that of swin_s"):
        torch_port.from_torch(state_dict, golden_networks.FIXTURE_SWIN(), "swin_s")


def test_an_index_without_its_table_is_surplus(monkeypatch):
    monkeypatch.setattr(models, "NAMES", ("swin_s",))  # looks for a model that fits among these
    entry = "features.2.attn.relative_position_index"
    with pytest.raises(BadInput, match=rf"surplus: {entry}"):
        torch_port.from_torch(
            _tiny_swin_state_dict() | {entry: np.zeros(2401)}, golden_networks.FIXTURE_SWIN(), "swin_s"
        )
