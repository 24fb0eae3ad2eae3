"""Statements 1 to 13 of docs/derivation.md, one test each, in its order; autodiff is the oracle."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivation.algebra import (
    ALPHA,
    BETA,
    SAFE,
    Closed,
    assert_close,
    compiled,
    coupling,
    descend,
    dgkd,
    dkd,
    dot,
    gradients,
    logits_of,
    nckd,
    random_batch,
    several_epsilons,
    split,
    tckd,
    values,
)
from derivation.search import largest, pair, ratio
from scipy import optimize, special

DOCUMENT = Path(__file__).parents[2] / "docs" / "derivation.md"
CASES = [(classes, temperature, scale) for classes in (2, 3, 10) for temperature in (1.0, 4.0) for scale in (1.0, 5.0)]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_every_statement_names_a_test_that_exists():
    named = re.findall(r"`(test_\d\d_\w+)`", DOCUMENT.read_text())
    files = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    here = re.findall(r"^def (test_\d\d_\w+)", "\n".join(files), re.MULTILINE)
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
    def vertex(points):
        x = pair(points)
        return x.c / (1 + x.squares)

    for classes in (3, 8):
        assert largest(vertex, 2 * classes)[0] <= (math.sqrt(2) - 1) / 2
        lowest = largest(lambda points: -vertex(points), 2 * classes)[0]
        assert 0.499 < lowest <= 0.5
    # The highest is approached by many equal small rests.
    s = np.r_[math.sqrt(2) - 1, np.full(10**6, (2 - math.sqrt(2)) / 10**6)]
    assert (s[0] - dot(s, s)) / (1 + dot(s, s)) == pytest.approx((math.sqrt(2) - 1) / 2, abs=1e-6)


def log_odds_motion(x):
    """du/dt·T² of ż = ∇G, by statement 5."""
    return 2 * x.T**2 * (x.a * x.v * (1 + x.squares) - (1 + x.delta) * dot(x.s, x.spread_r))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_05_the_true_motion_of_p_has_another_term(case):
    x = random_batch(*case)
    assert_close(x.T * dot(x.m, gradients(coupling, x)), log_odds_motion(x))


def test_05_with_it_p_may_move_towards_the_vertex():
    share = {}
    for classes, scale in ((3, 1.0), (10, 1.0), (10, 3.0), (100, 5.0)):
        x = random_batch(classes, 1.0, scale, batch=20_000)
        share[classes, scale] = np.mean(log_odds_motion(x) * (x.delta - x.c / (1 + x.squares)) < 0)
    assert list(share.values()) == pytest.approx([0.12, 0.44, 0.66, 0.96], abs=0.02)


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


def near(classes, scale, step, *, batch=20_000):
    rng = np.random.default_rng([7, classes])
    v = scale * rng.standard_normal((batch, classes))
    return split(v + step * rng.standard_normal(v.shape), v, np.zeros(batch, np.int64), 1.0)


@pytest.mark.slow
def test_07_near_the_teacher_it_opposes_dkd_in_almost_all_cases():
    for classes, at_least in ((3, 0.97), (10, 0.99), (100, 0.999)):
        for scale in (1.0, 3.0, 5.0):
            x = near(classes, scale, 0.1)
            opposed = np.mean(dot(Closed.dkd_gradient(x), Closed.coupling_gradient(x)) > 0)
            assert opposed > at_least
    x = near(3, 3.0, 0.1)  # almost, not always
    assert (dot(Closed.dkd_gradient(x), Closed.coupling_gradient(x)) < 0).any()


def test_07_near_the_teacher_it_moves_the_logits_outwards_always():
    def departure(points, step=1e-3):
        v, away = np.split(points, 2, axis=-1)
        v, away = 5 * np.tanh(v / 5), away - away.mean(-1, keepdims=True)
        away = step * away / np.maximum(np.abs(away).max(-1, keepdims=True), 1e-9)
        x = split(v + away, v, np.zeros(len(v), np.int64), 1.0)
        return np.abs(
            ratio(
                dot(away, Closed.coupling_gradient(x)) - 2 * Closed.coupling(x), 2 * Closed.coupling(x), at_least=1e-20
            )
        )

    for classes in (3, 6):
        assert largest(departure, 2 * classes)[0] < 0.01  # ⟨z − v, ∇G⟩ = 2G to the order of the step


def at_the_teachers_shape(points):
    """p, q and one shape of both networks."""
    p, q = special.expit(points[:, 0]), special.expit(points[:, 1])
    shape = special.softmax(points[:, 2:], axis=-1)
    return split(logits_of(p, shape, 1.0), logits_of(q, shape, 1.0), np.zeros(len(p), np.int64), 1.0)


def sharpening(x):
    """d‖ŝ‖²/dt·T² of ż = ∇G: 2ŝᵀS∇G·T."""
    g = Closed.coupling_gradient(x)
    return 2 * x.T * dot(x.s**2, g - dot(x.s, g)[:, None])


def test_08_with_the_teachers_shape_p_or_the_shape_moves_away():
    def nearer(points):
        x = at_the_teachers_shape(points)
        away, sharper = ratio(log_odds_motion(x), 2 * x.delta), ratio(sharpening(x), 4 * x.delta)
        return -np.maximum(away, sharper)

    for n in (2, 3, 9):
        assert largest(nearer, 2 + n)[0] <= 1e-9


def test_08_either_alone_may_move_back():
    # p further from q is false: the teacher's shape (.7, .3), q = .9, p = .99.
    x = split(*(logits_of(one, [0.7, 0.3], 1.0) for one in (0.99, 0.9)), np.zeros(1, np.int64), 1.0)
    assert log_odds_motion(x)[0] < 0
    spread = x.s * (x.s - x.squares[:, None])  # S·ŝ
    expected = x.v * (1 + x.squares) ** 2 - (1 + x.delta) * dot(x.s, spread)
    assert_close(log_odds_motion(x), 2 * x.delta * expected)

    def of_uniform_shapes(points):  # where it is true
        x = at_the_teachers_shape(np.c_[points, np.zeros((len(points), 4))])
        return -ratio(log_odds_motion(x), x.delta)

    assert largest(of_uniform_shapes, 2)[0] <= 1e-9
    # Sharper where p > q is false as well: many almost equal non-targets and p near a half.
    x = split(
        *(logits_of(one, special.softmax(np.linspace(0, 0.5, 9)), 1.0) for one in (0.6, 0.5)),
        np.zeros(1, np.int64),
        1.0,
    )
    spread = x.s * (x.s - x.squares[:, None])
    expected = (1 + x.delta) * dot(spread, spread) - x.v * (1 + x.squares) * dot(x.s, spread)
    assert sharpening(x)[0] < 0
    assert_close(sharpening(x), 4 * x.delta * expected)
    assert dot(spread, x.spread_r)[0] > 0  # with the log-odds held it is true


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_09_the_only_stationary_point_is_the_teachers_solution(classes):
    x = random_batch(classes, 2.0, 1.0)
    z, v, labels = x.logits
    same = split(v + np.arange(256.0)[:, None], v, labels, x.T)
    assert np.abs(gradients(coupling, same)).max() < 1e-13
    assert values(coupling, same).max() < 1e-26

    # Descent on G itself from random logits ends there; no other point stops it.
    def of_all(flat):
        x = split(flat.reshape(z[:16].shape), v[:16], labels[:16], 2.0)
        return Closed.coupling(x).sum(), Closed.coupling_gradient(x).ravel()

    ended = optimize.minimize(of_all, z[:16].ravel(), jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-12}).x
    gap = ended.reshape(z[:16].shape) - v[:16]
    assert np.abs(gap - gap.mean(-1, keepdims=True)).max() < 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_10_the_coupling_is_bounded(case):
    x = random_batch(*case)
    bound = 2 * np.maximum(x.q, 1 - x.q) ** 2 if case[0] == 2 else 6 - 6 * x.q + 2 * x.q**2
    assert (values(coupling, x) <= x.T**2 * bound).all()


def test_10_a_search_approaches_the_bounds_and_passes_none():
    def share(points):
        x = pair(points)
        return Closed.coupling(x) / (
            2 * np.maximum(x.q, x.q_rest) ** 2 if x.s.shape[1] == 2 else 6 - 6 * x.q + 2 * x.q**2
        )

    for classes in (2, 3, 5):
        assert 0.999 < largest(share, 2 * classes)[0] <= 1 + 1e-12


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_11_its_gradient_is_bounded_and_fades_where_the_student_is_sure(classes):
    def length(points):
        return np.linalg.norm(Closed.coupling_gradient(pair(points)), axis=-1)

    def of_fading(points):
        x = pair(points)
        return ratio(length(points), 6 * math.sqrt(2) * x.v + 24 * (1 - x.s.max(-1)), at_least=1e-10)

    assert largest(length, 2 * classes)[0] <= 1.5 * math.sqrt(2) + 6
    assert largest(of_fading, 2 * classes)[0] <= 1
    x = random_batch(classes, 4.0, 5.0)
    assert np.linalg.norm(gradients(dkd, x), axis=-1).max() <= x.T * math.sqrt(2) * (ALPHA + BETA)
    far = split(60 * x.T * np.argsort(x.logits[0]), *x.logits[1:], x.T)  # every gap between two logits at least 60·T
    assert np.abs(gradients(coupling, far)).max() < 1e-20


def test_11_a_student_sure_of_the_target_alone_still_feels_it():
    x = split(
        *(logits_of(p, shape, 1.0) for p, shape in ((1 - 1e-9, [0.5, 0.5]), (0.5, [1 - 1e-12, 1e-12]))),
        np.zeros(1, np.int64),
        1.0,
    )
    assert np.linalg.norm(gradients(coupling, x)) == pytest.approx(1.06, abs=0.001)


def coupling_over(alpha, beta):
    """G / (α·TCKD + β·NCKD) of each point."""

    def at(points):
        x = pair(points)
        return ratio(Closed.coupling(x), alpha * Closed.tckd(x) + beta * Closed.nckd(x))

    return at


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_12_the_coupling_is_at_most_the_losses_with_either_doubled(classes):
    for alpha, beta in ((1.0, 2.0), (2.0, 1.0)):
        found, where = largest(coupling_over(alpha, beta), 2 * classes)
        assert found <= 1 + 1e-6  # the rounding of a quotient of 1e-7
        if classes > 2 or alpha == 1.0:
            assert found > 0.999
        x = pair(np.tile(where, (256, 1)))  # the library's own functions at the worst point
        assert values(coupling, x)[0] <= (alpha * values(tckd, x)[0] + beta * values(nckd, x)[0]) * (1 + 1e-6)


def test_12_not_by_the_losses_with_neither_doubled():
    found, where = largest(coupling_over(1.0, 1.0), 6)
    assert found == pytest.approx(1.1044, abs=1e-4)
    x = pair(np.tile(where, (256, 1)))
    assert values(coupling, x)[0] > 1.1 * (values(tckd, x)[0] + values(nckd, x)[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_13_up_to_epsilon_0_the_teachers_solution_is_the_global_minimum(case):
    x = random_batch(*case)
    without = np.mean(values(dkd, x))
    found = several_epsilons(*x.logits, x.T, np.array([0.1, 0.5, SAFE]))
    for epsilon, value in zip((0.1, 0.5, SAFE), found, strict=True):
        assert (1 - epsilon / SAFE) * without - 1e-12 <= value <= without


@pytest.mark.parametrize(
    ("alpha", "beta", "sharp"),
    [
        (1, 8, 1),
        (1, 6, 1),
        (1, 2, 1),
        (1, 1.2, 1),
        (1, 1, 0.9055),
        (1, 0.8, 0.7783),
        (1, 0.6, 0.6),
        (1, 0.5, 0.5),
        (3, 1, 1),
    ],
)
def test_13_the_threshold_is_sharp_where_one_weight_is_twice_the_other(alpha, beta, sharp):
    proved = min(alpha, beta, (alpha + beta) / 3)
    found = 1 / largest(coupling_over(alpha, beta), 6)[0]  # three classes: more never gave more
    assert proved - 1e-6 <= found
    assert found == pytest.approx(sharp, rel=1e-3)
    if max(alpha, beta) >= 2 * min(alpha, beta):
        assert proved == sharp == min(alpha, beta)


def test_13_descent_with_the_default_epsilon_ends_at_the_teacher():
    z, v, labels = random_batch(10, 4.0, 1.0, batch=8).logits
    ended = descend(lambda logits: dgkd(logits, v, labels, 4.0, 0.1), z)
    np.testing.assert_allclose(*(special.softmax(logits / 4.0, axis=-1) for logits in (ended, v)), atol=1e-6)
