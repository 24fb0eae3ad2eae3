"""The statements of docs/derivation.md, one test each, in its order; autodiff of `dgkd_jax.losses` is the oracle.

The letters are those of the document. p, q, ŝ, t̂ are computed here from plain softmaxes.
"""

import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, optimize, special

from dgkd_jax import losses

DOCUMENT = Path(__file__).parents[1] / "docs" / "derivation.md"
ALPHA, BETA = 1.0, 8.0
SAFE = ALPHA * BETA / (ALPHA + BETA)  # ε₀ of statement 13
CASES = [(classes, temperature, scale) for classes in (2, 3, 10) for temperature in (1.0, 4.0) for scale in (1.0, 5.0)]

# Each program runs a few times, so that optimising it costs more than it saves.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_batch(classes, temperature, scale, *, batch=256, seed=0):
    """Random logits of standard deviation `scale`·T; everything that the document names, by plain softmaxes."""
    rng = np.random.default_rng([classes, int(temperature), int(scale), seed])
    z, v = scale * temperature * rng.standard_normal((2, batch, classes))
    return split(z, v, rng.integers(0, classes, batch), temperature)


def split(z, v, labels, temperature):
    target = np.eye(z.shape[-1])[labels]
    student, teacher = (special.softmax(logits / temperature, axis=-1) for logits in (z, v))
    p, q = (student * target).sum(-1), (teacher * target).sum(-1)
    # 1 − p as the sum of the others, which does not cancel.
    s, t = (x * (1 - target) / (x * (1 - target)).sum(-1, keepdims=True) for x in (student, teacher))
    delta = ((1 - target) * (teacher - student)).sum(-1)
    g = s - t
    r = g + delta[:, None] * s
    c = -(g * s).sum(-1)
    squares = (s * s).sum(-1)
    return SimpleNamespace(
        logits=(z, v, labels),
        T=temperature,
        target=target,
        p=p,
        q=q,
        s=s,
        t=t,
        delta=delta,
        g=g,
        r=r,
        c=c,
        squares=squares,
        v=(student * target).sum(-1) * (student * (1 - target)).sum(-1),
        a=delta * (1 + squares) - c,
        m=target - s,
        spread_r=s * (r - (s * r).sum(-1, keepdims=True)),  # S(ŝ)·r
    )


def logits_of(p, shape, temperature):
    """Logits whose softmax at T has `p` at class 0 and, among the others, `shape` (of all samples or of each)."""
    p = np.atleast_1d(p)[:, None]
    return temperature * np.log(np.concatenate([p, (1 - p) * np.asarray(shape, float)], -1))


def tckd(z, v, labels, temperature):
    return losses.tckd(z, v, labels, temperature=temperature)


def nckd(z, v, labels, temperature):
    return losses.nckd(z, v, labels, temperature=temperature)


def dkd(z, v, labels, temperature):
    return losses.dkd(z, v, labels, temperature=temperature, alpha=ALPHA, beta=BETA)


def coupling(z, v, labels, temperature):
    """G_i, [batch]: `per_sample`'s mean of one sample each."""
    alone = partial(losses.gradient_coupling, temperature=temperature, convention="per_sample")
    return jax.vmap(lambda a, b, y: alone(a[None], b[None], y[None]))(z, v, labels)


@partial(compiled, static_argnums=0)
def _values(function, *inputs):
    return function(*inputs)


@partial(compiled, static_argnums=0)
def _gradients(function, z, *others):
    return jax.grad(lambda logits: function(logits, *others).sum())(z)


def values(function, x):
    """`function` of each sample, [batch]."""
    return np.array(_values(function, *x.logits, x.T))


def gradients(function, x):
    """Each sample's own gradient by autodiff, [batch, classes]."""
    return np.array(_gradients(function, *x.logits, x.T))


def dgkd(z, v, labels, temperature, epsilon, *, convention="per_sample", kappa=1e-8):
    settings = {"convention": convention, "kappa": kappa}
    weights = {"alpha": ALPHA, "beta": BETA, "epsilon": epsilon}
    return losses.dgkd(z, v, labels, temperature=temperature, **weights, **settings)


