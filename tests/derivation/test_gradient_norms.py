"""Statements 29 to 36 of docs/derivation.md: the coupling in own coordinates, and how gradients shrink."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivation.algebra import (
    ALPHA,
    BETA,
    Closed,
    assert_close,
    dkd,
    dot,
    gradients,
    hessian_parts,
    nckd,
    random_batch,
    random_teachers,
    split,
    tckd,
    values,
)
from derivation.search import largest, pair, ratio
from scipy import linalg, special

EXTREMES = [(3, 1.0, 1.0), (10, 4.0, 5.0)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def own(z, v, labels, temperature):
    """G_own of each sample by autodiff: ∇TCKD at the target's logit, ∇NCKD at the others."""
    target = jax.nn.one_hot(labels, z.shape[-1])
    of_tckd, of_nckd = (
        jax.grad(lambda logits, loss=loss: loss(logits, v, labels, temperature).sum())(z) for loss in (tckd, nckd)
    )
    return ((target * of_tckd - (1 - target) * of_nckd) ** 2).sum(-1)


def own_closed(x):
    return x.T**2 * (x.delta**2 + dot(x.g, x.g))


def own_gradient(x):
    spread = x.s * (x.g - dot(x.s, x.g)[:, None])  # S·g
    return 2 * x.T * ((x.delta * x.v)[:, None] * x.m + spread)


@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_29_in_own_coordinates_the_coupling_is_two_squared_distances(case):
    x = random_batch(*case)
    assert_close(values(own, x), own_closed(x))
    assert_close(gradients(own, x), own_gradient(x))
    assert_close(own_closed(x), Closed.coupling(x) - x.T**2 * (x.delta**2 * x.squares - 2 * x.delta * x.c))


def test_30_its_threshold_is_the_least_of_two_alpha_and_beta():
    def of(alpha, beta, classes):
        def at(points):
            x = pair(points)
            return ratio(own_closed(x), alpha * Closed.tckd(x) + beta * Closed.nckd(x))

        return largest(at, 2 * classes)[0]

    for classes in (2, 10):
        assert of(0.5, 1.0, classes) <= 1 + 1e-6
    for alpha, beta in ((1, 8), (1, 1), (4, 8)):
        assert of(alpha, beta, 3) == pytest.approx(1 / min(2 * alpha, beta), rel=1e-3)


def own_hessian(q, shape):
    """ν²·mmᵀ + S² at a teacher, half of G_own's Hessian."""
    t = np.r_[0.0, np.asarray(shape, float)]
    m, spread = np.eye(len(t))[0] - t, np.diag(t) - np.outer(t, t)
    return (q * (1 - q)) ** 2 * np.outer(m, m) + spread @ spread


@pytest.mark.parametrize("n", [2, 4])
def test_31_the_teachers_solution_stops_being_a_minimum_at_the_least_of_two(n):
    basis = linalg.null_space(np.ones((1, n + 1)))
    step = 1e-4
    for q, shape in random_teachers([n] * 6):
        spread = np.linalg.eigvalsh(np.diag(shape) - np.outer(shape, shape))[-1]
        critical = min(ALPHA / (2 * q * (1 - q)), BETA / (2 * spread))
        of_dkd, of_own = hessian_parts(q, shape)[0], own_hessian(q, shape)
        found = 0.5 / linalg.eigh(basis.T @ of_own @ basis, basis.T @ of_dkd @ basis, eigvals_only=True)[-1]
        assert found == pytest.approx(critical, rel=1e-9)
        assert found >= min(2 * ALPHA, BETA)
        # And `own_hessian` is that of G_own: the gradient's change over small steps about the teacher.
        v = np.log(np.r_[q, (1 - q) * shape])
        around = [
            split(v + sign * step * np.eye(n + 1), np.tile(v, (n + 1, 1)), np.zeros(n + 1, int), 1.0)
            for sign in (1, -1)
        ]
        assert_close((own_gradient(around[0]) - own_gradient(around[1])) / (2 * step), 2 * of_own, 1e-4)


def test_32_it_always_opposes_tckd_in_the_log_odds_and_nckd_among_the_others():
    def of_odds(points):  # −(∂G_own/∂u at fixed ŝ)·(∂TCKD/∂u) is never positive: both have the sign of δ
        x = pair(points)
        spread = x.s * (x.g - dot(x.s, x.g)[:, None])
        among = dot(x.g, spread)  # ⟨∇NCKD, ∇G_own⟩ with u held, over 2T²
        return -np.minimum(x.v * x.delta**2, among)

    assert largest(of_odds, 8)[0] <= 1e-12
    # In all logits at once it may yet help DKD, more seldom than the coupled form.
    helps = {}
    for name, gradient in (("own", own_gradient), ("coupled", Closed.coupling_gradient)):
        x = random_batch(10, 1.0, 3.0, batch=20_000)
        helps[name] = np.mean(dot(Closed.dkd_gradient(x), gradient(x)) < 0)
    assert helps["own"] == pytest.approx(0.019, abs=0.005)
    assert helps["coupled"] == pytest.approx(0.049, abs=0.008)


