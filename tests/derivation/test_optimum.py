"""Statements 14 to 24 of docs/derivation.md: the optimum, the conventions and the blog's claims."""

import itertools
import math
from functools import partial

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
    hessian_parts,
    logits_of,
    nckd,
    random_batch,
    random_teachers,
    split,
    values,
)
from derivation.search import largest, pair
from scipy import linalg, special

from dgkd_jax import losses


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def critical_epsilon(q, shape):
    """ε* of statement 15, from the generalised eigenvalues on the logits that sum to 0."""
    of_dkd, jacobian = hessian_parts(q, shape)
    basis = linalg.null_space(np.ones((1, len(of_dkd))))
    squared = basis.T @ jacobian @ jacobian @ basis
    return 0.5 / linalg.eigh(squared, basis.T @ of_dkd @ basis, eigvals_only=True)[-1]


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
        for factor, sign in ((0.99, 1), (1.01, -1)):
            curvature = np.linalg.eigvalsh(of_dkd - 2 * factor * epsilon * jacobian @ jacobian)
            curvature = np.delete(curvature, np.argmin(np.abs(curvature)))  # along (1, …, 1) nothing changes
            assert np.sign(curvature.min()) == sign
    for n, q in ((1, 0.3), (2, 0.5), (9, 0.5), (9, 0.999), (99, 0.8)):
        target = ALPHA * n / (2 * (n + 1) * q * (1 - q))
        rest = BETA * n / 2 if n > 1 else math.inf
        assert critical_epsilon(q, np.full(n, 1 / n)) == pytest.approx(min(target, rest), rel=1e-9)


def spread_of(shape):
    """The largest eigenvalue of S, and ‖t̂‖²."""
    return np.linalg.eigvalsh(np.diag(shape) - np.outer(shape, shape))[-1], shape @ shape


@pytest.mark.parametrize("n", [2, 4])
def test_15_its_bounds_hold_for_every_teacher(n):
    def of_bounds(points):
        """How far ε* falls short of its lower bound, and passes its upper ones; relative, the larger of both."""
        worst = []
        for odds, *logits in np.clip(points, -8, 8):
            q, shape = special.expit(odds), special.softmax(logits)
            epsilon, (spread, squares) = critical_epsilon(q, shape), spread_of(shape)
            upper = min(ALPHA / (2 * q * (1 - q) * (1 + squares)), BETA / (2 * spread))
            assert BETA / (2 * spread) <= BETA * (n - 1) / (2 * (1 - squares)) * (1 + 1e-9)
            worst.append(max(min(ALPHA, BETA) / epsilon, epsilon / upper))
        return np.array(worst)

    assert largest(of_bounds, 1 + n, draws=300, polish=2)[0] <= 1 + 1e-6
    # The lower bound is reached: q = 1/2 and a shape that is all but a vertex.
    assert critical_epsilon(0.5, np.r_[1 - 1e-7, np.full(n - 1, 1e-7 / (n - 1))]) == pytest.approx(ALPHA, rel=1e-4)


def test_15_with_two_confusions_the_share_of_nckd_does_not_fade_with_the_classes():
    uniform, confused = np.full(99, 1 / 99), np.r_[0.45, 0.45, np.full(97, 0.1 / 97)]
    share = [2 * 0.1 * spread_of(shape)[0] / BETA for shape in (uniform, confused)]
    assert share == pytest.approx([0.00025, 0.01125], rel=0.02)


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
    literal = compiled(partial(losses.gradient_coupling, convention="literal"))(*x.logits, temperature=x.T)
    assert float(literal) == pytest.approx(np.mean(Closed.coupling(x)) / (shape[0] ** 2 * shape[1]), rel=1e-12)


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_19_a_search_finds_nothing_below_the_teachers_solution():
    kappa = 1e-3

    def below(points):
        x = pair(points)
        return kappa * SAFE * np.log1p(Closed.coupling(x) / kappa) - ALPHA * Closed.tckd(x) - BETA * Closed.nckd(x)

    assert largest(below, 6)[0] <= 1e-12


