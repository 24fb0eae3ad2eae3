"""What is stored of a few classes, against its formula in float64."""

import jax
import numpy as np
import pytest
from cached_logits import plain_top_k, rounding

from dgkd_jax import losses
from dgkd_jax.training.cached_logits import top_classes


@pytest.mark.parametrize("k", [1, 2, 3, 7, 11])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_is_its_formula(k, temperature):
    rng = np.random.default_rng(k)
    v, y = rng.normal(size=(3, 5, 12)) * 6, rng.integers(0, 12, (3, 5))
    stored = top_classes.shorten(v, y, count=k, temperature=temperature)
    assert stored.values.shape == (3, 5, k)
    assert (stored.classes[..., 0] == y).all()
    found = top_classes.restore(stored, num_classes=12, temperature=temperature)
    expected = np.array([[plain_top_k(v[i, j], y[i, j], k, temperature) for j in range(5)] for i in range(3)])
    assert found.dtype == np.float16
    assert (np.abs(found - expected) <= rounding(expected)).all()


def test_top_k_of_all_classes_is_all_logits():
    rng = np.random.default_rng(0)
    v, y = rng.normal(size=(6, 12)) * 6, rng.integers(0, 12, 6)
    stored = top_classes.shorten(v, y, count=12, temperature=4.0)
    found = top_classes.restore(stored, num_classes=12, temperature=4.0)
    np.testing.assert_array_equal(found, v.astype(np.float16))


@pytest.mark.parametrize("k", [1, 3])
def test_tckd_is_exact_from_top_k_at_its_temperature_and_not_at_another(k):
    """On logits, and a mass of the rest, that float16 rounds by 2⁻¹¹: so are TCKD's log-odds."""
    rng = np.random.default_rng(1)
    v, z, y = rng.normal(size=(64, 12)) * 3, rng.normal(size=(64, 12)) * 3, rng.integers(0, 12, 64)
    with jax.enable_x64(True):
        stored = top_classes.shorten(v, y, count=k, temperature=4.0)
        # Without the rounding of the stored values, to see the formula and not float16.
        stored = stored._replace(values=np.take_along_axis(v, stored.classes.astype(int), 1))
        dense = np.repeat((stored.rest - 4.0 * np.log(12 - k))[:, None].astype(np.float64), 12, 1)
        np.put_along_axis(dense, stored.classes.astype(int), stored.values, 1)
        for loss in (losses.tckd, losses.tckd_gradient):
            exact, found, elsewhere = (
                np.asarray(loss(z, teacher, y, temperature=t)) for teacher, t in ((v, 4.0), (dense, 4.0), (dense, 1.0))
            )
            np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)  # `rest` is float32
            assert np.abs(elsewhere - np.asarray(loss(z, v, y, temperature=1.0))).max() > 0.05
        assert np.abs(losses.nckd(z, dense, y, temperature=4.0) - losses.nckd(z, v, y, temperature=4.0)).max() > 1e-3