_dgkd = compiled(jax.vmap(dgkd, (None, None, None, None, 0)))  # at several ε


def descend(loss, z):
    """Where L-BFGS with autodiff gradients ends that starts at `z`."""
    slope = compiled(jax.value_and_grad(lambda flat: loss(flat.reshape(z.shape))))

    def evaluate(flat):
        return [np.asarray(part) for part in slope(flat)]

    found = optimize.minimize(evaluate, z.ravel(), jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-10})
    return found.x.reshape(z.shape)


def assert_close(found, expected, tolerance=1e-10):
    """To rounding, relative to the largest entry: autodiff and softmax each round by 1e-16 times a sum's terms."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(np.max(np.abs(expected)), 1e-6))


def dot(a, b):
    return (a * b).sum(-1)


def test_every_statement_names_a_test_that_exists():
    named = re.findall(r"`(test_\d\d_\w+)`", DOCUMENT.read_text())
    here = [name for name in globals() if re.match(r"test_\d\d_", name)]
    assert sorted(named) == sorted(here)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_01_gradients_of_tckd_and_nckd(case):
    x = random_batch(*case)
    assert_close(gradients(tckd, x), x.T * x.delta[:, None] * x.m)
    assert_close(gradients(nckd, x), x.T * x.g)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_02_the_angle_between_them_is_c_and_the_sign_of_delta(case):
    x = random_batch(*case)
    of_tckd, of_nckd = gradients(tckd, x), gradients(nckd, x)
    assert_close(dot(of_tckd, of_nckd), x.T**2 * x.delta * x.c)
    if case[0] > 2:  # with two classes NCKD's gradient has no direction
        cosine = dot(of_tckd, of_nckd) / np.linalg.norm(of_tckd, axis=-1) / np.linalg.norm(of_nckd, axis=-1)
        expected = np.sign(x.delta) * x.c / np.sqrt(1 + x.squares) / np.linalg.norm(x.g, axis=-1)
        assert_close(cosine, expected, 1e-8)  # a quotient of what may be small


@pytest.mark.parametrize("case", CASES, ids=str)
def test_03_the_coupling_is_two_squared_distances_and_an_interaction(case):
    x = random_batch(*case)
    distances = x.delta**2 * (1 + x.squares) + dot(x.g, x.g)
    assert_close(values(coupling, x), x.T**2 * (distances - 2 * x.delta * x.c))
    assert_close(values(coupling, x), x.T**2 * (x.delta**2 + dot(x.r, x.r)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_04_gradient_of_the_coupling(case):
    x = random_batch(*case)
    closed = 2 * x.T * ((x.a * x.v)[:, None] * x.m + (1 + x.delta)[:, None] * x.spread_r)
    assert_close(gradients(coupling, x), closed)


def test_05_at_a_given_shape_the_coupling_is_a_parabola_in_p():
    rng = np.random.default_rng(5)
    temperature, shapes, grid = 4.0, 20, np.linspace(0.01, 0.99, 99)
    s, t = (np.repeat(rng.dirichlet(np.full(4, 0.5), shapes), len(grid), axis=0) for _ in range(2))
    p, q = np.tile(grid, shapes), np.repeat(rng.uniform(0.05, 0.95, shapes), len(grid))
    x = split(logits_of(p, s, temperature), logits_of(q, t, temperature), np.zeros(len(p), np.int64), temperature)
    vertex = x.c / (1 + x.squares)
    lowest = dot(x.g, x.g) - x.c**2 / (1 + x.squares)
    assert_close(values(coupling, x), temperature**2 * ((1 + x.squares) * (p - q - vertex) ** 2 + lowest))
    # ∂/∂u: a step of the target's logit by T, the others held.
    of_tckd, of_coupling = (temperature * dot(gradients(function, x), x.target) for function in (tckd, coupling))
    assert_close(of_coupling, 2 * temperature**2 * x.v * (1 + x.squares) * (x.delta - vertex))
    between = (p - q) * (p - q - vertex) < 0
    assert between.any()
    np.testing.assert_array_equal(of_tckd * of_coupling < 0, between)


def test_05_the_vertex_is_between_minus_a_half_and_a_fifth_of_the_teacher():
    # ŝ and t̂ near corners of the simplex as well as inside; the highest is approached by many equal small rests.
    rng = np.random.default_rng(6)
    for concentration in (0.01, 0.1, 1.0):
        s, t = rng.dirichlet(np.full(5, concentration), (2, 2000))
        vertex = dot(t - s, s) / (1 + dot(s, s))
        assert vertex.min() >= -0.5
        assert vertex.max() <= (math.sqrt(2) - 1) / 2
    corner, other = np.eye(5)[:2]
    assert dot(other - corner, corner) / (1 + dot(corner, corner)) == -0.5
    s = np.r_[math.sqrt(2) - 1, np.full(10**6, (2 - math.sqrt(2)) / 10**6)]
    assert (s[0] - dot(s, s)) / (1 + dot(s, s)) == pytest.approx((math.sqrt(2) - 1) / 2, abs=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] > 2], ids=str)
def test_06_among_the_non_targets_it_opposes_nckd_by_a_variance(case):
    x = random_batch(*case)
    z, v, labels = x.logits
    odds = np.log(x.p) - np.log1p(-x.p)

    def with_odds_held(function):
        def at(w):  # the target's logit follows the others, so that its log-odds stay
            rest = jnp.where(x.target > 0, -jnp.inf, w / x.T)
            follows = x.T * (odds + jax.nn.logsumexp(rest, axis=-1))[:, None]
            return function(jnp.where(x.target > 0, follows, w), v, labels, x.T).sum()

        return np.asarray(compiled(jax.grad(at))(z))

    def covariance(a, b):
        return dot(x.s, a * b) - dot(x.s, a) * dot(x.s, b)

    expected = 2 * x.T**2 * (1 + x.delta) * (covariance(x.g, x.g) + x.delta * covariance(x.g, x.s))
    found = dot(with_odds_held(nckd), with_odds_held(coupling))
    assert_close(found, expected)
    assert (covariance(x.g, x.g) >= 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_07_product_with_the_gradient_of_dkd(case):
    x = random_batch(*case)
    towards = (ALPHA * x.delta * (1 + x.squares) + BETA * x.c) * x.a * x.v
    among = (1 + x.delta) * dot(BETA * x.g - ALPHA * x.delta[:, None] * x.s, x.spread_r)
    assert_close(dot(gradients(dkd, x), gradients(coupling, x)), 2 * x.T**2 * (towards + among))


def test_08_with_the_teachers_shape_it_sharpens_above_q_and_flattens_below():
    shape, temperature = np.array([0.7, 0.2, 0.1]), 2.0
    p, q = np.array([0.3, 0.5, 0.7]), np.full(3, 0.5)
    x = split(*(logits_of(one, shape, temperature) for one in (p, q)), np.zeros(3, np.int64), temperature)
    pushed = gradients(coupling, x)  # the direction in which −εG moves the logits
    margin = pushed[:, 0] - pushed[:, 1:].mean(-1)
    # Holding the log-odds: what is left of the non-targets' push after the part along m.
    among = pushed[:, 1:] - pushed[:, [0]] * x.m[:, 1:]
    assert_close(among[1], np.zeros(3))
    for index, sign in ((0, -1), (2, 1)):
        assert np.sign(margin[index]) == sign
        assert np.sign(among[index] @ (shape - shape.mean())) == sign


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_09_the_only_stationary_point_is_the_teachers_solution(classes):
    x = random_batch(classes, 2.0, 1.0, batch=16)
    z, v, labels = x.logits
    same = split(v + np.arange(16.0)[:, None], v, labels, x.T)
    assert np.abs(gradients(coupling, same)).max() < 1e-14
    assert values(coupling, same).max() < 1e-28
    # Descent on G itself from random logits ends there; no other point stops it.
    gap = descend(lambda logits: coupling(logits, v, labels, x.T).sum(), z) - v
    assert np.abs(gap - gap.mean(-1, keepdims=True)).max() < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_10_the_coupling_is_bounded(case):
    x = random_batch(*case)
    bound = 2 * np.maximum(x.q, 1 - x.q) ** 2 if case[0] == 2 else 6 - 6 * x.q + 2 * x.q**2
    assert (values(coupling, x) <= x.T**2 * bound).all()


def test_10_the_bound_is_approached():
    # The teacher is sure of class 1, the student of the target 0 and, among the others, of class 2.
    for logit, classes, bound in ((40.0, 3, 6), (40.0, 2, 2)):
        z, v = np.zeros((2, 1, classes))
        z[0, 0], v[0, 1] = 2 * logit, logit
        if classes > 2:
            z[0, 2] = logit
        assert coupling(z, v, np.zeros(1, np.int64), 1.0)[0] == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_11_its_gradient_is_bounded_and_fades_where_the_student_is_sure(case):
    x = random_batch(*case)
    length = np.linalg.norm(gradients(coupling, x), axis=-1)
    assert length.max() <= x.T * (1.5 * math.sqrt(2) + 6)
    assert np.linalg.norm(gradients(dkd, x), axis=-1).max() <= x.T * math.sqrt(2) * (ALPHA + BETA)
    far = split(60 * x.T * np.argsort(x.logits[0]), *x.logits[1:], x.T)  # every gap between two logits at least 60·T
    assert np.abs(gradients(coupling, far)).max() < 1e-20


@pytest.mark.parametrize("case", CASES, ids=str)
def test_12_the_coupling_is_at_most_the_losses_themselves(case):
    x = random_batch(*case)
    near = split(x.logits[1] + 0.01 * x.logits[0], *x.logits[1:], x.T)  # where both sides go to 0
    for where in (x, near):
        found = values(coupling, where)
        of_targets, of_rest = values(tckd, where), np.maximum(values(nckd, where), 0.0)
        # KL near 0 is a difference of logarithms: 1e-12 is its rounding times T².
        assert (found <= (np.sqrt(of_targets) + np.sqrt(of_rest)) ** 2 + 1e-12).all()
        assert (found <= values(dkd, where) / SAFE + 1e-12).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_13_up_to_epsilon_0_the_teachers_solution_is_the_global_minimum(case):
    x = random_batch(*case)
    without = np.mean(values(dkd, x))
    found = _dgkd(*x.logits, x.T, np.array([0.1, 0.5, SAFE]))
    for epsilon, value in zip((0.1, 0.5, SAFE), found, strict=True):
        assert (1 - epsilon / SAFE) * without - 1e-12 <= value <= without


def test_13_descent_with_the_default_epsilon_ends_at_the_teacher():
    z, v, labels = random_batch(10, 4.0, 1.0, batch=8).logits
    ended = descend(lambda logits: dgkd(logits, v, labels, 4.0, 0.1), z)
    np.testing.assert_allclose(*(special.softmax(logits / 4.0, axis=-1) for logits in (ended, v)), atol=1e-6)


def hessian_parts(q, shape):
    """(αv·mmᵀ + βS, J) of statement 14 at a teacher with `q` at class 0 and `shape` among the others."""
    t = np.r_[0.0, np.asarray(shape, float)]
    m, spread = np.eye(len(t))[0] - t, np.diag(t) - np.outer(t, t)
    targets = q * (1 - q) * np.outer(m, m)
    return ALPHA * targets + BETA * spread, targets - spread


def critical_epsilon(q, shape):
    """ε* of statement 15, from the generalised eigenvalues on the logits that sum to 0."""
    of_dkd, jacobian = hessian_parts(q, shape)
    basis = linalg.null_space(np.ones((1, len(of_dkd))))
    squared = basis.T @ jacobian @ jacobian @ basis
    return 0.5 / linalg.eigh(squared, basis.T @ of_dkd @ basis, eigvals_only=True)[-1]


def random_teachers(sizes):
    """(q, t̂) with each of these numbers of non-target classes."""
    rng = np.random.default_rng(14)
    return [(rng.uniform(0.02, 0.98), rng.dirichlet(np.full(n, 0.7))) for n in sizes]


@pytest.mark.parametrize("n", [1, 4])
def test_14_second_derivatives_at_the_teachers_solution(n):
    hessian = compiled(jax.hessian(lambda z, v, epsilon: dgkd(z[None], v[None], np.array([0]), 3.0, epsilon)))
    for q, shape in random_teachers([n] * 6):
        v = logits_of(q, shape, 3.0)[0]
        of_dkd, jacobian = hessian_parts(q, shape)
        for epsilon in (0.0, 0.7, -2.0):
            assert_close(hessian(v, v, epsilon), of_dkd - 2 * epsilon * jacobian @ jacobian)


def test_15_the_critical_epsilon():
    for q, shape in random_teachers([1, 2, 3, 5, 8] * 10):
        of_dkd, jacobian = hessian_parts(q, shape)
        epsilon = critical_epsilon(q, shape)
        assert epsilon >= SAFE
        for factor, sign in ((0.99, 1), (1.01, -1)):
            curvature = np.linalg.eigvalsh(of_dkd - 2 * factor * epsilon * jacobian @ jacobian)
            curvature = np.delete(curvature, np.argmin(np.abs(curvature)))  # along (1, …, 1) nothing changes
            assert np.sign(curvature.min()) == sign
    for n, q in ((1, 0.3), (2, 0.5), (9, 0.5), (9, 0.999), (99, 0.8)):
        target = ALPHA * n / (2 * (n + 1) * q * (1 - q))
        rest = BETA * n / 2 if n > 1 else math.inf
        assert critical_epsilon(q, np.full(n, 1 / n)) == pytest.approx(min(target, rest), rel=1e-9)


def two_class_slope(odds, q, epsilon):
    """∂DGKD/∂u of two classes at T = 1 by autodiff, at the student's log-odds u = `odds`."""
    v, rest = jnp.log(jnp.array([[q, 1 - q]])), jnp.zeros(1)

    def loss(u):
        return dgkd(jnp.concatenate([u[None], rest])[None], v, np.array([0]), 1.0, epsilon)

    return jax.vmap(jax.grad(loss))(odds)