def test_19_at_the_repositorys_epsilon_only_a_teacher_that_is_sure_twice_is_a_minimum():
    kappa, n = losses.NORMALIZED_GUARD * 64**2 * 100, 99
    # q → 1 alone does not help: uniform non-targets.
    assert kappa * critical_epsilon(1 - 1e-5, np.full(n, 1 / n)) == pytest.approx(1.62, abs=0.005)

    minima = 0
    for odds, sure in itertools.product((0.0, 4.0, 8.0, 12.0), (0.0, 6.0, 10.0, 14.0)):
        q, shape = special.expit(odds), special.softmax(np.r_[sure, np.zeros(n - 1)])
        if kappa * critical_epsilon(q, shape) > 6:
            assert q * (1 - q) * (1 + shape @ shape) < 0.00035  # what a minimum requires, by the bounds of statement 15
            assert shape @ shape > 0.73
            minima += 1
    assert minima > 0


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


def student_06_teacher_08_and_the_reverse(temperature, shape):
    """With these probabilities at T = 1, read at `temperature`."""
    z, v = logits_of([0.6, 0.8], shape, 1.0), logits_of([0.8, 0.6], shape, 1.0)
    return split(z, v, np.zeros(2, np.int64), temperature)


@pytest.mark.parametrize(("temperature", "apart"), [(1.0, 0.1435), (4.0, 0.0091)])
def test_22_claim_1_student_06_teacher_08_and_the_reverse(temperature, apart):
    x = student_06_teacher_08_and_the_reverse(temperature, [1.0])
    without = Closed.tckd(x)
    if temperature == 1:
        np.testing.assert_allclose(without, [0.0915, 0.1046], atol=1e-4)
    assert without[1] / without[0] - 1 == pytest.approx(apart, abs=1e-4)  # DKD alone: nearly the same at T = 4
    for epsilon in (-0.5, 0.1, 0.5):
        with_coupling = without - epsilon * Closed.coupling(x)
        # The coupling takes the same from both: it makes nothing more equal.
        assert with_coupling[1] - with_coupling[0] == pytest.approx(without[1] - without[0], rel=1e-9)


def test_22_the_coupling_is_symmetric_where_the_shapes_agree():
    for shape in ([1.0], [0.7, 0.2, 0.1]):
        x = student_06_teacher_08_and_the_reverse(1.0, shape)  # at T = 1, so that the shapes stay equal
        of_two = Closed.coupling(x)
        assert of_two[0] == pytest.approx(of_two[1], rel=1e-12)
        lengths = np.linalg.norm(x.delta[:, None] * x.m, axis=-1)  # of TCKD's gradient, over T
        assert lengths[0] == pytest.approx(lengths[1], rel=1e-12)


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


def test_23_the_targets_logit_is_pushed_away_its_probability_not_always():
    def exceptions(sign):
        """−(the push on z_y, and on the log-odds) where student and teacher are .9, .1, or .1, .9 for `sign` −1."""

        def of(points):
            shapes = special.softmax(points[:, :4], axis=-1), special.softmax(points[:, 4:], axis=-1)
            p, q = np.full((2, len(points)), [[0.9], [0.1]])[::sign]
            x = split(
                *(logits_of(one, s, 1.0) for one, s in zip((p, q), shapes, strict=True)), np.zeros(len(p), int), 1.0
            )
            g = Closed.coupling_gradient(x)
            return np.stack([-sign * g[:, 0], -sign * dot(x.m, g)])

        return of

    for sign in (1, -1):
        assert largest(lambda points, sign=sign: exceptions(sign)(points)[0], 8)[0] < 0  # up if right, down if wrong
    # A student that is wrong stays wrong; one that is right may yet lose probability, through the other logits.
    assert largest(lambda points: exceptions(-1)(points)[1], 8)[0] < 0
    assert largest(lambda points: exceptions(1)(points)[1], 8)[0] > 0.1


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
