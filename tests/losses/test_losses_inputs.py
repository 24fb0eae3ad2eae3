"""What the losses accept (shapes, dtypes, jit, vmap, shifts and permutations) and what they refuse, in which words."""

import ast
import itertools
from functools import partial
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from losses.batches import compiled, random_batch

from dgkd_jax import losses

AT = {"temperature": 2.0}
DKD = {"alpha": 1.0, "beta": 8.0, **AT}


def per_sample(student, teacher, labels, temperature=2.0):
    """Everything with one result per sample."""
    at = {"temperature": temperature}
    return {
        "ce": losses.cross_entropy(student, labels),
        "smoothed": losses.cross_entropy(student, labels, label_smoothing=0.1),
        "kd": losses.kd(student, teacher, **at),
        "tckd": losses.tckd(student, teacher, labels, **at),
        "nckd": losses.nckd(student, teacher, labels, **at),
        "dkd": losses.dkd(student, teacher, labels, alpha=1.0, beta=8.0, **at),
        "logit_mse": losses.logit_mse(student, teacher),
        "tckd_gradient": losses.tckd_gradient(student, teacher, labels, **at),
        "nckd_gradient": losses.nckd_gradient(student, teacher, labels, **at),
    }


def of_the_batch(student, teacher, labels, temperature=2.0):
    """Everything with one result per batch."""
    batch, at = (student, teacher, labels), {"temperature": temperature}
    gradients = losses.tckd_gradient(*batch, **at), losses.nckd_gradient(*batch, **at)
    options = itertools.product(losses.CONVENTIONS, losses.DISTANCES)
    return {
        **losses.diagnostics(*batch, **at),
        "dgkd": losses.dgkd(*batch, alpha=1.0, beta=8.0, epsilon=6.0, convention="per_sample", **at),
        **{
            f"{convention} {distance}": losses.coupling_of_gradients(
                *gradients, convention=convention, distance=distance
            )
            for convention, distance in options
        },
    }


@compiled
def everything(student, teacher, labels, temperature=2.0):
    batch = (student, teacher, labels, temperature)
    return per_sample(*batch) | of_the_batch(*batch)


ROWS, CLASSES = 2, 4  # of every call of `exactly`, so that it compiles once