@pytest.mark.parametrize("q", [0.05, 0.3, 0.5, 0.9])
def test_16_two_classes_are_solved_completely(q):
    u = np.linspace(-8.0, 8.0, 4000)
    p, slope_at = special.expit(u), compiled(two_class_slope)
    assert critical_epsilon(q, [1.0]) == pytest.approx(ALPHA / (4 * q * (1 - q)), rel=1e-12)
    for epsilon in (0.5, 0.99, 1.5, 6.0):
        slope = np.asarray(slope_at(u, q, epsilon))
        # At T = 1 as at any T: T²·δ·(α − 4εv).
        assert_close(slope, (p - q) * (ALPHA - 4 * epsilon * p * (1 - p)))
        crossings = np.flatnonzero(np.diff(np.sign(slope)))
        expected = {q: 1 if epsilon < ALPHA / (4 * q * (1 - q)) else -1}
        if epsilon > ALPHA:
            half = math.sqrt(1 - ALPHA / epsilon) / 2
            inside = 0.5 - half < q < 0.5 + half
            expected[0.5 - half] = 1 if inside or q > 0.5 else -1
            expected[0.5 + half] = 1 if inside or q < 0.5 else -1
        assert len(crossings) == len(expected)
        for index, (where, kind) in zip(crossings, sorted(expected.items()), strict=True):
            assert p[index] == pytest.approx(where, abs=0.002)  # the grid's step in p is at most 0.001
            assert np.sign(slope[index + 1] - slope[index]) == kind  # 1 a minimum, −1 a maximum