def test_32_its_only_stationary_point_is_the_teachers_solution():
    def flatness(points):  # −‖∇G_own‖²/G_own of logits within ±2
        x = pair(np.tanh(points))
        g = own_gradient(x)
        return np.where(own_closed(x) > 1e-7, -ratio(dot(g, g), own_closed(x)), -1.0)

    # At the teacher it is at least four times the least eigenvalue of ν²·mmᵀ + S²; nowhere does it approach 0.
    for classes in (2, 3, 4):
        assert largest(flatness, 2 * classes)[0] < -1e-4


def kd_parts(x):
    """KD and its gradient over all classes, T²·KL and T·(P − Q)."""
    student = x.p[:, None] * x.target + x.p_rest[:, None] * x.s
    teacher = x.q[:, None] * x.target + x.q_rest[:, None] * x.t
    return x.T**2 * special.kl_div(teacher, student).sum(-1), x.T * (student - teacher)


PARTS = {
    "kd": kd_parts,
    "tckd": lambda x: (Closed.tckd(x), x.T * x.delta[:, None] * x.m),
    "nckd": lambda x: (Closed.nckd(x), x.T * x.g),
}


@pytest.mark.parametrize("name", PARTS)
def test_33_no_squared_gradient_is_larger_than_its_loss(name):
    def share(points):
        value, gradient = PARTS[name](pair(points))
        return ratio(dot(gradient, gradient), value)

    assert 0.999 < largest(share, 6)[0] <= 1 + 1e-6


def test_33_of_dkd_by_the_sum_of_the_weights():
    def share(points):
        x = pair(points)
        gradient = Closed.dkd_gradient(x, 1.0, 8.0)
        return ratio(dot(gradient, gradient), Closed.tckd(x) + 8 * Closed.nckd(x))

    assert largest(share, 6)[0] <= 9


def rays(q, shape, steps, *, directions=200):
    """Students at these distances from one teacher, in random directions; and DKD's Hessian there."""
    v = np.log(np.r_[q, (1 - q) * np.asarray(shape)])
    away = np.random.default_rng(33).standard_normal((directions, len(v)))
    away -= away.mean(-1, keepdims=True)
    away /= np.linalg.norm(away, axis=-1, keepdims=True)
    v = np.tile(v, (directions, 1))
    return [split(v + step * away, v, np.zeros(directions, int), 1.0) for step in steps]


def on_zero_sums(matrix):
    basis = linalg.null_space(np.ones((1, len(matrix))))
    return np.linalg.eigvalsh(basis.T @ matrix @ basis)


def total(x):
    return ALPHA * Closed.tckd(x) + BETA * Closed.nckd(x)


TEACHERS = [(0.7, [0.5, 0.3, 0.2]), (0.2, [0.25, 0.25, 0.25, 0.25]), (0.95, [0.8, 0.1, 0.1])]


@pytest.mark.parametrize(("q", "shape"), TEACHERS)
def test_33_near_the_teacher_the_norm_falls_as_the_root_of_the_loss(q, shape):
    eigenvalues = on_zero_sums(hessian_parts(q, shape)[0])
    for x in rays(q, shape, (1e-2, 1e-3)):
        quotient = dot(Closed.dkd_gradient(x), Closed.dkd_gradient(x)) / total(x)
        assert 2 * eigenvalues[0] * 0.97 <= quotient.min()
        assert quotient.max() <= 2 * eigenvalues[-1] * 1.03
    # A second network ten times nearer has a tenth of the gradient: the same fall for any loss of this order.
    far, close = (np.linalg.norm(Closed.dkd_gradient(x), axis=-1) for x in rays(q, shape, (1e-2, 1e-3)))
    assert far / close == pytest.approx(np.full(200, 10.0), rel=0.05)


