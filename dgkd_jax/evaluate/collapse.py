r"""Neural collapse of the features before the classifier: four measures over a whole split.

With h_i the features of example i, y_i its class, μ_c the mean of class c, μ_G = mean_c μ_c, over the C classes that
have examples, and N examples:

    Σ_W = (1/N)·Σ_i (h_i − μ_{y_i})(h_i − μ_{y_i})ᵀ              Σ_B = (1/C)·Σ_c (μ_c − μ_G)(μ_c − μ_G)ᵀ

Source: Papyan, Han & Donoho, PNAS 2020, arXiv:2008.08186 (NC1–NC4); NC1 as tr(Σ_W Σ_B⁺)/C also in Zhou et al. 2022,
arXiv:2203.01238. They measure balanced training sets; here the evaluated split is measured. If class sizes differ,
μ_G still weighs classes equally, so that an equiangular frame is recognised whatever the sizes are.

Method: the network sees each example once. Its features stay on the devices until the means are known and are then
read a second time. That is because the nearest mean (NC4) needs the final means, and because a scatter around the means
loses no digits to cancellation when the classes have collapsed, unlike Σhhᵀ − n·μμᵀ. The sums of the residuals correct
for the means' rounding (the corrected two-pass algorithm: Chan, Golub & LeVeque, The American Statistician 1983). Both
passes are sums that can be added over batches and devices; the rest is float64 on the host.

Memory: 4·N·D bytes for the features, over all devices together (ImageNet's 50,000 with D = 2048: 410 MB), and
4·(3·C·D + D²) bytes per device for sums and means (C = 1000: 41 MB).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("nc1", "nc2_norms", "nc2_angles", "nc3", "nc4")


class ClassSums(NamedTuple):
    """`count`: int32 `[classes]`, number of examples; `total`: float `[classes, width]`, sums of their features."""

    count: jax.Array
    total: jax.Array


class Scatter(NamedTuple):
    """Sums around reference means r_c, which are nearly the class means.

    Attributes:
        within: float `[width, width]`, Σ_i (h_i − r_{y_i})(h_i − r_{y_i})ᵀ.
        residual: float `[classes, width]`, Σ_{i of c} (h_i − r_c).
        nearest: int32 scalar, examples whose nearest mean is that of the class that the network predicts.
    """

    within: jax.Array
    residual: jax.Array
    nearest: jax.Array


def class_sums(features: jax.Array, labels: jax.Array, mask: jax.Array, *, num_classes: int) -> ClassSums:
    """First pass: the sums of one batch.

    Args:
        features: float `[batch, width]`.
        labels: integer `[batch]` in [0, num_classes).
        mask: bool `[batch]`, False where a row is padding.
        num_classes: of the data set.
    """
    member = _member(labels, mask, num_classes)
    return ClassSums(
        count=jnp.sum(member, axis=0, dtype=jnp.int32),
        total=_product(member.astype(features.dtype).T, jnp.where(mask[:, None], features, 0.0)),
    )


def class_means(sums: ClassSums) -> np.ndarray:
    """Class means `[classes, width]` in the dtype of the features; 0 for a class without examples."""
    count, total = np.asarray(sums.count), np.asarray(sums.total)
    return (total.astype(np.float64) / np.maximum(count, 1)[:, None]).astype(total.dtype)


def scatter(
    features: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    predicted: jax.Array,
    *,
    means: jax.Array,
    count: jax.Array,
) -> Scatter:
    """Second pass: the sums of one batch.

    Args:
        features, labels, mask: as for `class_sums`.
        predicted: integer `[batch]`, the network's top class.
        means: float `[classes, width]`, r_c, from `class_means`.
        count: integer `[classes]`, examples of each class in the whole split; a class without any has no mean.
    """
    residuals = jnp.where(mask[:, None], features - means[labels], 0.0)
    member = _member(labels, mask, len(means)).astype(features.dtype)
    # Distances are relative to the middle of the means: for features far from the origin, ‖h‖² − ‖μ‖² would cancel.
    present = count > 0
    middle = jnp.sum(jnp.where(present[:, None], means, 0.0), axis=0) / jnp.sum(present)
    centred = means - middle
    closeness = _product(features - middle, centred.T) - 0.5 * jnp.sum(centred**2, axis=-1)
    nearest = jnp.argmax(jnp.where(present, closeness, -jnp.inf), axis=-1)
    return Scatter(
        within=_product(residuals.T, residuals),
        residual=_product(member.T, residuals),
        nearest=jnp.sum((nearest == predicted) & mask, dtype=jnp.int32),
    )


def measures(sums: ClassSums, scattered: Scatter, *, means: np.ndarray, classifier: np.ndarray) -> dict[str, float]:
    """The four measures (NC2 has two), 0 in full collapse except `nc4`, which is 1.

    Args:
        sums: of all batches.
        scattered: of all batches, around `means`.
        means: float `[classes, width]`, from `class_means`.
        classifier: float `[width, classes]`, weights of the last layer.

    Returns:
        `nc1`: tr(Σ_W Σ_B⁺)/C ≥ 0. Σ_B⁺ leaves out directions in which the means differ only by rounding.
        `nc2_norms`: coefficient of variation of ‖μ_c − μ_G‖ ≥ 0 (standard deviation over mean).
        `nc2_angles`: mean over pairs c ≠ c' of |cos(μ_c − μ_G, μ_c' − μ_G) + 1/(C−1)|, in [0, 2].
        `nc3`: ‖W/‖W‖_F − M/‖M‖_F‖_F² in [0, 4], M the matrix of the μ_c − μ_G; 0 where they are proportional.
        `nc4`: share of the examples for which the network predicts the class with the nearest mean.
        NaN where undefined: fewer than two classes with examples, equal means, values that are not finite.
    """
    count = np.asarray(sums.count)
    present = count > 0
    examples, classes = int(count.sum()), int(present.sum())
    residual, within = np.asarray(scattered.residual, np.float64), np.asarray(scattered.within, np.float64)
    if classes < 2 or not (np.isfinite(residual).all() and np.isfinite(within).all()):
        return dict.fromkeys(NAMES, float("nan"))
    sizes = count[present].astype(np.float64)[:, None]
    correction = residual[present] / sizes
    corrected = np.asarray(means, np.float64)[present] + correction
    within = (within - (sizes * correction).T @ correction) / examples
    centred = corrected - corrected.mean(axis=0)
    weights = np.asarray(classifier, np.float64).T[present]
    epsilon = np.finfo(np.asarray(means).dtype).eps
    return {
        "nc1": _variability(within, centred, epsilon),
        "nc2_norms": _unequal_norms(centred),
        "nc2_angles": _unequal_angles(centred),
        "nc3": _misalignment(weights, centred),
        "nc4": int(scattered.nearest) / examples,
    }


def _variability(within: np.ndarray, centred: np.ndarray, epsilon: float) -> float:
    """tr(Σ_W Σ_B⁺)/C. With M = U S Vᵀ, Σ_B⁺ = C·V S⁻² Vᵀ."""
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    # The rule of numpy.linalg.matrix_rank, with the precision in which the means were summed.
    kept = scales > scales[0] * max(centred.shape) * epsilon
    directions = directions[kept]
    along = np.einsum("kd,de,ke->k", directions, within, directions, optimize=True)
    return float(np.sum(along / scales[kept] ** 2)) if kept.any() else float("nan")


def _unequal_norms(centred: np.ndarray) -> float:
    norms = np.linalg.norm(centred, axis=1)
    return float(norms.std() / norms.mean()) if norms.any() else float("nan")


def _unequal_angles(centred: np.ndarray) -> float:
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    if not norms.all():
        return float("nan")
    cosines = (centred / norms) @ (centred / norms).T
    classes = len(centred)
    return float(np.abs(cosines + 1.0 / (classes - 1))[~np.eye(classes, dtype=bool)].mean())


def _misalignment(weights: np.ndarray, centred: np.ndarray) -> float:
    scales = np.linalg.norm(weights), np.linalg.norm(centred)
    if not all(scales):
        return float("nan")
    return float(np.sum((weights / scales[0] - centred / scales[1]) ** 2))


def _member(labels: jax.Array, mask: jax.Array, num_classes: int) -> jax.Array:
    return (labels[:, None] == jnp.arange(num_classes)) & mask[:, None]


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # Accelerators' default precision is that of bfloat16 or TensorFloat-32.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
