"""The one pass that DGKD trains with: equal to autodiff of the plain formulas, small, and differentiable again."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import batches
from losses.batches import compiled

from dgkd_jax import losses
from dgkd_jax.losses import fused
from dgkd_jax.losses.softmax_pair import row_sums
from dgkd_jax.losses.target_split import target_mask

WEIGHTS = {"alpha": 0.7, "beta": 3.0, "epsilon": 0.4}
TEMPERATURE = 2.0
FIRST = np.array([[True, False, False]])  # the target of one sample with three classes


random_batch = partial(batches.random_batch, dtype="float32", scale=3.0)


def plain(student, teacher, labels, *, alpha, beta, epsilon, temperature=TEMPERATURE, **options):
    """DGKD of its separate parts, each in the form that autodiff differentiates."""
    inputs = (student, teacher, labels)
    gradients = [g(*inputs, temperature=temperature) for g in (losses.tckd_gradient, losses.nckd_gradient)]
    dkd = losses.dkd(*inputs, alpha=alpha, beta=beta, temperature=temperature)
    return jnp.mean(dkd) - epsilon * losses.coupling_of_gradients(*gradients, **options)


def in_one_pass(*batch, **options):
    return losses.dgkd(*batch, temperature=TEMPERATURE, **WEIGHTS, **options)


def both(batch, **options):
    """(value, gradient) of the pass and of the plain formulas."""
    pair = (partial(in_one_pass, **options), partial(plain, **WEIGHTS, **options))
    return compiled(lambda *batch: [jax.value_and_grad(loss)(*batch) for loss in pair])(*batch)


def assert_close(ours, oracle, tolerance):
    """Relative to the largest entry: a gradient's small entries are differences of large ones."""
    np.testing.assert_allclose(ours[0], oracle[0], rtol=tolerance)
    np.testing.assert_allclose(ours[1], oracle[1], rtol=0, atol=tolerance * np.abs(oracle[1]).max())


# The conventions differ in one number for the whole batch, so that one of them goes through all sizes.
@pytest.mark.slow
@pytest.mark.parametrize("convention", losses.CONVENTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
def test_value_and_gradient_are_those_of_the_plain_formulas(convention, dtype, tolerance):
    sizes = [(7, 2), (16, 10)] + [(5, 3), (32, 100), (8, 1000)] * (convention == "per_sample")
    with jax.enable_x64(dtype == "float64"):
        for rows, classes in sizes:
            ours, oracle = both(random_batch(rows, classes, dtype=dtype), convention=convention, kappa=0.3)
            assert ours[1].dtype == dtype
            assert_close(ours, oracle, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.01, 6.0, 30.0])
def test_value_and_gradient_are_those_of_the_plain_formulas_near_and_far_from_the_teacher(scale):
    with jax.enable_x64(True):
        for classes in (3, 10):
            batch = random_batch(64, classes, dtype="float64", scale=scale)
            assert_close(*both(batch, convention="per_sample"), 1e-12)


