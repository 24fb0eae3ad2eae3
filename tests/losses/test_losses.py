"""Per-sample losses, their gradients and the diagnostics, against recorded PyTorch figures, scipy and autodiff."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from losses.batches import compiled, random_batch
from scipy import special, stats

from dgkd_jax import losses

DIAGNOSTICS = (
    "target_norm",
    "nontarget_norm",
    "target_gradmag",
    "nontarget_gradmag",
    "grad_similarity",
    "covariance",
)

pytestmark = pytest.mark.usefixtures("float64")


@compiled
def reproduce(student, teacher, labels, temperature, alpha, beta, epsilon):
    """Everything that a fixture records, under the fixture's names."""
    inputs = (teacher, labels)
    weights = {"alpha": alpha, "beta": beta, "temperature": temperature}

    def scalars(z):
        return {
            "dkd/loss": jnp.mean(losses.dkd(z, *inputs, **weights)),
            "literal/loss": losses.dgkd(z, *inputs, epsilon=epsilon, convention="literal", **weights),
            "normalized/loss": losses.dgkd(z, *inputs, epsilon=epsilon, convention="normalized", **weights),
            "tckd": jnp.mean(losses.tckd(z, *inputs, temperature=temperature)),
            "nckd": jnp.mean(losses.nckd(z, *inputs, temperature=temperature)),
            "kd/loss": jnp.mean(losses.kd(z, teacher, temperature=temperature)),
            "ce/loss": jnp.mean(losses.cross_entropy(z, labels)),
        }

    values, pull_back = jax.vjp(scalars, student)
    unit = dict(zip(values, jnp.eye(len(values), dtype=student.dtype), strict=True))
    (gradients,) = jax.vmap(pull_back)(unit)
    names = [name.replace("/loss", "/grad") if "/" in name else f"{name}_grad" for name in values]
    closed_form = [
        gradient(student, *inputs, temperature=temperature) / len(labels)
        for gradient in (losses.tckd_gradient, losses.nckd_gradient)
    ]
    coupling = losses.gradient_coupling(student, *inputs, temperature=temperature, convention="literal")
    diagnostics = losses.diagnostics(student, *inputs, temperature=temperature)
    return {
        **values,
        **dict(zip(names, gradients, strict=True)),
        **{name: diagnostics[name] for name in DIAGNOSTICS},
        "grad_mse": coupling,
        "closed_form/tckd_grad": closed_form[0],
        "closed_form/nckd_grad": closed_form[1],
    }


# float64: 1e-10 of each entry, beside rounding at the scale of the largest one. float32: 2e-5 of the largest entry,
# because ŝ − t̂ cancels where both are alike, so the small entries have an absolute error only.
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "relative", "of_largest"), [("float64", 1e-10, 1e-14), ("float32", 0.0, 2e-5)])
def test_agrees_with_the_pytorch_figures(recorded, dtype, relative, of_largest):
    recorded = recorded | {f"closed_form/{name}": recorded[name] for name in ("tckd_grad", "nckd_grad")}
    if recorded["student_logits"].shape[-1] == 2:
        assert np.isnan(recorded["covariance"])  # 0/0 there; 0 by definition here
        recorded["covariance"] = np.zeros(())

    names = ("student_logits", "teacher_logits", "temperature", "alpha", "beta", "epsilon")
    with jax.enable_x64(dtype == "float64"):
        values = {name: recorded.pop(name).astype(dtype) for name in names}
        student, teacher, *scalars = values.values()
        ours = reproduce(student, teacher, recorded.pop("labels"), *scalars)

    assert set(recorded) <= set(ours)
    for name, expected in recorded.items():
        assert ours[name].dtype == dtype, name
        tolerance = of_largest * np.abs(expected).max()
        np.testing.assert_allclose(ours[name], expected, rtol=relative, atol=tolerance, err_msg=name)