def exactly(student, teacher, labels, temperature=2.0):
    """`everything` in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, everything(student, teacher, np.array(labels), np.float64(temperature)))


# --- shapes, dtypes, transformations ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(CLASSES,), (ROWS, CLASSES), (2, ROWS, CLASSES)])
def test_one_result_for_each_sample_from_its_own_logits_only(shape):
    student, teacher, labels = random_batch(*shape)
    with jax.enable_x64(True):
        together = jax.tree.map(np.asarray, compiled(per_sample)(student, teacher, labels))
    for index in np.ndindex(labels.shape):
        pair = [np.broadcast_to(part[index], (ROWS, CLASSES)) for part in (student, teacher)]
        alone = exactly(*pair, np.full(ROWS, labels[index]))
        for name, ours in together.items():
            assert ours.shape == (shape if name.endswith("gradient") else shape[:-1]), name
            np.testing.assert_allclose(ours[index], alone[name][0], rtol=1e-13, err_msg=name)


@pytest.mark.slow
def test_jit_and_vmap_change_nothing():
    batch = random_batch(ROWS, CLASSES)
    jitted = exactly(*batch)
    with jax.enable_x64(True):
        eager = {
            **per_sample(*batch),
            **losses.diagnostics(*batch, **AT),
            "dgkd": losses.dgkd(*batch, epsilon=6.0, convention="per_sample", **DKD),
        }
        mapped = compiled(jax.vmap(per_sample))(*batch)
    for name, ours in (*eager.items(), *mapped.items()):
        np.testing.assert_allclose(ours, jitted[name], rtol=1e-13, err_msg=name)


def tckd_of_known_labels(student, teacher, labels, temperature):
    """TCKD under jit, where labels and temperature are arrays that the program closes over."""
    return jax.jit(lambda z: losses.tckd(z, teacher, labels, temperature=temperature))(student)


def test_jit_takes_labels_and_temperature_that_are_known_arrays():
    student, teacher, labels = random_batch(3, 5)
    ours = tckd_of_known_labels(student, teacher, jnp.asarray(labels), jnp.float32(2.0))
    np.testing.assert_allclose(ours, losses.tckd(student, teacher, labels, **AT), rtol=1e-6)  # both float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits_are_promoted_before_anything_is_computed(dtype):
    student, teacher, labels = random_batch(3, 5)
    rounded = [jnp.asarray(logits, dtype) for logits in (student, teacher)]
    ours = everything(*rounded, labels)
    single = everything(*(logits.astype(jnp.float32) for logits in rounded), labels)
    for name, value in ours.items():
        assert value.dtype == jnp.float32, name
        # Fused with the conversion, sums may have another order: some float32 roundings. One of float16 is 5e-4.
        np.testing.assert_allclose(value, single[name], rtol=2e-6, err_msg=name)
    by_autodiff = jax.eval_shape(partial(losses.tckd_gradient, method="autodiff", **AT), *rounded, labels)
    assert by_autodiff.dtype == jnp.float32


def test_half_precision_gradients_are_promoted_before_they_are_compared():
    tckd, nckd = (jnp.asarray(part, jnp.bfloat16) for part in random_batch(3, 5)[:2])
    for convention, distance in (("literal", "mse"), ("per_sample", "kl")):
        ours, single = (
            losses.coupling_of_gradients(*pair, convention=convention, distance=distance)
            for pair in ((tckd, nckd), (tckd.astype(jnp.float32), nckd.astype(jnp.float32)))
        )
        assert ours.dtype == jnp.float32
        assert ours == single


@pytest.mark.parametrize(("dtype", "x64"), [("float32", False), ("float32", True), ("float64", True)])
def test_float32_stays_float32_and_float64_stays_float64(dtype, x64):
    student, teacher, labels = random_batch(3, 5)
    with jax.enable_x64(x64):
        ours = jax.eval_shape(everything.__wrapped__, student.astype(dtype), teacher.astype(dtype), labels)
    for name, value in ours.items():
        assert value.dtype == ("float32" if name == "agreement" else dtype), name


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64"])
def test_labels_are_of_any_integer_type(dtype):
    student, teacher, labels = random_batch(3, 5)
    expected = losses.tckd(student, teacher, labels, **AT)
    np.testing.assert_array_equal(losses.tckd(student, teacher, labels.astype(dtype), **AT), expected)
    np.testing.assert_array_equal(losses.tckd(student, teacher, labels.tolist(), **AT), expected)


def test_nothing_flows_to_the_teacher():
    student, teacher, labels = (jnp.asarray(part) for part in random_batch(3, 5))

    @compiled
    @jax.grad
    def gradient(teacher):
        results = everything.__wrapped__(student, teacher, labels)
        del results["logit_msd"]  # a plain measurement, which no loss contains
        return sum(jnp.sum(value) for value in results.values())

    assert not np.any(gradient(teacher))


# --- invariances: logits are multiples of 1/8 and temperatures powers of 2, so that shifts are exact ---------------


def eighths(shape, largest):
    return hypothesis.extra.numpy.arrays(
        np.float64, shape, elements=strategies.integers(-8 * largest, 8 * largest).map(lambda n: n / 8)
    )


few = hypothesis.settings(derandomize=True, deadline=None, max_examples=25, database=None)
label_tuples = strategies.tuples(*[strategies.integers(0, CLASSES - 1)] * ROWS)
temperatures = strategies.sampled_from([1.0, 2.0, 4.0])


@pytest.mark.slow
@few
@hypothesis.given(
    logits=eighths((2, ROWS, CLASSES), 50),
    shifts=eighths((2, ROWS, 1), 1000),
    labels=label_tuples,
    temperature=temperatures,
)
def test_a_constant_added_to_all_logits_of_a_sample_changes_nothing(logits, shifts, labels, temperature):
    before = exactly(*logits, labels, temperature)
    after = exactly(*(logits + shifts), labels, temperature)
    for name in before:
        if name not in ("logit_mse", "logit_msd", "target_norm", "nontarget_norm"):  # these are of the logits
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)


@few
@hypothesis.given(
    logits=eighths((2, ROWS, CLASSES), 50),
    labels=label_tuples,
    temperature=temperatures,
    order=strategies.permutations(range(CLASSES)),
)
def test_naming_the_classes_otherwise_changes_nothing(logits, labels, temperature, order):
    before = exactly(*logits, labels, temperature)
    after = exactly(*logits[..., order], np.argsort(order)[list(labels)], temperature)
    for name, value in before.items():
        # `agreement` depends on the order where the top class is tied; the last three and the diagnostics of
        # directions do where a gradient is nothing but rounding; `test_losses_coupling` has their definitions.
        if name == "agreement" or name.endswith(("cosine", "kl", "wasserstein", "similarity", "covariance")):
            continue
        if name.endswith("gradient"):
            value = value[..., order]
        # Sums in another order: the rounding of terms up to temperature² · margin, 16 · 100.
        np.testing.assert_allclose(value, after[name], rtol=1e-12, atol=1e-12, err_msg=name)


@few
@hypothesis.given(
    logits=eighths((2, ROWS, CLASSES), 200),
    labels=label_tuples,
    temperature=temperatures,
)
def test_divergences_are_not_negative(logits, labels, temperature):
    ours = exactly(*logits, labels, temperature)
    for name in ("kd", "tckd", "nckd"):
        assert np.all(ours[name] >= -1e-14 * temperature**2), name  # their terms, of order 1, cancel


def test_naming_the_classes_otherwise_changes_only_the_wasserstein_distance():
    student, teacher, labels = random_batch(ROWS, CLASSES)
    order = np.array([2, 0, 3, 1])
    before = exactly(student, teacher, labels)
    after = exactly(student[:, order], teacher[:, order], np.argsort(order)[labels])
    for name in before:
        if not name.endswith(("gradient", "normalized wasserstein")):  # these two are nearly constant
            same = np.allclose(before[name], after[name], rtol=1e-12, atol=0)
            assert same is not name.endswith("wasserstein"), name


# --- bad input -----------------------------------------------------------------------------------------------------

Z, V, Y = np.zeros((4, 5), np.float32), np.ones((4, 5), np.float32), np.arange(4)
EVEN, MASKED = np.full((4, 5), 0.2, np.float32), np.arange(5) == 2
GRADIENTS = (Z, V)

REFUSED = {
    "teacher of another shape": (
        lambda: losses.kd(Z, V[:, :4], **AT),
        r"^teacher_logits must have the shape of student_logits, \(4, 5\), got \(4, 4\)",
    ),
    "teacher that would broadcast": (
        lambda: losses.logit_mse(Z, V[:1]),
        r"^teacher_logits must have the shape of student_logits, \(4, 5\), got \(1, 5\)",
    ),
    "too few labels": (lambda: losses.tckd(Z, V, Y[:3], **AT), r"^labels must have shape \(4,\).*got \(3,\)"),
    "labels in a column": (
        lambda: losses.cross_entropy(Z, Y[:, None]),
        r"^labels must have shape \(4,\).*got \(4, 1\)",
    ),
    "distributions below 0": (
        lambda: losses.nckd(Z, V, EVEN - 1, **AT),
        r"^labels that are distributions must be at least 0",
    ),
    "distributions that do not sum to 1": (
        lambda: losses.cross_entropy(Z, np.ones(Z.shape, np.float32)),
        r"^labels that are distributions must .* sum to 1",
    ),
    "distributions of integers": (
        lambda: losses.tckd(Z[0], V[0], np.eye(5, dtype=int)[0], **AT),
        r"^labels of the logits' shape \(5,\) must be distributions .* floating point, got int64",
    ),
    "distributions where a class is needed": (
        lambda: losses.tckd_gradient(Z, V, EVEN, **AT),
        r"^labels must be integers of shape \(4,\) for a gradient",
    ),
    "distributions with another distance": (
        lambda: losses.gradient_coupling(Z, V, EVEN, convention="per_sample", distance="cosine", **AT),
        r"^labels must be integers of shape \(4,\) for distance='cosine'",
    ),
    "where of numbers": (lambda: losses.kd(Z, V, where=np.ones(4), **AT), r"^where must be booleans, got float"),
    "where of another shape": (
        lambda: losses.kd(Z, V, where=np.ones(3, bool), **AT),
        r"^where must have shape \(4,\)",
    ),
    "target masked on both sides": (
        lambda: losses.tckd(np.where(MASKED, -np.inf, Z), np.where(MASKED, -np.inf, V), Y, **AT),
        r"^labels name a class whose logit is -inf in both",
    ),
    "float labels": (
        lambda: losses.dkd(Z, V, Y.astype(np.float32), **DKD),
        r"^labels must be integers, got float32",
    ),
    "bool labels": (lambda: losses.tckd(Z, V, Y > 2, **AT), r"^labels must be integers, got bool"),
    "label too high": (
        lambda: losses.tckd(Z, V, np.array([0, 1, 2, 5]), **AT),
        r"^labels must lie in \[0, 5\), got values from 0 to 5",
    ),
    "label below zero": (
        lambda: losses.cross_entropy(Z, jnp.array([0, 1, -1, 4])),
        r"^labels must lie in \[0, 5\), got values from -1 to 4",
    ),
    "label too high, known inside jit": (
        lambda: tckd_of_known_labels(Z, V, jnp.array([0, 1, 2, 5]), jnp.float32(2.0)),
        r"^labels must lie in \[0, 5\)",
    ),
    "one class": (
        lambda: losses.tckd(Z[:, :1], V[:, :1], 0 * Y, **AT),
        r"^student_logits must have at least two classes, got shape \(4, 1\)",
    ),
    "one class, cross-entropy": (
        lambda: losses.cross_entropy(Z[:, :1], 0 * Y),
        r"^student_logits must have at least two classes",
    ),
    "scalar student": (lambda: losses.kd(1.0, V, **AT), r"^student_logits must have shape \[\.\.\., classes\]"),
    "scalar teacher": (lambda: losses.kd(Z, 1.0, **AT), r"^teacher_logits must have shape \[\.\.\., classes\]"),
    "complex logits": (lambda: losses.kd(1j * Z, V, **AT), r"^student_logits must be real numbers, got complex"),
    "bool logits": (lambda: losses.kd(Z, V > 0, **AT), r"^teacher_logits must be real numbers, got bool"),
    **{
        f"temperature {bad}": (
            partial(loss, Z, V, *labels, temperature=bad),
            rf"^temperature must be finite and greater than 0, got {bad}",
        )
        for loss, labels, bad in (
            (losses.kd, (), 0.0),
            (losses.tckd, (Y,), -4.0),
            (losses.nckd_gradient, (Y,), float("nan")),
            (losses.diagnostics, (Y,), float("inf")),
        )
    },
    "label_smoothing 1": (
        lambda: losses.cross_entropy(Z, Y, label_smoothing=1.0),
        r"^label_smoothing must be in \[0, 1\), got 1\.0",
    ),
    "label_smoothing below zero": (
        lambda: losses.cross_entropy(Z, Y, label_smoothing=-0.1),
        r"^label_smoothing must be in \[0, 1\), got -0\.1",
    ),
    "method": (
        lambda: losses.tckd_gradient(Z, V, Y, method="jvp", **AT),
        r"^method must be one of closed_form, autodiff, got 'jvp'",
    ),
    "convention": (
        lambda: losses.coupling_of_gradients(*GRADIENTS, convention="mean"),
        r"^convention must be one of per_sample, literal, normalized, self_normalized, got 'mean'",
    ),
    "distance": (
        lambda: losses.coupling_of_gradients(*GRADIENTS, convention="literal", distance="l1"),
        r"^distance must be one of mse, cosine, kl, wasserstein, got 'l1'",
    ),
    "parity_batch 0": (
        lambda: losses.coupling_of_gradients(*GRADIENTS, convention="literal", parity_batch=0),
        r"^parity_batch must be at least 1 or None, got 0",
    ),
    "kappa 0": (
        lambda: losses.coupling_of_gradients(*GRADIENTS, convention="self_normalized", kappa=0.0),
        r"^kappa must be finite and greater than 0, got 0\.0",
    ),
    "gradients of two shapes": (
        lambda: losses.coupling_of_gradients(Z, V[:1], convention="literal"),
        r"^nckd_gradients must have the shape of tckd_gradients, \(4, 5\), got \(1, 5\)",
    ),
    "scalar gradients": (
        lambda: losses.coupling_of_gradients(1.0, 1.0, convention="literal"),
        r"^tckd_gradients must have shape",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_labels_out_of_range_inside_jit_are_not_an_error_of_tracing():
    program = jax.jit(partial(losses.tckd, **AT))
    assert program(Z, V, np.array([0, 1, 2, 5])).shape == (4,)


@pytest.mark.parametrize("path", sorted(Path(losses.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_imports_only_jax_and_the_other_parts_of_the_losses(path):
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "dgkd_jax"
            imported.add(node.module)
    others = {name for name in imported if not name.startswith("dgkd_jax.losses")}
    standard = {"collections.abc", "functools", "math", "typing"}
    assert others <= {"jax", "jax.numpy", "jax.custom_derivatives", "numpy", *standard}