@pytest.mark.parametrize(("q", "shape"), TEACHERS)
def test_34_a_multiple_falls_alike_and_only_the_logarithm_does_not(q, shape):
    eigenvalues = on_zero_sums(hessian_parts(q, shape)[0])
    far, close = rays(q, shape, (1e-2, 1e-3))
    norms = [np.linalg.norm(Closed.dkd_gradient(x), axis=-1) for x in (far, close)]
    losses_ = [total(x) for x in (far, close)]
    # ‖∇(DKD^a)‖ = a·DKD^(a−1)·‖∇DKD‖: a power falls as DKD^(a−1/2), and the root (a = 1/2) not at all.
    for power, expected in ((1.0, 10.0), (0.75, math.sqrt(10.0)), (0.5, 1.0), (0.25, 1 / math.sqrt(10.0))):
        of = [power * loss ** (power - 1) * norm for loss, norm in zip(losses_, norms, strict=True)]
        assert of[0] / of[1] == pytest.approx(np.full(200, expected), rel=0.05)
    of = [norm / loss for loss, norm in zip(losses_, norms, strict=True)]  # ‖∇log DKD‖
    assert of[0] / of[1] == pytest.approx(np.full(200, 0.1), rel=0.05)
    scaled = of[1] * np.sqrt(losses_[1])
    assert math.sqrt(2 * eigenvalues[0]) * 0.98 <= scaled.min()
    assert scaled.max() <= math.sqrt(2 * eigenvalues[-1]) * 1.02


def test_34_the_logarithm_by_autodiff():
    x = random_batch(10, 4.0, 1.0)
    found = gradients(lambda *inputs: jnp.log(dkd(*inputs)), x)
    assert_close(found, Closed.dkd_gradient(x) / total(x)[:, None])


@pytest.mark.parametrize(("q", "shape"), TEACHERS)
def test_35_per_sample_scales_the_norm_and_apart_makes_it_smaller(q, shape):
    of_dkd, jacobian = hessian_parts(q, shape)
    basis = linalg.null_space(np.ones((1, len(of_dkd))))
    of_coupling = basis.T @ jacobian @ jacobian @ basis
    scales, directions = linalg.eigh(of_coupling, basis.T @ of_dkd @ basis)
    v, step = np.log(np.r_[q, (1 - q) * np.asarray(shape)]), 1e-4
    away = (basis @ (directions / np.linalg.norm(directions, axis=0))).T
    x = split(v + step * away, np.tile(v, (len(away), 1)), np.zeros(len(away), int), 1.0)
    for epsilon in (0.5, -0.5):
        found = np.linalg.norm(Closed.dkd_gradient(x) - epsilon * Closed.coupling_gradient(x), axis=-1)
        expected = (1 - 2 * epsilon * scales) * np.linalg.norm(Closed.dkd_gradient(x), axis=-1)
        assert found == pytest.approx(expected, rel=1e-2)
    assert (scales > 0).all()


def test_36_dkd_keeps_a_gradient_of_its_loss_over_the_distance():
    def share(points):
        x = pair(points)
        away = x.logits[0] - x.logits[1]
        away = away - away.mean(-1, keepdims=True)
        product = np.linalg.norm(Closed.dkd_gradient(x, 1.0, 1.0), axis=-1) * np.linalg.norm(away, axis=-1)
        return ratio(Closed.tckd(x) + Closed.nckd(x), product)

    assert 0.5 < largest(share, 8)[0] <= 1 + 1e-9  # β = α, where it is hardest


@pytest.mark.parametrize("coupled", [Closed.coupling, own_closed], ids=["coupled", "own"])
@pytest.mark.parametrize(("q", "shape"), TEACHERS)
def test_36_the_logarithm_together_sustains_the_norm_down_to_its_guard(coupled, q, shape):
    slope = Closed.coupling_gradient if coupled is Closed.coupling else own_gradient
    weight, steps = 3.0, (1e-2, 1e-3, 1e-4)

    def norms(kappa):
        found = []
        for x in rays(q, shape, steps):
            pull = weight * slope(x) / (coupled(x) + kappa)[:, None]
            found.append(np.linalg.norm(Closed.dkd_gradient(x) + pull, axis=-1))
        return found

    without = norms(0.0)
    for step, norm in zip(steps, without, strict=True):
        assert norm.min() >= 2 * weight / step * 0.95  # at least 2c/‖z − v‖, growing without end
    matrix = hessian_parts(q, shape)[1]
    matrix = matrix @ matrix if coupled is Closed.coupling else own_hessian(q, shape)
    kappa = 1e-6
    guarded = norms(kappa)
    highest = weight * math.sqrt(on_zero_sums(matrix)[-1] / kappa)  # c·√λ/√κ, reached at G = κ
    assert all(norm.max() <= highest * 1.05 for norm in guarded)
    x = rays(q, shape, (1e-6, 1e-7))  # far inside the guard the norm falls again, as the distance
    inside = [np.linalg.norm(slope(each) / (coupled(each) + kappa)[:, None], axis=-1) for each in x]
    assert inside[0] / inside[1] == pytest.approx(np.full(200, 10.0), rel=0.05)
