"""Neural collapse: against a separate float64 computation of the definitions, and in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from neural_collapse import by_definition

from dgkd_jax.evaluate import collapse, metrics

CLASSES, WIDTH, EXAMPLES = 6, 9, 400


def measured(features, labels, predicted, classifier, *, batch=64, num_classes=CLASSES):
    """Through both passes in padded batches, as an evaluation goes; what the padding holds is not finite."""
    rest = -len(labels) % batch
    mask = np.arange(len(labels) + rest) < len(labels)
    features = np.concatenate([features, np.full((rest, features.shape[1]), np.nan, features.dtype)])
    labels, predicted = np.pad(labels, (0, rest)), np.pad(predicted, (0, rest))
    cuts = [slice(start, start + batch) for start in range(0, len(mask), batch)]
    sums = None
    for cut in cuts:
        part = collapse.class_sums(
            jnp.asarray(features[cut]), jnp.asarray(labels[cut]), jnp.asarray(mask[cut]), num_classes=num_classes
        )
        sums = part if sums is None else metrics.merge(sums, part)
    means, scattered = collapse.class_means(sums), None
    for cut in cuts:
        rows = (jnp.asarray(rows[cut]) for rows in (features, labels, mask, predicted))
        part = collapse.scatter(*rows, means=jnp.asarray(means), count=sums.count)
        scattered = part if scattered is None else metrics.merge(scattered, part)
    return collapse.measures(sums, scattered, means=means, classifier=classifier)


def random_split(seed=0, *, spread=1.0, offset=0.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(CLASSES, WIDTH)) + offset
    labels = rng.choice(CLASSES, EXAMPLES, p=[0.3, 0.1, 0.1, 0.2, 0.2, 0.1]).astype(np.int32)
    features = (centres[labels] + spread * rng.normal(size=(EXAMPLES, WIDTH))).astype(dtype)
    classifier = rng.normal(size=(WIDTH, CLASSES)).astype(np.float32)
    predicted = np.argmax(features.astype(np.float64) @ classifier, -1).astype(np.int32)
    return features, labels, predicted, classifier


def equiangular_frame(classes=CLASSES, width=WIDTH, *, scale=3.0, seed=1):
    """Rows: a simplex equiangular tight frame in a random orientation."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    return scale * np.sqrt(classes / (classes - 1)) * (np.eye(classes) - 1 / classes) @ basis[:classes]


@pytest.mark.parametrize("width", [WIDTH, 4])  # 4: fewer directions than classes
def test_measures_are_their_definitions(width):
    features, labels, _, classifier = random_split()
    features, classifier = features[:, :width], classifier[:width]
    predicted = np.argmax(features.astype(np.float64) @ classifier, -1).astype(np.int32)
    found = measured(features, labels, predicted, classifier)
    expected = by_definition(features, labels, predicted, classifier)
    assert found["nc4"] == expected["nc4"] < 1
    for name in collapse.NAMES:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5)  # float32 sums of 400 products


@pytest.mark.slow
def test_a_perfect_frame_has_collapsed():
    frame = equiangular_frame()
    with jax.enable_x64(True):
        labels = np.repeat(np.arange(CLASSES), [5, 9, 1, 20, 7, 3]).astype(np.int32)  # of any sizes
        found = measured(frame[labels] + 10.0, labels, labels, 0.7 * frame.T)
    for name in ("nc1", "nc2_norms", "nc2_angles", "nc3"):
        np.testing.assert_allclose(found[name], 0.0, atol=1e-13)  # float64
    assert found["nc4"] == 1.0


def test_variability_of_a_frame_with_isotropic_scatter_is_in_closed_form():
    """±a on every axis around each mean: Σ_W = (a²/D)·I, Σ_B = s²/(C−1)·P with P of rank C−1."""
    scale, spread = 3.0, 0.5
    offsets = np.concatenate([np.eye(WIDTH), -np.eye(WIDTH)]) * spread
    features = (equiangular_frame(scale=scale)[:, None] + offsets[None]).reshape(-1, WIDTH).astype(np.float32)
    labels = np.repeat(np.arange(CLASSES), len(offsets)).astype(np.int32)
    found = measured(features, labels, labels, np.eye(WIDTH, CLASSES, dtype=np.float32))
    expected = spread**2 * (CLASSES - 1) ** 2 / (WIDTH * scale**2 * CLASSES)
    np.testing.assert_allclose(found["nc1"], expected, rtol=1e-5)  # float32 sums


def test_nearly_collapsed_features_far_from_the_origin_lose_no_digits():
    """Spread 1e-5 at an offset of 30, where neighbouring float32 are 2e-6 apart.

    Sums of squares would have no digit of the scatter left, and a scatter around the rounded means alone two.
    """
    split = random_split(spread=1e-5, offset=30.0)
    found, expected = measured(*split), by_definition(*split)
    np.testing.assert_allclose(found["nc1"], expected["nc1"], rtol=2e-5)
    assert found["nc4"] == expected["nc4"]


@pytest.mark.slow
def test_measures_are_the_same_however_the_examples_are_batched():
    split = random_split(3)
    whole, parts = measured(*split, batch=EXAMPLES), measured(*split, batch=7)
    assert whole["nc4"] == parts["nc4"]
    for name in collapse.NAMES:
        np.testing.assert_allclose(whole[name], parts[name], rtol=1e-5)  # float32 sums in another order


def test_classes_without_examples_are_left_out():
    features, labels, predicted, classifier = random_split()
    kept = labels != 2
    found = measured(features[kept], labels[kept], predicted[kept], classifier)
    expected = by_definition(features[kept], labels[kept], predicted[kept], classifier)
    for name in collapse.NAMES:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-5)


def test_what_is_undefined_is_not_a_number():
    features, labels, predicted, classifier = random_split()
    one = measured(features, np.zeros_like(labels), predicted, classifier)
    assert all(np.isnan(value) for value in one.values())
    features[3] = np.inf
    broken = measured(features, labels, predicted, classifier)
    assert all(np.isnan(value) for value in broken.values())
    same = measured(np.ones_like(features), labels, predicted, classifier)
    assert [name for name, value in same.items() if np.isnan(value)] == ["nc1", "nc2_norms", "nc2_angles", "nc3"]
