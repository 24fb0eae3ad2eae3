"""BatchNorm in C++ (the extra `onednn`) against float64, and that XLA's is used wherever it cannot be."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from bits import digests
from jax.sharding import PartitionSpec as P

from dgkd_jax.models import layers
from dgkd_jax.models.onednn import batch_norm, library
from dgkd_jax.runs import sharding

needs_library = pytest.mark.skipif(
    library.find() is None, reason=library.status() or "not installed: pip install -e '.[onednn]'"
)
EPSILON = 1e-5
# 64 terms at a time are summed in float32: 64 rounding errors of 2⁻²⁴ add up like a random walk; at most twice that.
SUMMED = 2 * 64**0.5 * 2**-24
normalise = partial(batch_norm.normalise, epsilon=EPSILON)


def by_xla(*arguments):
    return tuple(batch_norm._normalise_by_xla(*arguments, epsilon=EPSILON))


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def arguments(*shape):
    """x, scale and bias."""
    return 2 * numbers(*shape) - 3, numbers(shape[-1], seed=1), numbers(shape[-1], seed=2)


def exactly(x, scale, bias, pulled):
    """Output, mean, variance and the three gradients, from the definition by numpy in float64."""
    x, scale, bias, pulled = (np.asarray(array, np.float64) for array in (x, scale, bias, pulled))
    rows, pulled_rows = x.reshape(-1, x.shape[-1]), pulled.reshape(-1, x.shape[-1])
    mean, var = rows.mean(0), rows.var(0)
    rate = 1 / np.sqrt(var + EPSILON)
    normal = (rows - mean) * rate
    of_bias, of_scale = pulled_rows.sum(0), (pulled_rows * normal).sum(0)
    of_x = scale * rate * (pulled_rows - of_bias / len(rows) - normal * of_scale / len(rows))
    return (normal * scale + bias).reshape(x.shape), mean, var, of_x.reshape(x.shape), of_scale, of_bias


def compute(x, scale, bias, pulled):
    """Output, mean, variance and the three gradients, for a gradient of the output."""
    (y, mean, var), pull_back = jax.vjp(normalise, x, scale, bias)
    return y, mean, var, *pull_back((pulled, jnp.zeros_like(mean), jnp.zeros_like(var)))


def error(one, other):
    """The largest, relative to the largest number."""
    return np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max() / np.abs(other).max()


@needs_library
@pytest.mark.parametrize(
    "shape",
    [(4, 5, 6, 3), (64, 32, 32, 16), (7, 300), (33, 9, 9, 513), (3, 2, 1, 1), (1031, 24), (37, 256)],
    ids=str,
)  # one piece and several, rows read together and one by one, with a remainder and without
def test_output_statistics_and_gradients(shape):
    given = *arguments(*shape), numbers(*shape, seed=3)
    for one, other in zip(jax.jit(compute)(*given), exactly(*given), strict=True):
        assert one.shape == other.shape
        assert error(one, other) < SUMMED


@needs_library
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance():
    x, scale, bias = arguments(64, 8, 8, 20)
    x = jnp.round(x * 2**12) / 2**12 + 1024  # both summands and the sum are float32 numbers, so x is exact
    _, mean, var = normalise(x, scale, bias)
    _, exact_mean, exact_var, *_ = exactly(x, scale, bias, x)
    assert error(mean, exact_mean) < 2**-23
    assert error(var, exact_var) < 1e-5  # the mean's rounding, half of 2⁻¹⁴, squared and more; E[x²] − mean² has 0.06


@needs_library
def test_bfloat16_is_computed_in_float32_and_rounded_once():
    x, scale, bias = arguments(64, 16, 16, 16)
    x, pulled = x.astype(jnp.bfloat16), numbers(64, 16, 16, 16, seed=3).astype(jnp.bfloat16)
    for one, other in zip(jax.jit(compute)(x, scale, bias, pulled), exactly(x, scale, bias, pulled), strict=True):
        if one.dtype == jnp.float32:
            assert error(one, other) < SUMMED
        else:
            rounded = jnp.asarray(other, jnp.float32).astype(jnp.bfloat16)
            assert one.dtype == jnp.bfloat16
            assert np.mean(np.asarray(one != rounded)) < 1e-3  # ties of what float32 had rounded before
            np.testing.assert_allclose(one.astype(jnp.float32), rounded.astype(jnp.float32), rtol=2**-7, atol=1e-6)


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_channel_and_no_other(dtype, bad):
    x, scale, bias = arguments(8, 6, 6, 5)
    y, mean, var = normalise(x.at[3, 2, 1, 4].set(bad).astype(dtype), scale, bias)
    good, good_mean, good_var = normalise(x.astype(dtype), scale, bias)
    assert not np.isfinite([mean[4], var[4]]).any()
    assert np.isnan(np.asarray(y[..., 4], np.float32)).all()
    assert (y[..., :4] == good[..., :4]).all()
    assert (mean[:4] == good_mean[:4]).all()
    assert (var[:4] == good_var[:4]).all()


@pytest.mark.slow
@needs_library
def test_every_derivative_is_xlas():
    x, scale, bias = arguments(4, 3, 2, 5)
    directions = numbers(4, 3, 2, 5, seed=4), numbers(5, seed=5), numbers(5, seed=6)

    def derivatives(form):
        def loss(x, scale, bias):
            y, mean, var = form(x, scale, bias)
            return jnp.sum(jnp.tanh(y) * directions[0]) + jnp.sum(jnp.sin(mean)) + jnp.sum(jnp.sin(var))

        gradient = jax.grad(loss, (0, 1, 2))

        def along(*point):
            return sum(jnp.vdot(*pair) for pair in zip(gradient(*point), directions, strict=True))

        point = x, scale, bias
        return (
            jax.jvp(form, point, directions)[1],
            gradient(*point),
            jax.jacfwd(form, 0)(*point),
            jax.jvp(gradient, point, directions)[1],  # forward over reverse
            jax.grad(along, (0, 1, 2))(*point),  # reverse over reverse
            jax.jvp(jax.grad(along), point, directions)[1],  # third
            jax.grad(lambda t: jnp.sum(jax.jvp(form, point, (t, *directions[1:]))[1][0] ** 2))(directions[0]),
            jax.vmap(form, (None, 0, None))(x, jnp.stack([scale, bias]), bias),
            jax.vmap(jax.grad(loss), (0, None, None))(jnp.stack([x, x[::-1]]), scale, bias),
            jax.grad(jax.checkpoint(loss))(*point),
        )

    ours, theirs = jax.jit(partial(derivatives, normalise))(), derivatives(by_xla)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert error(one, other) < 5e-6  # a derivative's derivative sums 24 terms, which cancel in part
    program = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.sin(normalise(x, scale, bias)[0]))))(x))
    assert "batch_norm_normalise" in program
    assert "batch_norm_pull_back" in program


BITS = """
import hashlib, jax, jax.numpy as jnp, numpy as np
from functools import partial
from dgkd_jax.models.onednn.batch_norm import normalise
random, digest = np.random.default_rng(0), hashlib.sha256()
for shape in ((48, 24, 24, 16), (64, 8, 8, 200)):
    x, pulled = (random.standard_normal(shape, np.float32) for _ in range(2))
    scale, bias = (random.standard_normal(shape[-1:], np.float32) for _ in range(2))
    def compute(x, scale, bias):
        (y, mean, var), pull_back = jax.vjp(partial(normalise, epsilon=1e-5), x, scale, bias)
        return y, mean, var, *pull_back((pulled, jnp.zeros_like(mean), jnp.zeros_like(var)))
    program = jax.jit(compute)
    found = [b"".join(array.tobytes() for array in map(np.asarray, program(x, scale, bias))) for _ in range(5)]
    assert len(set(found)) == 1
    digest.update(found[0])