@pytest.mark.slow
def test_a_class_that_both_are_sure_of_does_not_cancel():
    """Non-target shares of 1 − 2e-9 and 1 − 3e-9, p = q: what is left of the coupling is seen to 1e-6 in float64."""
    with jax.enable_x64(True):
        student, teacher = np.array([[0.0, 20.0, 0.0]]), np.array([[0.0, 20.0, 0.4]])
        both_sides = np.array([student, teacher])
        both_sides[:, :, 0] = np.log(np.exp(both_sides[:, :, 1:]).sum(-1))  # log-odds 0
        _, _, squares = fused.terms(*both_sides, FIRST, 1.0)
    # t̂ − ŝ of the small class by its logistic function; the large class has minus that.
    small = 1 / (1 + np.exp(20.0 - 0.4)) - 1 / (1 + np.exp(20.0))
    np.testing.assert_allclose(squares, 2 * small**2, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_a_class_that_both_are_sure_of_keeps_all_digits_where_the_target_plays_no_part(dtype, tolerance):
    """The same shares at p = q = 0. Of 1 − 2e-9 less 1 − 3e-9, float32 would leave 0 and float64 half of its digits."""
    with jax.enable_x64(dtype == "float64"):
        student, teacher = np.array([[[-1e4, 20.0, 0.0]], [[-1e4, 20.0, 0.4]]], dtype)
        (_, _, squares), pull_back = jax.vjp(lambda z: fused.terms(z, teacher, FIRST, 1.0), student)
        zero = np.zeros(1, dtype)
        (of_nontarget,) = pull_back((zero, np.ones(1, dtype), zero))
    # exp(−20) of a float32 logit is exact to a few units in the last place of float32.
    small = 1 / (1 + np.exp(20.0)) - 1 / (1 + np.exp(20.0 - np.float64(np.dtype(dtype).type(0.4))))
    np.testing.assert_allclose(squares, [2 * small**2], rtol=tolerance)
    np.testing.assert_allclose(of_nontarget, [[0.0, -small, small]], rtol=tolerance)


def test_rows_are_summed_in_one_stage_on_a_tpu_and_in_two_elsewhere():
    """Two stages of 362, and the 87 classes that are left over."""
    traced = jax.jit(lambda x: row_sums(x)[0]).trace(jax.ShapeDtypeStruct((4, 131072), "float32"))
    sums = {on: traced.lower(lowering_platforms=(on,)).as_text().count("reduce(") for on in ("tpu", "cpu", "cuda")}
    assert sums == {"tpu": 1, "cpu": 3, "cuda": 3}


@pytest.mark.slow
def test_a_vocabulary_of_131072_classes():
    batch = random_batch(4, 131072)
    (value, gradient), _ = both(batch, convention="per_sample")
    with jax.enable_x64(True):
        _, oracle = both((*(x.astype("float64") for x in batch[:2]), batch[2]), convention="per_sample")
    # Against float64, since the plain sums in float32 are themselves no better than this.
    assert_close((value, gradient), oracle, 2e-6)


def test_three_arrays_of_the_logits_size_are_live_at_most():
    rows, classes = 256, 1000
    batch = random_batch(rows, classes)
    compiled = jax.jit(jax.value_and_grad(partial(in_one_pass, convention="per_sample"))).lower(*batch).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    first_stages = 8 * 33 * rows * 4  # of eight sums, √classes numbers per row each
    assert temporary <= 3 * rows * classes * 4 + first_stages


@pytest.mark.slow
@pytest.mark.parametrize("outer", [jax.jacrev, jax.jacfwd])
@pytest.mark.parametrize("scale", [1.0, 6.0])  # at 6, a class has most of both in some rows
def test_second_derivatives_are_those_of_the_plain_formulas(outer, scale):
    with jax.enable_x64(True):
        student, teacher, labels = random_batch(12, 3, dtype="float64", scale=scale)
        option = {"convention": "per_sample"}
        ours, oracle = (
            compiled(outer(jax.grad(partial(loss, **option))))(student, teacher, labels)
            for loss in (in_one_pass, partial(plain, **WEIGHTS))
        )
    np.testing.assert_allclose(ours, oracle, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_forward_mode_is_refused_by_name():
    student, teacher, labels = random_batch(3, 4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda z: in_one_pass(z, teacher, labels, convention="per_sample"), (student,), (student,))


@pytest.mark.slow
def test_the_temperature_can_be_differentiated():
    with jax.enable_x64(True):
        batch = random_batch(6, 5, dtype="float64")

        def loss(temperature):
            return losses.dgkd(*batch, temperature=temperature, convention="per_sample", **WEIGHTS)

        step = 1e-6
        above, below = compiled(lambda: (loss(TEMPERATURE + step), loss(TEMPERATURE - step)))()
        slope = (above - below) / (2 * step)
        # The central difference is off by step² and by the loss's rounding over the step, 1e-10.
        np.testing.assert_allclose(compiled(jax.grad(loss))(TEMPERATURE), slope, rtol=1e-7)


def test_the_teacher_gets_no_gradient():
    student, teacher, labels = random_batch(3, 4)
    gradient = jax.grad(in_one_pass, argnums=1)(student, teacher, labels, convention="per_sample")
    assert not np.any(gradient)


def test_the_teacher_gets_no_gradient_of_a_gradient():
    student, teacher, labels = random_batch(3, 4)

    is_target = target_mask(labels, student)

    def slope(teacher):
        gradient = jax.grad(lambda z: sum(map(jnp.sum, fused.terms(z, teacher, is_target, 1.0))))(student)
        return jnp.sum(jnp.sin(gradient))

    assert not np.any(jax.grad(slope)(teacher))


@pytest.mark.slow
def test_logits_of_two_precisions_are_computed_in_the_higher_and_each_gradient_in_its_own():
    with jax.enable_x64(True):
        student, teacher, labels = random_batch(6, 5, dtype="float64")
        student = student.astype("float32")
        value, gradient = jax.value_and_grad(in_one_pass)(student, teacher, labels, convention="per_sample")
        exact = in_one_pass(student.astype("float64"), teacher, labels, convention="per_sample")
    assert (value.dtype, gradient.dtype) == ("float64", "float32")
    np.testing.assert_allclose(value, exact, rtol=1e-14)


def test_the_terms_are_the_losses_and_the_coupling():
    with jax.enable_x64(True):
        batch = random_batch(6, 5, dtype="float64")
        at = {"temperature": TEMPERATURE}
        gradients = [g(*batch, **at) for g in (losses.tckd_gradient, losses.nckd_gradient)]
        for convention, distance in itertools.product(losses.CONVENTIONS, losses.DISTANCES):
            terms = losses.dgkd_terms(*batch, **at, convention=convention, distance=distance)
            np.testing.assert_allclose(terms.tckd, losses.tckd(*batch, **at), rtol=1e-12)
            np.testing.assert_allclose(terms.nckd, losses.nckd(*batch, **at), rtol=1e-12)
            coupling = losses.coupling_of_gradients(*gradients, convention=convention, distance=distance)
            np.testing.assert_allclose(terms.coupling, coupling, rtol=1e-12)