@pytest.mark.parametrize("shape", [(4, 3), (16, 10)])
def test_17_literal_is_per_sample_over_batch_squared_times_classes(shape):
    x = random_batch(shape[1], 4.0, 1.0, batch=shape[0])
    literal = losses.gradient_coupling(*x.logits, temperature=x.T, convention="literal")
    assert float(literal) == pytest.approx(np.mean(values(coupling, x)) / (shape[0] ** 2 * shape[1]), rel=1e-12)


def test_18_normalized_is_self_normalized_and_both_descend_a_logarithm():
    batch, classes = 16, 10
    z, v, labels = random_batch(classes, 4.0, 0.1, batch=batch).logits
    kappa = losses.NORMALIZED_GUARD * batch**2 * classes

    @compiled
    @jax.value_and_grad
    def logarithm(logits):
        return jnp.log(coupling(logits, v, labels, 4.0).mean() + kappa)

    for convention in ("normalized", "self_normalized"):
        slope = compiled(jax.value_and_grad(partial(dgkd, convention=convention)))
        (value, found), (alone, of_dkd) = (slope(z, v, labels, 4.0, epsilon, kappa=kappa) for epsilon in (1.0, 0.0))
        mean = values(coupling, split(z, v, labels, 4.0)).mean()
        assert float(alone - value) == pytest.approx(mean / (mean + kappa), rel=1e-12)
        assert_close(of_dkd - found, logarithm(z)[1], 1e-9)  # DKD's gradient, up to 100 times as large, cancels


