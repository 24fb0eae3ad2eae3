"""What an evaluation keeps of a network's answers."""

import jax
import numpy as np
import pytest

from dgkd_jax import predictions
from dgkd_jax.analysis import calibration


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.5, 0.05], np.float32)
    correct = np.array([True, False, True, False])
    # The bins: two with accuracy 1/2 and confidence 0.95, one with 1 and 0.5, one with 0 and 0.05.
    expected = (2 * 0.45 + 0.5 + 0.05) / 4
    assert calibration.calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-7)


def test_embedding_is_that_of_the_singular_value_decomposition():
    features = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * [5, 3, 1, 1, 1, 1]
    centred = features - features.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    embedding = predictions.principal_components(features)
    np.testing.assert_allclose(np.abs(embedding), np.abs(left * values)[:, :2], atol=1e-5)  # float32
    assert predictions.principal_components(features[:, :1]).shape == (50, 2)
    assert not predictions.principal_components(np.ones((3, 4), np.float32)).any()


def test_large_sets_keep_2000_features_spread_evenly():
    mesh = jax.make_mesh((8, 1), ("data", "fsdp"))

    def apply(variables, images, features=False):
        logits = images.reshape(len(images), -1)[:, :2] * variables
        return (logits, logits) if features else logits

    def batches():
        for first in range(0, 4800, 480):
            index = np.arange(first, first + 480)
            images = np.stack([index // 256, index % 256], -1).astype(np.uint8).reshape(-1, 1, 2, 1)
            yield {"image": images, "label": (index % 2).astype(np.int32), "mask": index < 4500}

    network = predictions.Network(apply, 255.0, (0.0,), (1.0,))
    predict = predictions.Predictor(network, None, mesh=mesh)
    rows = predict(batches(), num_examples=4500, batch_size=480)
    kept = np.arange(2000) * 4500 // 2000
    features = np.stack([kept // 256, kept % 256], -1)
    np.testing.assert_allclose(rows["embedding"], predictions.principal_components(features), atol=0.01)  # of 256
    np.testing.assert_array_equal(rows["embedding_label"], kept % 2)
    with pytest.raises(RuntimeError, match="300 of 4800 examples were not evaluated"):
        predict(batches(), num_examples=4800, batch_size=480)
