"""Gradients of kernels are summed in float32 where that is asked for, and nothing else changes."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import small

from dgkd_jax.data.open import open_source
from dgkd_jax.models import kernel_gradient, layers, platform
from dgkd_jax.runs import sharding
from dgkd_jax.training.build import build

LAYERS = {
    "dense": (layers.Conv(8, 3, padding=1, dtype=jnp.bfloat16), (8, 12, 12, 4)),
    "strided": (layers.Conv(8, 3, stride=2, padding=1, dtype=jnp.bfloat16), (8, 12, 12, 4)),
    "pointwise": (layers.Conv(8, 1, dtype=jnp.bfloat16), (8, 12, 12, 4)),
    "depthwise": (layers.Conv(4, 3, padding=1, groups=4, dtype=jnp.bfloat16), (8, 12, 12, 4)),
    "linear": (layers.Linear(8, dtype=jnp.bfloat16), (8, 144, 4)),
}


def derivatives(name, *, wide, of="tpu"):
    """Output, the kernel's gradient and the input's, in the form for an accelerator."""
    layer, shape = LAYERS[name]
    numbers = np.random.default_rng(0)
    x = jnp.asarray(numbers.normal(size=shape), jnp.bfloat16)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(numbers.normal(size=leaf.shape), jnp.float32),
        jax.eval_shape(layer.init, jax.random.key(0), x),
    )
    with platform.on(of), kernel_gradient.summed_in_parameters_dtype() if wide else contextlib.nullcontext():
        y, back = jax.vjp(layer.apply, params, x)
        pulled = jnp.asarray(numbers.normal(size=y.shape), jnp.bfloat16)
        of_params, of_x = back(pulled)
    return y, of_params["params"]["kernel"], of_x, exactly(layer, params, x, pulled)


def exactly(layer, params, x, pulled):
    """The kernel's gradient in float64, from the same rounded factors."""
    with jax.enable_x64(True), platform.on("tpu"):
        x, pulled = (np.asarray(array).astype(np.float64) for array in (x, pulled))
        params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), params)
        _, back = jax.vjp(lambda params: layer.clone(dtype=jnp.float64).apply(params, x), params)
        return np.asarray(back(pulled)[0]["params"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_the_sum_has_float32s_digits_and_output_and_other_gradient_keep_theirs(name):
    y, kernel, of_x, exact = derivatives(name, wide=True)
    narrow_y, narrow_kernel, narrow_of_x, _ = derivatives(name, wide=False)
    largest = np.abs(exact).max()
    assert np.abs(np.asarray(kernel) - exact).max() < 1e-5 * largest
    assert np.abs(np.asarray(narrow_kernel) - exact).max() > 1e-3 * largest
    np.testing.assert_array_equal(y, narrow_y)
    np.testing.assert_array_equal(of_x, narrow_of_x)


def test_a_computation_in_float64_keeps_its_digits():
    """float32 is not asked for as the narrower dtype of the two."""
    with jax.enable_x64(True), kernel_gradient.summed_in_parameters_dtype():
        x, kernel = jnp.ones((3, 2), jnp.float64) / 3, jnp.ones((2, 4), jnp.float32)
        text = jax.jit(jax.grad(lambda kernel: layers.linear(x, kernel, None).sum())).lower(kernel).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("f64>" in line and "f32" not in line for line in products)


def test_devices_add_their_parts_in_float32():
    """What each of eight computes, before the compiler for a CPU, which adds bfloat16 in float32 anyway."""
    mesh = sharding.make_mesh()
    layer, shape = LAYERS["dense"]
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    kernel = jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.float32, sharding=sharding.replicated(mesh))

    def gradient(kernel, x):
        return jax.grad(lambda kernel: layer.apply({"params": {"kernel": kernel}}, x).astype(jnp.float32).sum())(kernel)

    with platform.on("tpu"), kernel_gradient.summed_in_parameters_dtype():
        text = jax.jit(gradient, out_shardings=kernel.sharding).lower(kernel, x).as_text()
    (convolution,) = (line for line in text.splitlines() if "stablehlo.convolution" in line)  # no output is needed
    assert re.search(r"-> tensor<[\dx]+xf32>", convolution), convolution


@pytest.mark.slow
def test_the_config_says_how_a_run_sums(one_device):
    """On a CPU `auto` is as before the key was there."""
    texts = {}
    for asked in ("float32", "compute", "auto"):
        config = small(method="ce", gradient_sums=asked, **{"student.dtype": "bfloat16"})
        source = open_source(config.data)
        program, current = build(config, source, one_device, None)
        batch = next(source.train_batches(seed=0, batch_size=config.batch_size, start_step=0))
        texts[asked] = program.train_step.lower(current, None, sharding.to_global(batch, one_device)).as_text()
    assert texts["float32"] != texts["compute"] == texts["auto"]