@pytest.mark.parametrize("kappa", [1e-3, 1.0])
def test_19_with_a_guard_the_critical_epsilon_is_kappa_times_as_large(kappa):
    labels = np.array([0])

    # What the guard descends; the loss's own value hides it behind a stop_gradient.
    def effective(z, v, epsilon):
        inputs = (z[None], v[None], labels, 2.0)
        return (dkd(*inputs) - epsilon * jnp.log1p(coupling(*inputs) / kappa))[0]

    hessian, value = compiled(jax.hessian(effective)), compiled(jax.vmap(effective, (0, None, None)))
    for q, shape in random_teachers([4] * 6):
        v = logits_of(q, shape, 2.0)[0]
        critical = kappa * critical_epsilon(q, shape)
        for factor, sign in ((0.99, 1), (1.01, -1)):
            curvature = np.linalg.eigvalsh(hessian(v, v, factor * critical))
            curvature = np.delete(curvature, np.argmin(np.abs(curvature)))  # along (1, …, 1) nothing changes
            assert np.sign(curvature.min()) == sign
        away = v + np.random.default_rng(0).standard_normal((200, 5)) * np.geomspace(0.01, 10, 200)[:, None]
        assert (np.asarray(value(away, v, kappa * SAFE)) >= 0).all()  # the teacher's solution, 0, is the lowest


