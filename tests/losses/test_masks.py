"""Absent classes (−inf), examples that are left out (`where`), and labels that no class has."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.batches import compiled, random_batch

from dgkd_jax import losses

AT = {"temperature": 2.0}
DGKD = {"alpha": 1.0, "beta": 8.0, "epsilon": 0.3, "convention": "per_sample", **AT}


def per_sample(student, teacher, labels, **options):
    return {
        "ce": losses.cross_entropy(student, labels, **options),
        "smoothed": losses.cross_entropy(student, labels, label_smoothing=0.1, **options),
        "kd": losses.kd(student, teacher, **AT, **options),
        "tckd": losses.tckd(student, teacher, labels, **AT, **options),
        "nckd": losses.nckd(student, teacher, labels, **AT, **options),
        "logit_mse": losses.logit_mse(student, teacher, **options),
    }


def everything(student, teacher, labels, *, logit_mse=True, **options):
    """Every loss; `logit_mse=False` leaves out that of the logits themselves, which is infinite with one of them."""
    couplings = {
        f"dgkd {distance}": losses.dgkd(student, teacher, labels, distance=distance, **DGKD, **options)
        for distance in losses.DISTANCES
    }
    found = per_sample(student, teacher, labels, **options) | couplings
    return found if logit_mse else {name: value for name, value in found.items() if name != "logit_mse"}


@partial(compiled, static_argnames="logit_mse")
def values_and_gradients(student, teacher, labels, **options):
    """All values, and the gradient of the sum of each."""
    values, pull_back = jax.vjp(lambda z: everything(z, teacher, labels, **options), student)
    ones = jax.tree.map(jnp.ones_like, values)
    zeros = jax.tree.map(jnp.zeros_like, values)
    return values, {name: pull_back(zeros | {name: ones[name]})[0] for name in values}


@pytest.fixture(scope="module")
def masked():
    """A batch in which classes 2 and 5 of six are absent on both sides, and the same batch without them."""
    student, teacher, labels = random_batch(7, 4, seed=3)
    wide = [np.full((7, 6), -np.inf) for _ in range(2)]
    present = np.array([0, 1, 3, 4])
    for to, logits in zip(wide, (student, teacher), strict=True):
        to[:, present] = logits
    return (*wide, present[labels]), (student, teacher, labels), present


@pytest.mark.slow
def test_a_class_that_is_absent_on_both_sides_changes_nothing(masked):
    wide, narrow, present = masked
    with jax.enable_x64(True):
        values, gradients = jax.tree.map(np.asarray, values_and_gradients(*wide))
        expected, slopes = jax.tree.map(np.asarray, values_and_gradients(*narrow))
    del values["dgkd wasserstein"]  # a class between two others moves them apart
    for name, value in values.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(gradients[name][:, present], slopes[name], rtol=1e-10, atol=1e-15, err_msg=name)
        assert not gradients[name][:, [2, 5]].any(), name


@pytest.mark.parametrize("lowest", [-np.inf, float(jnp.finfo("float32").min), float(jnp.finfo("bfloat16").min)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lowest_numbers_of_a_type_work_as_masks(lowest, dtype):
    """`finfo.min` divided by T < 1, or cast to a smaller type, is −inf."""
    student, teacher, labels = random_batch(7, 6, seed=3, dtype="float32")
    labels = labels % 2
    student[:, 2], teacher[:, 2] = lowest, lowest
    student, teacher = jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)
    narrow = [jnp.delete(logits, 2, axis=1) for logits in (student, teacher)]
    for name, loss in {
        "kd": lambda z, v, y: losses.kd(z, v, temperature=0.5),
        "tckd": partial(losses.tckd, temperature=0.5),
        "nckd": partial(losses.nckd, temperature=0.5),
        "fused": lambda z, v, y: losses.dgkd_terms(z, v, y, temperature=0.5, convention="per_sample").nckd,
    }.items():
        value, pull_back = jax.vjp(lambda z, loss=loss: loss(z, teacher, labels), student)
        np.testing.assert_allclose(value, loss(*narrow, labels), rtol=1e-6, err_msg=name)
        assert np.isfinite(np.asarray(pull_back(jnp.ones_like(value))[0], np.float32)).all(), name


@pytest.mark.slow
def test_a_class_that_the_teacher_alone_lacks_is_the_limit_of_a_small_one():
    """KL with t̂ = 0 there: log of the mass that the student gives to the others."""
    with jax.enable_x64(True):
        student, teacher, labels = random_batch(5, 4, seed=1)
        labels[:] = 0
        values, gradients = {}, {}
        for lowest in (-np.inf, -2000.0):
            teacher[:, 2] = lowest
            values[lowest], gradients[lowest] = values_and_gradients(student, teacher, labels, logit_mse=False)
        for name in values[-np.inf]:
            np.testing.assert_allclose(values[-np.inf][name], values[-2000.0][name], rtol=1e-12, err_msg=name)
            np.testing.assert_allclose(
                gradients[-np.inf][name], gradients[-2000.0][name], rtol=1e-10, atol=1e-14, err_msg=name
            )


def test_a_class_that_the_student_alone_lacks_makes_the_loss_infinite_and_not_nan():
    student, teacher, labels = random_batch(3, 4)
    labels[:] = 0
    student[:, 2] = -np.inf
    for name in ("kd", "nckd"):
        assert (np.asarray(per_sample(student, teacher, labels)[name]) == np.inf).all()
    assert np.isfinite(losses.tckd(student, teacher, labels, **AT)).all()


@pytest.mark.parametrize("loss", [losses.tckd, losses.nckd], ids=["tckd", "nckd"])
def test_a_target_that_is_absent_on_both_sides_adds_nothing_inside_jit(loss):
    student, teacher, labels = random_batch(3, 4)
    labels[:] = 1
    student[:, 1] = teacher[:, 1] = -np.inf
    with pytest.raises(ValueError, match="-inf in both"):
        loss(student, teacher, labels, **AT)
    value, gradient = jax.jit(jax.value_and_grad(lambda z, y: jnp.sum(loss(z, teacher, y, **AT))))(student, labels)
    others = [np.delete(logits, 1, axis=1) for logits in (student, teacher)]
    expected = 0.0 if loss is losses.tckd else jnp.sum(losses.kd(*others, **AT))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert not gradient[:, 1].any()


@pytest.mark.slow
def test_where_leaves_out_examples_whatever_is_in_them():
    """Values and gradients are those of the other examples alone; the rows left out get exactly 0."""
    where = np.array([[True, False, True], [False, True, True]])
    with jax.enable_x64(True):
        student, teacher, labels = random_batch(2, 3, 5)
        padded = student.copy(), teacher.copy(), labels.copy()
        for part, rubbish in zip(padded, (np.nan, np.inf, -100), strict=True):
            part[~where] = rubbish
        values, gradients = values_and_gradients(*padded, where=where)
        expected, slopes = values_and_gradients(student[where], teacher[where], labels[where])
    for name, value in values.items():
        if value.ndim:
            np.testing.assert_allclose(value[where], expected[name], rtol=1e-12, err_msg=name)
            assert not value[~where].any(), name
        else:
            np.testing.assert_allclose(value, expected[name], rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(gradients[name][where], slopes[name], rtol=1e-10, atol=1e-15, err_msg=name)
        assert not gradients[name][~where].any(), name


@pytest.mark.slow
def test_literal_counts_the_examples_that_are_not_left_out():
    student, teacher, labels = random_batch(6, 5, dtype="float32")
    where = np.array([True, True, False, True, False, True])
    for convention, distance in itertools.product(losses.CONVENTIONS, ("mse", "cosine")):
        options = {"convention": convention, "distance": distance, **AT}
        ours = losses.gradient_coupling(student, teacher, labels, where=where, **options)
        alone = losses.gradient_coupling(student[where], teacher[where], labels[where], **options)
        np.testing.assert_allclose(ours, alone, rtol=1e-6)


@pytest.mark.slow
def test_nobody_left_gives_zero():
    student, teacher, labels = random_batch(2, 3, dtype="float32")
    nobody = np.zeros(2, bool)
    values, gradients = values_and_gradients(student, teacher, labels, where=nobody)
    assert not any(np.any(x) for x in jax.tree.leaves((values, gradients)))


@pytest.mark.parametrize("bad", [-1, 4, 100])
def test_a_label_out_of_range_gives_nan_for_its_example_only_under_jit(bad):
    student, teacher, labels = random_batch(3, 4, dtype="float32")
    labels[1] = bad
    with pytest.raises(ValueError, match=r"must lie in \[0, 4\)"):
        losses.cross_entropy(student, labels)
    values = compiled(per_sample)(student, teacher, labels)
    for name in ("ce", "smoothed", "tckd", "nckd"):
        np.testing.assert_array_equal(np.isnan(values[name]), [False, True, False], err_msg=name)
    assert np.isnan(compiled(lambda *batch: losses.dgkd(*batch, **DGKD))(student, teacher, labels))


def test_not_a_number_stays_one():
    student, teacher, labels = random_batch(3, 4, dtype="float32")
    labels[:] = 0
    for side in (student, teacher):
        bad = side.copy()
        bad[1, 2] = np.nan
        values = per_sample(*((bad, teacher) if side is student else (student, bad)), labels)
        for name, value in values.items():
            if side is student or name not in ("ce", "smoothed"):
                np.testing.assert_array_equal(np.isnan(value), [False, True, False], err_msg=name)