@compiled
def per_sample_losses(student, teacher, labels, temperature):
    return {
        "tckd": losses.tckd(student, teacher, labels, temperature=temperature),
        "nckd": losses.nckd(student, teacher, labels, temperature=temperature),
        "kd": losses.kd(student, teacher, temperature=temperature),
        "dkd": losses.dkd(student, teacher, labels, alpha=0.7, beta=-3.0, temperature=temperature),
        "logit_mse": losses.logit_mse(student, teacher),
    }


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_per_sample_losses_are_their_definitions(temperature):
    student, teacher, labels = random_batch(6, 5)
    s, t = (special.softmax(logits / temperature, axis=-1) for logits in (student, teacher))
    is_target = np.eye(5, dtype=bool)[labels]
    p, q = s[is_target], t[is_target]
    s_rest, t_rest = (probabilities[~is_target].reshape(6, 4) for probabilities in (s, t))
    # scipy's entropy(t, s) is KL(t ‖ s) of the two after normalisation.
    tckd = temperature**2 * stats.entropy([q, 1 - q], [p, 1 - p])
    nckd = temperature**2 * stats.entropy(t_rest, s_rest, axis=-1)
    expected = {
        "tckd": tckd,
        "nckd": nckd,
        "kd": temperature**2 * stats.entropy(t, s, axis=-1),
        "dkd": 0.7 * tckd - 3.0 * nckd,
        "logit_mse": ((student - teacher) ** 2).mean(axis=-1),
    }
    for name, value in per_sample_losses(student, teacher, labels, temperature).items():
        assert value.shape == (6,)
        # A divergence is a difference of terms of order 1, so a small one is exact to their rounding only.
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_is_that_of_the_smoothed_target(label_smoothing):
    student, _, labels = random_batch(6, 5)
    target = (1 - label_smoothing) * np.eye(5)[labels] + label_smoothing / 5
    expected = -np.sum(target * special.log_softmax(student, axis=-1), axis=-1)
    ours = losses.cross_entropy(student, labels, label_smoothing=label_smoothing)
    np.testing.assert_allclose(ours, expected, rtol=1e-13)


@pytest.mark.slow
def test_kd_splits_into_tckd_and_nckd_whichever_class_is_the_target():
    student, teacher, _ = random_batch(8, 6, scale=4.0)
    for target in range(6):
        ours = per_sample_losses(student, teacher, np.full(8, target), 3.0)
        q = special.softmax(teacher / 3.0, axis=-1)[:, target]
        np.testing.assert_allclose(ours["kd"], ours["tckd"] + (1 - q) * ours["nckd"], rtol=1e-13)


def gradients(student, teacher, labels, **method):
    return (
        losses.tckd_gradient(student, teacher, labels, temperature=2.5, **method),
        losses.nckd_gradient(student, teacher, labels, temperature=2.5, **method),
    )


@compiled
def gradients_of_each_sample_by_jax_grad(student, teacher, labels):
    if labels.ndim > 0:
        return jax.vmap(gradients_of_each_sample_by_jax_grad.__wrapped__)(student, teacher, labels)
    return tuple(jax.grad(loss)(student, teacher, labels, temperature=2.5) for loss in (losses.tckd, losses.nckd))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_closed_form_gradients_are_those_of_autodiff(shape):
    batch = random_batch(*shape)
    closed_form = compiled(gradients)(*batch)
    by_method = compiled(partial(gradients, method="autodiff"))(*batch)
    by_jax_grad = gradients_of_each_sample_by_jax_grad(*batch)
    for ours, one, other in zip(closed_form, by_method, by_jax_grad, strict=True):
        assert ours.shape == shape
        # The gradients are of order 1: a few units in the last place of float64.
        np.testing.assert_allclose(ours, one, rtol=0, atol=1e-15)
        np.testing.assert_allclose(ours, other, rtol=0, atol=1e-15)


def test_closed_form_gradients_are_the_formulas():
    student, teacher, labels = random_batch(4, 5)
    s, t = (special.softmax(logits / 2.5, axis=-1) for logits in (student, teacher))
    target = np.eye(5)[labels]
    p, q = (s * target).sum(-1, keepdims=True), (t * target).sum(-1, keepdims=True)
    s_rest, t_rest = s * (1 - target) / (1 - p), t * (1 - target) / (1 - q)
    tckd, nckd = compiled(gradients)(student, teacher, labels)
    np.testing.assert_allclose(tckd, 2.5 * (p - q) * (target - s_rest), rtol=1e-12)
    np.testing.assert_allclose(nckd, 2.5 * (s_rest - t_rest), rtol=1e-12)