def test_20_above_it_the_student_stops_where_dkd_is_about_epsilon():
    # Two classes, q = 1/2: where δ² = k/4/(1 + k), k = 2ε/(αT²), the gradients cancel, for a negligible κ.
    slope = compiled(jax.grad(partial(dgkd, convention="self_normalized", kappa=1e-30)))
    for epsilon, temperature in ((6.0, 4.0), (0.5, 1.0), (1e-5, 1.0)):
        k = 2 * epsilon / (ALPHA * temperature**2)
        p = 0.5 + math.sqrt(k / (4 * (1 + k)))
        x = split(*(logits_of(one, [1.0], temperature) for one in (p, 0.5)), np.array([0]), temperature)
        assert np.abs(slope(*x.logits, temperature, epsilon)).max() < 1e-12 * max(epsilon, 1e-3)
        if epsilon == 1e-5:
            assert values(dkd, x)[0] == pytest.approx(epsilon, rel=1e-4)
        if epsilon == 6.0:
            assert p == pytest.approx(0.83, abs=0.005)


def test_20_in_general_for_a_small_epsilon():
    z, v, labels = random_batch(5, 1.0, 1.0, batch=1).logits
    epsilon, inputs = 1e-4, (v, labels, 1.0)
    found = descend(lambda x: (dkd(x, *inputs) - epsilon * jnp.log(coupling(x, *inputs) + 1e-12)).sum(), z)
    # DKD and G are quadratic at the teacher up to terms of the third order, which are √ε times smaller.
    assert values(dkd, split(found, v, labels, 1.0))[0] == pytest.approx(epsilon, rel=0.02)


