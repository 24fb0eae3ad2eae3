"""The forms of a convolution that a CPU is quick at, against XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgkd_jax.models import cpu_convolution, layers
from dgkd_jax.runs import sharding

# in, out, side, stride, padding, groups: each kind that the networks have, and paddings that differ by side
KINDS = {
    "1x1": (4, 6, 1, 1, 0, 1),
    "1x1 stride 2": (4, 6, 1, 2, 0, 1),
    "1x1 in 3 groups": (6, 9, 1, 1, 0, 3),
    "1x1 in 2 groups stride 2": (4, 6, 1, 2, 0, 2),
    "1x1 padded": (4, 6, 1, 1, 1, 1),
    "depthwise 3x3": (4, 4, 3, 1, 1, 4),
    "depthwise 3x3 stride 2": (4, 4, 3, 2, 1, 4),
    "depthwise 3x3 stride 2, one side": (4, 4, 3, 2, ((0, 1), (0, 1)), 4),
    "depthwise 5x5": (4, 4, 5, 1, 2, 4),
    "depthwise 5x5 stride 2": (4, 4, 5, 2, ((1, 2), (2, 1)), 4),
    "depthwise 7x7": (4, 4, 7, 1, 3, 4),
    "depthwise 3x3, wide frame": (4, 4, 3, 1, 4, 4),
    "two filters a channel": (4, 8, 3, 1, 1, 4),
    "3x3": (4, 6, 3, 2, 1, 1),
}


def _case(kind, size, dtype):
    channels, features, side, stride, padding, groups = KINDS[kind]
    random = np.random.default_rng(0)
    x = random.standard_normal((4, *size, channels)).astype(dtype)
    kernel = random.standard_normal((side, side, channels // groups, features)).astype(dtype)
    module = layers.Conv(features, side, stride, padding, groups, dtype=dtype)
    pairs = ((padding,) * 2,) * 2 if isinstance(padding, int) else padding

    def ours(x, kernel):
        return module.apply({"params": {"kernel": kernel}}, x)

    def library(x, kernel):
        return cpu_convolution.by_library(x, kernel, stride=stride, padding=pairs, groups=groups)

    return x, kernel, ours, library


def _value_and_gradients(function, x, kernel):
    """The output, and the gradients of a loss that weighs each number of it differently."""
    y, pull_back = jax.vjp(function, x, kernel)
    return y, *pull_back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


# float64: sums of at most a few hundred products of order 1. float32: the same, 6e-8 each, in another order.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "size"),
    [("float64", 1e-12, (7, 8)), ("float64", 1e-12, (9, 7)), ("float32", 2e-5, (9, 7))],
)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_both_gradients_equal_those_of_the_library(kind, size, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        x, kernel, ours, library = _case(kind, size, dtype)
        for one, other in zip(
            jax.jit(lambda x, k: _value_and_gradients(ours, x, k))(x, kernel),
            jax.jit(lambda x, k: _value_and_gradients(library, x, k))(x, kernel),
            strict=True,
        ):
            assert one.dtype == other.dtype == dtype
            np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["depthwise 3x3", "depthwise 3x3 stride 2"])
def test_second_derivative_in_reverse_mode_equals_that_of_the_library(kind):
    with jax.enable_x64(True):
        x, kernel, ours, library = _case(kind, (5, 6), "float64")

        def penalty(function):
            of_kernel = jax.grad(lambda x, kernel: jnp.sum(jnp.tanh(function(x, kernel))), 1)
            return jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(of_kernel(x, kernel)))))(x)

        # Numbers of order 100.
        np.testing.assert_allclose(penalty(ours), penalty(library), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_depthwise_of_bfloat16_is_summed_in_float32():
    """49 products of 1 and 1 + 2⁻⁷: bfloat16, with 8 bits, would stop counting the last bits."""
    x, kernel = jnp.ones((1, 7, 7, 1), jnp.bfloat16), jnp.full((7, 7, 1, 1), 1 + 2**-7, jnp.bfloat16)
    y = cpu_convolution.depthwise(x, kernel, 1, ((0, 0), (0, 0)))
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 0, 0, 0]) == float(jnp.bfloat16(49 * (1 + 2**-7)))


@pytest.mark.parametrize(("backend", "library"), [("cpu", False), ("gpu", True), ("tpu", True)])
@pytest.mark.parametrize("kind", ["1x1 stride 2", "1x1 in 3 groups", "depthwise 3x3"])
def test_accelerators_keep_the_librarys_convolution(kind, backend, library, monkeypatch):
    x, kernel, ours, _ = _case(kind, (7, 8), "float32")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    program = str(jax.make_jaxpr(lambda x, k: _value_and_gradients(ours, x, k))(x, kernel))
    assert ("conv_general_dilated" in program) == library


@pytest.mark.parametrize("kind", ["1x1 stride 2", "1x1 in 3 groups", "depthwise 3x3", "depthwise 3x3 stride 2"])
def test_a_sharded_batch_is_summed_once_and_never_gathered(kind):
    x, kernel, ours, _ = _case(kind, (7, 8), "float32")
    mesh = sharding.make_mesh()
    x = jax.device_put(np.concatenate([x, x]), sharding.batch_sharding(mesh))
    gradient = jax.jit(
        jax.grad(lambda kernel, x: jnp.sum(jnp.sin(ours(x, kernel)))), out_shardings=sharding.replicated(mesh)
    )
    program = gradient.lower(jax.device_put(kernel, sharding.replicated(mesh)), x).compile().as_text()
    assert program.count("all-reduce(") + program.count("all-reduce-start(") == 1
    for other in ("all-gather", "all-to-all", "collective-permute"):
        assert other not in program