@pytest.mark.slow
def test_gradients_are_those_of_finite_differences():
    student, teacher, labels = random_batch(3, 4)

    @jax.jit  # `compiled` cannot be differentiated
    def values(z):
        return {
            **per_sample_losses.__wrapped__(z, teacher, labels, 2.0),
            "ce": losses.cross_entropy(z, labels),
            "smoothed": losses.cross_entropy(z, labels, label_smoothing=0.2),
            # The coupling's gradient is a second derivative of the losses.
            "gradients": gradients(z, teacher, labels),
        }

    check_grads(values, (jnp.asarray(student),), order=1, modes=("fwd", "rev"), rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_two_classes_leave_nothing_among_the_non_targets():
    student, teacher, labels = batch = random_batch(8, 2, scale=3.0)
    ours = per_sample_losses(*batch, 2.0)
    assert not np.any(ours["nckd"])
    np.testing.assert_allclose(ours["tckd"], ours["kd"], rtol=1e-13)
    for method in ("closed_form", "autodiff"):
        _, nckd_gradient = compiled(partial(gradients, method=method))(*batch)
        assert not np.any(nckd_gradient), method

    @compiled
    @jax.value_and_grad
    def coupling(z):
        pair = gradients(z, teacher, labels)
        return sum(
            losses.coupling_of_gradients(*pair, convention=convention, distance=distance)
            for convention in losses.CONVENTIONS
            for distance in losses.DISTANCES
        )

    value, gradient = coupling(student)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    diagnostics = compiled(partial(losses.diagnostics, temperature=2.0))(*batch)
    assert all(np.isfinite(value) for value in diagnostics.values())
    for name in ("nontarget_gradmag", "grad_similarity", "covariance"):
        assert diagnostics[name] == 0.0, name


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 2, 7)])
def test_diagnostics_are_their_definitions(shape):
    student, teacher, labels = batch = random_batch(*shape)
    ours = compiled(partial(losses.diagnostics, temperature=2.5))(*batch)

    a, b = (np.asarray(gradient).reshape(-1, 7) for gradient in compiled(gradients)(*batch))
    z, v = student.reshape(-1, 7), teacher.reshape(-1, 7)
    target = np.eye(7, dtype=bool)[labels.ravel()]
    centred = {"a": a - a.mean(), "b": b - b.mean()}
    products = {x + y: np.sum(centred[x] @ centred[y].T) for x, y in ("ab", "aa", "bb")}
    cosines = np.sum(a * b, axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    expected = {
        "grad_similarity": cosines.mean(),
        "target_gradmag": np.linalg.norm(a / len(a)),
        "nontarget_gradmag": np.linalg.norm(b / len(b)),
        "target_norm": np.linalg.norm(z[target]),
        "nontarget_norm": np.linalg.norm(z[~target]),
        "covariance": products["ab"] / np.sqrt(products["aa"] * products["bb"]),
        "logit_msd": np.mean(np.sum((z - v) ** 2, axis=-1)),
        "agreement": np.mean(z.argmax(-1) == v.argmax(-1)),
    }
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert ours[name].shape == ()
        np.testing.assert_allclose(ours[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.slow
def test_what_every_distillation_logs_and_examines_are_its_losses_and_diagnostics():
    batch, at = random_batch(6, 5), {"temperature": 2.5}

    @compiled
    def all_of_them(student, teacher, labels):
        batch = (student, teacher, labels)
        expected = {
            "kd": losses.kd(student, teacher, **at),
            "tckd": losses.tckd(*batch, **at),
            "nckd": losses.nckd(*batch, **at),
            "logit_mse": losses.logit_mse(student, teacher),
        }
        apart = jnp.subtract(*gradients(*batch))
        by_example = expected | {"coupling": jnp.sum(apart**2, axis=-1)}
        means = jax.tree.map(jnp.mean, expected) | losses.diagnostics(*batch, **at)
        return losses.compare(*batch, **at), means, losses.examine(*batch, **at), by_example

    logged, means, examined, by_example = all_of_them(*batch)
    for found, expected in ((logged, means), (examined, by_example)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)
