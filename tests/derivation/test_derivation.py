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
from scipy import special

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
    found = several_epsilons(*x.logits, x.T, np.array([0.1, 0.5, SAFE]))
    for epsilon, value in zip((0.1, 0.5, SAFE), found, strict=True):
        assert (1 - epsilon / SAFE) * without - 1e-12 <= value <= without


def test_13_descent_with_the_default_epsilon_ends_at_the_teacher():
    z, v, labels = random_batch(10, 4.0, 1.0, batch=8).logits
    ended = descend(lambda logits: dgkd(logits, v, labels, 4.0, 0.1), z)
    np.testing.assert_allclose(*(special.softmax(logits / 4.0, axis=-1) for logits in (ended, v)), atol=1e-6)