def test_21_epsilon_of_per_sample_is_a_pure_number():
    x = random_batch(10, 1.0, 2.0)
    z, v, labels = x.logits
    for temperature in (2.0, 4.0, 20.0):
        hot = split(temperature * z, temperature * v, labels, temperature)
        for function in (coupling, dkd):
            assert_close(values(function, hot), temperature**2 * values(function, x))


def test_22_claim_1_student_06_teacher_08_and_the_reverse():
    labels = np.zeros(2, np.int64)
    z, v = logits_of([0.6, 0.8], [1.0], 1.0), logits_of([0.8, 0.6], [1.0], 1.0)
    x = split(z, v, labels, 1.0)
    value = values(tckd, x)
    np.testing.assert_allclose(value, [0.0915, 0.1046], atol=1e-4)
    assert value[1] / value[0] > 1.1  # the loss is not the same …
    lengths = np.linalg.norm(gradients(tckd, x), axis=-1)
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-12)  # … but its gradient's length is
    of_two = values(coupling, x)
    assert of_two[0] == pytest.approx(of_two[1], rel=1e-12)  # and so is the coupling, which was to tell them apart
    same_shape = split(*(logits_of(one, [0.7, 0.2, 0.1], 1.0) for one in ([0.6, 0.8], [0.8, 0.6])), labels, 1.0)
    of_four = values(coupling, same_shape)
    assert of_four[0] == pytest.approx(of_four[1], rel=1e-12)


def test_23_claim_2_larger_where_the_student_is_right_and_the_teacher_wrong():
    rng = np.random.default_rng(23)
    count, labels = 2000, np.zeros(2000, np.int64)
    shapes = [rng.dirichlet(np.full(9, 0.5), count) for _ in range(2)]

    def at(p, q, s, t):
        z, v = (np.log(np.c_[np.full(count, x), (1 - x) * shape]) for x, shape in ((p, s), (q, t)))
        return split(z, v, labels, 1.0)

    right = at(0.9, 0.1, *shapes)  # the student is right
    wrong = at(0.1, 0.9, *shapes[::-1])  # the same two networks with their roles exchanged
    difference = values(coupling, right) - values(coupling, wrong)
    student, teacher = (dot(shape, shape) for shape in shapes)
    assert_close(difference, 2 * 0.8 * dot(right.g, right.g) + 0.8**2 * (student - teacher))
    assert 0.95 < np.mean(difference > 0) < 1.0  # mostly true, not always
    # The push on the target's log-odds goes away from the teacher on both sides: up where the student is right, down
    # where it is wrong, so that there it stays wrong.
    assert (gradients(coupling, right)[:, 0] > 0).all()
    assert (gradients(coupling, wrong)[:, 0] < 0).all()


def test_24_claim_3_the_push_at_a_collapsed_configuration():
    n, temperature, labels = 9, 2.0, np.zeros(3, np.int64)
    p, q = np.array([0.8, 0.9, 0.95]), np.full(3, 0.9)
    uniform = np.full(n, 1 / n)
    both = split(*(logits_of(one, uniform, temperature) for one in (p, q)), labels, temperature)
    pushed = gradients(coupling, both)
    assert np.abs(pushed[:, 1:] - pushed[:, 1:].mean(-1, keepdims=True)).max() < 1e-14  # stays collapsed …
    assert np.sign(np.round(pushed[:, 0], 12)).tolist() == [-1, 0, 1]  # … with a smaller margin below the teacher's

    shape = np.random.default_rng(24).dirichlet(np.ones(n))  # a teacher that tells the wrong classes apart
    x = split(logits_of(p, uniform, temperature), logits_of(q, shape, temperature), labels, temperature)
    pull, push = -gradients(nckd, x)[:, 1:], gradients(coupling, x)[:, 1:]
    push -= push.mean(-1, keepdims=True)  # the margin's part is the same for every wrong class
    assert_close(pull, np.tile(temperature * (shape - uniform), (3, 1)))
    assert_close(push, -2 * (1 + x.delta[:, None]) / n * pull)
