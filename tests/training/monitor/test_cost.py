"""The step's own account: operations of a product are known, donated memory is seen, an unknown device gets no peak."""

import jax
import jax.numpy as jnp
import pytest

from dgkd_jax.training.monitor import cost


def test_operations_and_memory_of_a_matrix_product():
    x = jnp.ones((64, 32), jnp.float32)
    found = cost.cost(jax.jit(lambda x: x @ x.T).lower(x).compile(), platform="cpu")
    assert found["step_gflops"] == 2 * 64 * 64 * 32 / 1e9
    assert found["arguments_mib"] == 64 * 32 * 4 / 2**20
    assert found["output_mib"] == 64 * 64 * 4 / 2**20
    assert found["donated_mib"] == 0


def test_a_donated_argument_counts_as_reused():
    x = jnp.ones((256, 256), jnp.float32)
    found = cost.cost(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile(), platform="cpu")
    assert found["donated_mib"] == found["output_mib"] == 0.25
    assert "0.25 MiB of them reused" in cost.summary(found)


@pytest.mark.parametrize(
    ("found", "kind", "expected"),
    [
        ({"step_gflops": 197.0}, "TPU v5 lite", {"utilisation": 0.25}),  # 197·10⁹ · 250 / 197·10¹²
        ({"step_gflops": 459.0}, "TPU v5", {"utilisation": 0.25}),  # a v5p
        ({"step_gflops": 197.0}, "cpu", {}),
        ({}, "TPU v5 lite", {}),
    ],
)
def test_utilisation_only_where_the_peak_is_known(found, kind, expected):
    assert cost.utilisation(found, 250.0, kind=kind) == pytest.approx(expected)


def test_what_the_backend_does_not_tell_is_left_out():
    class Silent:
        def cost_analysis(self):
            return None

        def memory_analysis(self):
            return None

    assert cost.cost(Silent(), platform="cpu") == {}
    assert cost.summary({}) == "not told"


def test_gpus_report_no_operations_because_most_are_not_counted():
    product = jax.jit(lambda x: x @ x.T).lower(jnp.ones((64, 32))).compile()
    assert "step_gflops" not in cost.cost(product, platform="gpu")
    assert "arguments_mib" in cost.cost(product, platform="gpu")
