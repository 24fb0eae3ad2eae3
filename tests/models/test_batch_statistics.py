"""Both forms of a batch's mean and variance, against float64; the conditional that chooses, by what it computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgkd_jax.models import batch_statistics, layers, platform

AXES = (0, 1, 2)
SHAPE = (16, 8, 8, 4)


def channels(*, mean, deviation, seed=0):
    """Float32 values whose channels have about this mean and deviation; in float64 what they really are."""
    values = np.random.default_rng(seed).normal(mean, deviation, SHAPE).astype(np.float32)
    exact = values.astype(np.float64)
    return values, exact.mean(AXES, keepdims=True), exact.var(AXES, keepdims=True)


@pytest.mark.parametrize(
    ("mean", "shift"),
    [(0.0, 0.0), (3.0, 0.0), (7.0, 0.0), (9.0, 0.0), (1e4, 0.0), (1e4, 1e4 - 5), (-300.0, 300.0)],
)
def test_any_shift_gives_the_statistics_to_1e_5(mean, shift):
    """Up to eight deviations from the shift in one pass, beyond in two; mean(x²) − mean(x)² alone loses all at 1e4."""
    x, exact_mean, exact_var = channels(mean=mean, deviation=1.0)
    found_mean, found_var = jax.jit(lambda x: batch_statistics.in_one_pass(x, AXES, shift=jnp.full(4, shift)))(x)
    np.testing.assert_allclose(found_mean, exact_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found_var, exact_var, rtol=1e-5)
    if abs(mean) == 1e4 and shift == 0:
        naive = jnp.mean(jnp.square(x), AXES) - jnp.square(jnp.mean(x, AXES))
        assert np.abs(naive / exact_var.ravel() - 1).max() > 0.1


def test_one_channel_that_is_far_away_takes_all_to_two_passes():
    """A constant channel has no deviation at all: the difference of the two sums would be rounding alone."""
    x, _, exact = channels(mean=0.0, deviation=1.0)
    x[..., 2] = 1234.567
    _, var = batch_statistics.in_one_pass(x, AXES, shift=jnp.zeros(4))
    np.testing.assert_array_equal(var, batch_statistics.in_two_passes(x, AXES)[1])
    assert var[0, 0, 0, 2] < 1e-4
    np.testing.assert_allclose(np.delete(var, 2, -1), np.delete(exact, 2, -1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.5, 100.0])
def test_both_forms_have_the_same_derivatives_in_either_mode(mean):
    """Gradient, its own gradient and a forward derivative of a function of both results, in float64."""
    with jax.enable_x64(True):
        x = channels(mean=mean, deviation=1.0)[0].astype(np.float64)
        along = np.random.default_rng(1).normal(size=SHAPE)

        def of(statistics):
            def function(x):
                found_mean, var = statistics(x)
                return jnp.sum(jnp.tanh((x - found_mean) * jax.lax.rsqrt(var + 1e-5)) ** 3) + jnp.sum(found_mean * var)

            slope = jax.grad(function)
            return slope(x), jax.grad(lambda x: jnp.sum(slope(x) * along))(x), jax.jvp(function, (x,), (along,))[1]

        ours = of(lambda x: batch_statistics.in_one_pass(x, AXES, shift=jnp.zeros(4)))
        theirs = of(lambda x: batch_statistics.in_two_passes(x, AXES)[:2])
        for found, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 4])
def test_batch_norm_gives_the_same_for_an_accelerator_as_for_a_cpu(groups):
    """Output, running statistics and gradients of three steps, from running means of 0 where the mean is 30."""
    norm = layers.BatchNorm(groups=groups)
    x = channels(mean=30.0, deviation=1.0)[0]
    begin = {
        "params": {"scale": jnp.array([1.0, 0.5, -2.0, 3.0]), "bias": jnp.arange(4.0)},
        "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
    }

    def steps(where):
        with platform.on(where):
            found, variables = [], begin
            for step in range(3):

                def loss(params, x, variables=variables):
                    y, changed = norm.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
                    return jnp.sum(jnp.sin(y)), (y, changed)

                (_, (y, changed)), slopes = jax.value_and_grad(loss, (0, 1), has_aux=True)(begin["params"], x + step)
                variables = begin | changed
                found.append((y, changed, slopes))
            return found

    for found, expected in zip(jax.tree.leaves(steps("tpu")), jax.tree.leaves(steps("cpu")), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_program_for_an_accelerator_sums_once_over_the_devices_forward_and_once_backward():
    """Where the conditional is not taken; the two sums of a pass go in one all-reduce."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(channels(mean=0.0, deviation=1.0)[0], sharding)

    def loss(x):
        mean, var = batch_statistics.in_one_pass(x, AXES, shift=jnp.zeros(4))
        return jnp.sum(jnp.sin((x - mean) * jax.lax.rsqrt(var + 1e-5)))

    text = jax.jit(jax.grad(loss)).lower(x).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert entry.count(" all-reduce(") <= 2