print(digest.hexdigest())
"""


@pytest.mark.slow
@needs_library
def test_the_bits_depend_neither_on_the_number_of_threads_nor_on_the_run():
    assert len(digests(BITS)) == 1


# ------------------------------------------------------------------------------------------------------ XLA's instead


def layer(x, *, dtype=jnp.float32, groups=1):
    """The program of a BatchNorm layer in training, as text."""
    channels = x.shape[-1]
    variables = {
        "params": {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)},
        "batch_stats": {"mean": jnp.zeros(channels), "var": jnp.ones(channels)},
    }
    module = layers.BatchNorm(groups=groups, dtype=dtype)
    return lambda x: module.apply(variables, x, train=True, mutable=["batch_stats"])


@needs_library
def test_a_layer_uses_it_and_takes_xlas_for_the_rest():
    x = numbers(4, 3, 3, 6)
    assert "batch_norm_normalise" in str(jax.make_jaxpr(layer(x))(x))
    assert "batch_norm" not in str(jax.make_jaxpr(layer(x, groups=2))(x))
    assert "batch_norm" not in str(jax.make_jaxpr(layer(x, dtype=jnp.bfloat16))(x))  # float32 in, bfloat16 out
    assert "batch_norm" not in str(jax.make_jaxpr(layer(x, dtype=jnp.float16))(x.astype(jnp.float16)))
    with jax.enable_x64(True):
        assert "batch_norm" not in str(jax.make_jaxpr(layer(x, dtype=jnp.float64))(x.astype(jnp.float64)))


@needs_library
def test_a_layer_gives_what_xlas_gives(monkeypatch):
    x = numbers(8, 5, 5, 6)
    ours = layer(x)(x)
    monkeypatch.setattr(library, "find", lambda: None)
    theirs = layer(x)(x)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert error(one, other) < 1e-6


@needs_library
def test_a_batch_on_several_devices_is_normalised_whole_by_xla():
    given = *arguments(16, 3, 3, 6), numbers(16, 3, 3, 6, seed=3)
    mesh = sharding.make_mesh()
    over, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    placed = tuple(jax.device_put(array, over if array.ndim > 1 else whole) for array in given)

    program = jax.jit(compute).lower(*placed).compile()
    assert ("dgkd_normalise" in program.as_text()) == (mesh.size == 1)
    for one, other in zip(program(*placed), exactly(*given), strict=True):
        assert error(one, other) < 1e-6


@needs_library
def test_an_exported_program_and_one_for_other_platforms_have_xlas():
    given = arguments(4, 3, 3, 6)
    exported = jax.export.export(jax.jit(normalise))(*given)
    assert "dgkd_normalise" not in exported.mlir_module()
    for one, other in zip(exported.call(*given), normalise(*given), strict=True):
        assert error(one, other) < 1e-6
    x = numbers(4, 3, 3, 6)
    (batch,) = jax.export.symbolic_shape("batch")
    jax.export.export(jax.jit(layer(x)))(jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype))
    assert "dgkd_normalise" not in jax.jit(normalise).trace(*given).lower(lowering_platforms=("tpu",)).as_text()


@needs_library
def test_within_a_shard_map_it_is_xlas():
    x, mesh = numbers(16, 3, 3, 6), sharding.make_mesh()
    batch = P(mesh.axis_names)
    mapped = jax.shard_map(lambda x: layer(x)(x)[0], mesh=mesh, in_specs=batch, out_specs=batch)
    assert "batch_norm" not in str(jax.make_jaxpr(mapped)(x))


@needs_library
@pytest.mark.parametrize(
    "wrong",
    [
        {"x": np.zeros((2, 3), np.float16)},
        {"x": np.zeros((2, 3), np.int32)},
        {"x": np.zeros(3, np.float32)},
        {"x": np.zeros((0, 3), np.float32)},
        {"x": np.zeros((2, 4), np.float32)},
        {"x": np.zeros((3, 3), np.float32)},
        {"scale": np.zeros(2, np.float32)},
        {"scale": np.zeros(3, np.float16)},
        {"bias": np.zeros((1, 3), np.float32)},
        {"y": jax.ShapeDtypeStruct((2, 3), "bfloat16")},
        {"mean": jax.ShapeDtypeStruct((4,), "float32")},
        {"var": jax.ShapeDtypeStruct((), "float32")},
    ],
    ids=str,
)
def test_the_library_refuses_what_does_not_fit(wrong):
    row, channel = jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((3,), "float32")
    right = {"x": np.zeros((2, 3), np.float32), "scale": np.zeros(3, np.float32), "bias": np.zeros(3, np.float32)}
    given = right | {"y": row, "mean": channel, "var": channel} | wrong
    results = [given[name] for name in ("y", "mean", "var")]
    call = jax.ffi.ffi_call(f"dgkd_normalise_{library.find().key}", results)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: dgkd_jax's BatchNorm: "):
        jax.block_until_ready(call(*(given[name] for name in right), epsilon=np.float32(EPSILON)))
