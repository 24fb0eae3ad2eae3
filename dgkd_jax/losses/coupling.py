r"""The coupling of DKD's two gradients: four distances, four conventions. Symbols as in `losses`."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dgkd_jax.losses import checks

CONVENTIONS = ("per_sample", "literal", "normalized", "self_normalized")
DISTANCES = ("mse", "cosine", "kl", "wasserstein")
WRT = ("logits", "own_logits")

# The constant in the PyTorch repository's `normalized` loss: G / (stop_gradient(G) + 1e-8).
NORMALIZED_GUARD = 1e-8

Convention = Literal["per_sample", "literal", "normalized", "self_normalized"]
Distance = Literal["mse", "cosine", "kl", "wasserstein"]
Wrt = Literal["logits", "own_logits"]


def coupling_of_gradients(
    tckd_gradients: jax.Array,
    nckd_gradients: jax.Array,
    *,
    convention: Convention,
    distance: Distance = "mse",
    parity_batch: int | None = None,
    kappa: float = 1e-8,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""The coupling term G of two sets of per-sample gradients, before the factor −ε.

    With d_i = ‖∇TCKD_i − ∇NCKD_i‖² (`distance="mse"`), B rows, C columns, and b = `parity_batch` or else B:

    | convention        | value                                      | source                                |
    |-------------------|--------------------------------------------|---------------------------------------|
    | `per_sample`      | G = mean_i d_i                             | the DGKD blog post, (1/n)·Σ‖·‖²       |
    | `literal`         | G = mean_i d_i / (b²·C)                    | the PyTorch repository to early 2026  |
    | `normalized`      | G / (stop_gradient(G) + 1e-8), G `literal` | the PyTorch repository at its HEAD    |
    | `self_normalized` | G / (stop_gradient(G) + κ), G `per_sample` | ours: independent of the batch size   |

    (`literal` is `mse_loss` of the gradients of the batch means.) The other distances do not depend on the gradients'
    lengths; there G = mean_i d_i in every convention. `cosine` is 1 − cos(∇TCKD_i, ∇NCKD_i). `kl` and `wasserstein`
    take a gradient's absolute values divided by their sum as a distribution. `kl` is KL(NCKD's ‖ TCKD's); the other
    direction is always infinite, because TCKD's has half of its mass on the target and NCKD's has none there.
    `wasserstein` is the 1-Wasserstein distance with the class index as position, so it depends on the order of the
    classes. A zero gradient has no direction: its d_i is the constant 1 for `cosine` (orthogonal), else 0.

    Args:
        tckd_gradients: float `[B, C]` (or any leading shape), each row one sample's gradient.
        nckd_gradients: the same shape.
        convention: one of `CONVENTIONS`.
        distance: one of `DISTANCES`.
        parity_batch: batch size b ≥ 1 for `literal` and `normalized`; None: the number of rows. With b = 64, any
            global batch gives the value of a PyTorch run at batch 64.
        kappa: κ > 0, read by `self_normalized` only.
        where: bool, the leading shape of the gradients; False leaves a row out, and B counts the others.

    Returns:
        Scalar, at least float32.

    Raises:
        ValueError: unknown convention or distance, shapes do not match, `parity_batch` < 1 or `kappa` ≤ 0.
    """
    check_options(convention, distance, parity_batch, kappa)
    tckd_gradients = checks.promote(tckd_gradients, "tckd_gradients")
    nckd_gradients = checks.promote(nckd_gradients, "nckd_gradients")
    *rows, columns = shape = tckd_gradients.shape
    if nckd_gradients.shape != shape:
        raise ValueError(f"nckd_gradients must have the shape of tckd_gradients, {shape}, got {nckd_gradients.shape}")
    if where is not None:
        tckd_gradients, nckd_gradients = (
            jnp.where(where[..., None], gradients, 0.0) for gradients in (tckd_gradients, nckd_gradients)
        )
    distances = _gradient_distance(tckd_gradients, nckd_gradients, distance)
    count = int(np.prod(rows)) if where is None else jnp.maximum(jnp.sum(where), 1)
    return of_mean_distance(
        jnp.mean(distances) if where is None else jnp.sum(jnp.where(where, distances, 0.0)) / count,
        rows=count if distance == "mse" else None,
        columns=columns,
        convention=convention,
        parity_batch=parity_batch,
        kappa=kappa,
    )


def of_mean_distance(
    distance: jax.Array,
    *,
    rows: int | jax.Array | None,
    columns: int,
    convention: Convention,
    parity_batch: int | None,
    kappa: float,
) -> jax.Array:
    """Apply a convention of `coupling_of_gradients` to a mean distance.

    Args:
        distance: scalar, mean distance of `rows` pairs of gradients with `columns` entries each.
        rows: the batch size that `literal` divides by unless `parity_batch` is given; None for a distance that does not
            depend on the gradients' lengths: no convention changes it.
        (others): as `coupling_of_gradients`.
    """
    coupling = distance
    if convention in ("literal", "normalized") and rows is not None:
        size = parity_batch or rows
        size = float(size) if isinstance(size, int) else size.astype(coupling.dtype)
        coupling = coupling / (size**2 * columns)
    if convention == "normalized":
        return coupling / (jax.lax.stop_gradient(coupling) + NORMALIZED_GUARD)
    if convention == "self_normalized":
        return coupling / (jax.lax.stop_gradient(coupling) + kappa)
    return coupling


def check_options(convention: str, distance: str, parity_batch: int | None, kappa: float, wrt: str = "logits") -> None:
    """Raise ValueError for an option that `coupling_of_gradients` or `dgkd_terms` does not accept."""
    checks.check_choice("wrt", wrt, WRT)
    if wrt == "own_logits" and distance != "mse":
        raise ValueError(
            f"distance={distance!r} compares two gradients coordinate by coordinate, and with wrt='own_logits' they "
            "have none in common; take distance='mse'"
        )
    checks.check_choice("convention", convention, CONVENTIONS)
    checks.check_choice("distance", distance, DISTANCES)
    if parity_batch is not None and parity_batch < 1:
        raise ValueError(f"parity_batch must be at least 1 or None, got {parity_batch}")
    checks.check_positive("kappa", kappa)


def _gradient_distance(a: jax.Array, b: jax.Array, distance: Distance) -> jax.Array:
    """Distance between each row of `a` (TCKD's gradients) and of `b` (NCKD's): `[..., columns]` twice -> `[...]`."""
    if distance == "mse":
        return jnp.sum((a - b) ** 2, axis=-1)
    if distance == "cosine":
        return 1.0 - cosine(a, b)
    target, nontarget = _as_distribution(a), _as_distribution(b)
    if distance == "wasserstein":
        distances = jnp.sum(jnp.abs(jnp.cumsum(target - nontarget, axis=-1)), axis=-1)
    else:
        distances = _kl(nontarget, a)
    comparable = jnp.any(target > 0, axis=-1) & jnp.any(nontarget > 0, axis=-1)
    return jnp.where(comparable, distances, 0.0)


def _kl(nontarget: jax.Array, a: jax.Array) -> jax.Array:
    """KL(nontarget ‖ |a|/Σ|a|); where `a` is 0 but `nontarget` is not, the result is large but finite."""
    a = jnp.abs(a)
    floor = _smallest_divisor(a.dtype)
    has_mass = nontarget > 0
    # The floor applies to `a` and not to its share, so that the logarithm's gradient is at most 1/floor.
    total = jnp.maximum(jnp.sum(a, axis=-1, keepdims=True), floor)
    log_target = jnp.log(jnp.maximum(a, floor)) - jnp.log(total)
    log_ratio = jnp.log(jnp.where(has_mass, nontarget, 1.0)) - log_target
    return jnp.sum(jnp.where(has_mass, nontarget * log_ratio, 0.0), axis=-1)


def _smallest_divisor(dtype) -> float:
    """Smaller numbers have lost digits to underflow, and their reciprocals overflow in gradients."""
    return float(jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps)


def _without_scale(a: jax.Array) -> jax.Array:
    """Each row divided by its largest magnitude, so that small squares do not underflow; 0 if negligible."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(a), axis=-1, keepdims=True))
    return a / jnp.where(largest > _smallest_divisor(a.dtype), largest, jnp.inf)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosine of each row of `a` with the same row of `b`; 0 where one of them is zero."""
    a, b = _without_scale(a), _without_scale(b)
    squares = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))


def _as_distribution(a: jax.Array) -> jax.Array:
    a = jnp.abs(_without_scale(a))
    total = jnp.sum(a, axis=-1, keepdims=True)
    return a / jnp.where(total > 0, total, 1.0)
