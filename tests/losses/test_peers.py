"""The peers of KD against figures of their authors' code, and what each promises beside them."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.batches import compiled, random_batch
from scipy import special

from dgkd_jax import losses

GOLDEN = Path(__file__).parents[1] / "golden"
BATCHES = sorted(path.stem for path in (GOLDEN / "losses").glob("*.npz"))
LABELLED = ("nkd", "rld", "dkd_standardized")


def standardized(loss):
    def of_standardized(student, teacher, *labels, where=None, **settings):
        both = (losses.standardize(logits, where=where) for logits in (student, teacher))
        return loss(*both, *labels, where=where, **settings)

    return of_standardized


LOSSES = {
    "kd_standardized": standardized(losses.kd),
    "dkd_standardized": standardized(losses.dkd),
    "nkd": losses.nkd,
    "dist": losses.dist,
    "wttm": losses.wttm,
    "rld": losses.rld,
    "gdkd": losses.gdkd,
}
SETTINGS = {
    "kd_standardized": {"temperature": 2.0},
    "dkd_standardized": {"temperature": 2.0, "alpha": 1.0, "beta": 8.0},
    "nkd": {"temperature": 3.0, "gamma": 1.5},
    "dist": {"temperature": 4.0, "beta": 2.0, "gamma": 2.0},
    "wttm": {"gamma": 0.3},
    "rld": {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "alpha_temperature": 2.0},
    "gdkd": {"k": 3, "w0": 1.0, "w1": 2.0, "w2": 8.0, "temperature": 4.0},
}
EACH = pytest.mark.parametrize("name", LOSSES)

pytestmark = pytest.mark.usefixtures("float64")


def call(name, student, teacher, labels, **settings):
    of = (labels,) if name in LABELLED else ()
    return LOSSES[name](student, teacher, *of, **(SETTINGS[name] | settings))


def both(name, *batch, **settings):
    """The loss, and the gradient of its sum."""

    def run(student, teacher, labels):
        value, pull_back = jax.vjp(lambda z: call(name, z, teacher, labels, **settings), student)
        return value, pull_back(jnp.ones_like(value))[0]

    return compiled(run)(*batch)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "relative", "of_largest"), [("float64", 1e-10, 1e-13), ("float32", 0.0, 2e-5)])
@pytest.mark.parametrize("batch", BATCHES)
def test_agrees_with_the_figures_of_the_authors_code(batch, dtype, relative, of_largest):
    with np.load(GOLDEN / "losses" / f"{batch}.npz") as file:
        labels, *logits = (file[name] for name in ("labels", "student_logits", "teacher_logits"))
    with np.load(GOLDEN / "peers" / f"{batch}.npz") as file:
        recorded = {name: file[name] for name in file if "/" in name}  # beside the inputs
    figures = sorted({name.split("/")[0] for name in recorded})
    settings = {
        figure: {
            key.split("/")[1]: value.item()
            for key, value in recorded.items()
            if key.startswith(f"{figure}/") and value.ndim == 0 and not key.endswith("/loss")
        }
        for figure in figures
    }

    def run(student, teacher):
        found = {}
        for figure in figures:
            name = figure.rsplit("_t", 1)[0]
            found[figure] = jax.value_and_grad(
                lambda z, name=name, figure=figure: jnp.mean(call(name, z, teacher, labels, **settings[figure]))
            )(student)
        return found

    with jax.enable_x64(dtype == "float64"):
        found = compiled(run)(*(each.astype(dtype) for each in logits))
    assert {figure.rsplit("_t", 1)[0] for figure in figures} == {*LOSSES}
    for figure, ours in found.items():
        for part, what in zip(ours, ("loss", "grad"), strict=True):
            expected = recorded[f"{figure}/{what}"]
            assert part.dtype == dtype
            # Two standardised logits are ±1/√2 whatever they are, so that all of their gradient cancels.
            cancels = "standardized" in figure and labels.max() == 1
            largest = 1.0 if cancels else np.abs(expected).max()
            np.testing.assert_allclose(
                part, expected, rtol=relative, atol=of_largest * largest, err_msg=f"{figure}/{what}"
            )


@EACH
def test_renumbering_the_classes_renumbers_the_gradient(name):
    student, teacher, labels = random_batch(6, 7)
    order = np.array([3, 0, 6, 4, 2, 1, 5])
    value, gradient = both(name, student, teacher, labels)
    renumbered = both(name, student[:, order], teacher[:, order], np.argsort(order)[labels])
    np.testing.assert_allclose(renumbered[0], value, rtol=1e-12)
    np.testing.assert_allclose(renumbered[1], gradient[:, order], rtol=1e-10, atol=1e-13)


@EACH
def test_a_shift_of_all_logits_changes_nothing(name):
    student, teacher, labels = random_batch(6, 7)
    value, gradient = both(name, student, teacher, labels)
    shifted = both(name, student + 3.0, teacher - 5.0, labels)
    np.testing.assert_allclose(shifted[0], value, rtol=1e-12)
    np.testing.assert_allclose(shifted[1], gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("nkd", "wttm", "rld")])
def test_a_student_like_its_teacher_loses_nothing(name):
    logits, _, labels = random_batch(6, 7)
    value, gradient = both(name, logits, logits, labels)
    # DIST's guard of 1e-8 stays: relative to products of norms, the smallest of which are about 0.01.
    most = 1e-4 if name == "dist" else 1e-15
    np.testing.assert_allclose(value, 0.0, atol=most)
    np.testing.assert_allclose(gradient, 0.0, atol=most)


@pytest.mark.slow
def test_wttm_is_0_where_the_student_is_the_transformed_teacher_and_rld_where_the_teacher_is_right():
    logits, _, _ = random_batch(6, 7)
    np.testing.assert_allclose(losses.wttm(0.3 * logits, logits, gamma=0.3), 0.0, atol=1e-15)
    found = losses.rld(logits, logits, logits.argmax(-1), **SETTINGS["rld"])
    np.testing.assert_allclose(found, 0.0, atol=1e-15)


@EACH
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_and_gradients_are_finite_at_any_margin(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        others = np.linspace(-0.5, 0.5, 10)
        rows = [
            (others + student * (np.arange(10) == 3), others[::-1] + teacher * (np.arange(10) == 3))
            for student in (-1e4, -100.0, 0.0, 100.0, 1e4)
            for teacher in (-1e4, -100.0, 0.0, 100.0, 1e4)
        ]
        student, teacher = (np.array(side, dtype) for side in zip(*rows, strict=True))
        flat = np.zeros_like(student[:1])  # equal logits have no deviation
        student, teacher = np.concatenate([student, flat]), np.concatenate([teacher, flat])
        settings = {key: 1.0 for key in ("temperature", "alpha_temperature") if key in SETTINGS[name]}
        for part in both(name, student, teacher, np.full(len(student), 3), **settings):
            assert part.dtype == dtype
            assert np.isfinite(part).all()


@pytest.mark.slow
@EACH
def test_examples_that_are_left_out_do_not_count(name):
    student, teacher, labels = random_batch(6, 7)
    where = np.array([True, False, True, True, False, True])
    rest = both(name, student[where], teacher[where], labels[where])
    student[~where], teacher[~where], labels[~where] = np.nan, np.inf, 99
    value, gradient = both(name, student, teacher, labels, where=where)
    np.testing.assert_array_equal(gradient[~where], 0.0)
    np.testing.assert_allclose(gradient[where], rest[1], rtol=1e-10, atol=1e-13)
    if name == "dist":
        np.testing.assert_allclose(value, rest[0], rtol=1e-12)
        assert call(name, student, teacher, labels, where=np.zeros(6, bool)) == 0
    else:
        np.testing.assert_array_equal(value[~where], 0.0)
        np.testing.assert_allclose(value[where], rest[0], rtol=1e-12)


@EACH
def test_float32_is_close_to_float64_near_the_teacher(name):
    _, teacher, labels = random_batch(6, 7, dtype="float32")
    student = (teacher + 1e-4 * random_batch(6, 7, seed=1)[0]).astype("float32")
    exact = both(name, student.astype("float64"), teacher.astype("float64"), labels)
    with jax.enable_x64(False):
        found = both(name, student, teacher, labels)
    # Standardising rounds each side by itself, and DIST's guard is of the size of what it guards.
    slack = 1e-5 if name == "dist" or "standardized" in name else 0.0
    for ours, right in zip(found, exact, strict=True):
        np.testing.assert_allclose(ours, right, rtol=2e-5, atol=slack + 1e-5 * np.abs(right).max())


@pytest.mark.slow
def test_dists_derivatives_are_those_of_pearsons_correlations():
    """The gradient in closed form, and its own derivative in both modes, against autodiff of the definition."""
    student, teacher, labels = random_batch(6, 7)
    along = random_batch(6, 7, seed=1)[0]

    def of_definition(z):
        p, q = (jax.nn.softmax(each / 4.0) for each in (z, jnp.asarray(teacher)))

        def mean(p, q):
            centred = [each - each.mean(-1, keepdims=True) for each in (p, q)]
            norms = [jnp.sqrt((each**2).sum(-1)) for each in centred]
            return (1 - (centred[0] * centred[1]).sum(-1) / (norms[0] * norms[1] + 1e-8)).mean()

        return 16.0 * (2.0 * mean(p, q) + 2.0 * mean(p.T, q.T))

    def derivatives(loss):
        gradient = jax.grad(loss)
        forward_over_reverse = jax.jvp(gradient, (student,), (along,))[1]
        return gradient(student), forward_over_reverse, jax.grad(lambda z: jnp.sum(gradient(z) * along))(student)

    found = derivatives(lambda z: call("dist", z, teacher, labels, **SETTINGS["dist"]))
    for ours, expected in zip(found, derivatives(of_definition), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-10 * np.abs(expected).max())


@pytest.mark.slow
def test_dists_gradient_keeps_its_digits_where_columns_differ_in_length_by_magnitudes():
    """A class that only one side gives a probability: its column is all but 0 on the other."""
    student, teacher, labels = random_batch(16, 100, scale=9.0)
    settings = SETTINGS["dist"] | {"temperature": 1.0}
    _, exact = both("dist", student, teacher, labels, **settings)
    with jax.enable_x64(False):
        _, found = both("dist", *(each.astype("float32") for each in (student, teacher)), labels, **settings)
    np.testing.assert_allclose(found, exact, rtol=0, atol=5e-5 * np.abs(exact).max())


@pytest.mark.slow
@EACH
def test_any_leading_shape_will_do(name):
    batch = random_batch(2, 3, 5)
    flat = [np.reshape(each, (6, *each.shape[2:])) for each in batch]
    value, gradient = both(name, *batch)
    expected = both(name, *flat)
    np.testing.assert_allclose(np.ravel(value), np.ravel(expected[0]), rtol=1e-12)
    np.testing.assert_allclose(np.reshape(gradient, (6, 5)), expected[1], rtol=1e-10, atol=1e-13)


@EACH
def test_no_gradient_flows_into_the_teacher(name):
    student, teacher, labels = random_batch(4, 5)
    assert not np.any(jax.grad(lambda v: jnp.sum(call(name, student, v, labels)))(jnp.asarray(teacher)))


def test_partition_has_kd_dkd_and_gdkd_as_its_cases():
    student, teacher, labels = random_batch(8, 6)
    at = {"temperature": 3.0}
    is_target = labels[:, None] == np.arange(6)
    dkd = losses.partition(student, teacher, is_target, masses=0.7, inside=4.0, outside=5.0, **at)
    np.testing.assert_allclose(dkd, losses.dkd(student, teacher, labels, alpha=0.7, beta=5.0, **at), rtol=1e-12)

    two = is_target | (np.arange(6) == ((labels + 2) % 6)[:, None])
    mass = np.sum(special.softmax(teacher / 3.0, axis=-1), axis=-1, where=two)
    kd = losses.partition(student, teacher, two, masses=1.0, inside=mass, outside=1 - mass, **at)
    np.testing.assert_allclose(kd, losses.kd(student, teacher, **at), rtol=1e-12)

    top = teacher >= np.sort(teacher)[:, -2:-1]
    gdkd = losses.partition(student, teacher, top, masses=1.0, inside=2.0, outside=3.0, **at)
    np.testing.assert_allclose(losses.gdkd(student, teacher, k=2, w0=1.0, w1=2.0, w2=3.0, **at), gdkd, rtol=1e-12)


def test_gdkd_of_the_top_class_is_dkd_where_the_teacher_is_right():
    student, teacher, _ = random_batch(8, 6)
    found = losses.gdkd(student, teacher, k=1, w0=0.7, w1=9.0, w2=5.0, temperature=3.0)
    expected = losses.dkd(student, teacher, teacher.argmax(-1), alpha=0.7, beta=5.0, temperature=3.0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_gdkd_takes_k_classes_of_equal_logits():
    student, _, _ = random_batch(1, 4)
    found = losses.gdkd(student, np.zeros((1, 4)), k=2, w0=1.0, w1=2.0, w2=3.0, temperature=1.0)
    mask = np.array([[True, True, False, False]])
    expected = losses.partition(student, np.zeros((1, 4)), mask, masses=1.0, inside=2.0, outside=3.0, temperature=1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_rld_ranks_nothing_below_a_target_that_is_last():
    student, teacher, _ = random_batch(5, 6)
    settings = SETTINGS["rld"] | {"alpha": 0.0}
    value, gradient = both("rld", student, teacher, teacher.argmin(-1), **settings)
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.slow
def test_nkd_has_the_gradient_of_its_cross_entropies_and_reads_the_largest_weight():
    student, teacher, labels = random_batch(5, 6)
    settings = {"temperature": 2.0, "gamma": 0.0}
    p, q = (special.softmax(logits, axis=-1) for logits in (student, teacher))
    is_target = labels[:, None] == np.arange(6)
    q = np.sum(q, axis=-1, where=is_target)
    value, gradient = both("nkd", student, teacher, labels, **settings)
    np.testing.assert_allclose(value, -q * np.log(np.sum(p, axis=-1, where=is_target)), rtol=1e-12)
    np.testing.assert_allclose(gradient, q[:, None] * (p - is_target), rtol=1e-10, atol=1e-13)
    mixed = 0.7 * is_target + 0.3 * np.roll(is_target, 1, axis=-1)
    np.testing.assert_array_equal(call("nkd", student, teacher, mixed), call("nkd", student, teacher, labels))


@pytest.mark.slow
def test_standardized_logits_have_mean_0_and_deviation_1_without_the_absent_classes():
    logits, _, _ = random_batch(5, 6)
    found = losses.standardize(logits)
    np.testing.assert_allclose(
        found, (logits - logits.mean(-1, keepdims=True)) / logits.std(-1, ddof=1, keepdims=True), rtol=1e-6
    )
    absent = np.concatenate([logits, np.full((5, 2), -np.inf)], axis=-1)
    np.testing.assert_allclose(losses.standardize(absent)[:, :6], found, rtol=1e-12)
    assert np.all(losses.standardize(absent)[:, 6:] == -np.inf)
    gradient = jax.grad(lambda x: jnp.sum(losses.standardize(x)[:, :6] ** 3))(absent)
    assert np.isfinite(gradient).all()
    assert losses.standardize(logits.astype("bfloat16")).dtype == "float32"


@pytest.mark.parametrize("name", [name for name in LOSSES if "standardized" not in name])
def test_a_class_that_neither_side_has_does_not_count(name):
    student, teacher, labels = random_batch(5, 6)
    value, gradient = both(name, student, teacher, labels)
    wider = [np.concatenate([side, np.full((5, 1), -np.inf)], axis=-1) for side in (student, teacher)]
    found, slope = both(name, *wider, labels)
    assert np.isfinite(slope).all()
    if name != "dist":  # which has one more constant column
        np.testing.assert_allclose(found, value, rtol=1e-12)
        np.testing.assert_allclose(slope[:, :6], gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("nkd", {"temperature": 0.0}, "temperature must be finite and greater than 0"),
        ("dist", {"temperature": -1.0}, "temperature must be finite and greater than 0"),
        ("wttm", {"gamma": 0.0}, "gamma must be finite and greater than 0"),
        ("rld", {"alpha_temperature": 0.0}, "alpha_temperature must be finite and greater than 0"),
        ("rld", {"temperature": np.nan}, "temperature must be finite and greater than 0"),
        ("gdkd", {"k": 5}, r"k must be a whole number in \[1, 5\)"),
        ("gdkd", {"k": 0}, r"k must be a whole number in \[1, 5\)"),
        ("gdkd", {"k": 2.0}, r"k must be a whole number in \[1, 5\)"),
        ("gdkd", {"where": np.ones(3)}, "where must be booleans"),
    ],
)
def test_a_wrong_argument_is_named(name, wrong, message):
    student, teacher, labels = random_batch(4, 5)
    with pytest.raises(ValueError, match=message):
        call(name, student, teacher, labels, **wrong)


def test_a_wrong_mask_and_a_soft_label_are_named():
    student, teacher, labels = random_batch(4, 5)
    weights = {"masses": 1.0, "inside": 1.0, "outside": 1.0, "temperature": 1.0}
    for mask in (np.ones((4, 5)), np.ones(4, bool)):
        with pytest.raises(ValueError, match="mask must be booleans of the logits' shape"):
            losses.partition(student, teacher, mask, **weights)
    with pytest.raises(ValueError, match="labels must be class indices"):
        call("rld", student, teacher, np.eye(5)[labels])
    with pytest.raises(ValueError, match="labels must lie in"):
        call("nkd", student, teacher, labels + 5)
    for loss in (partial(call, "wttm"), partial(call, "dist"), partial(call, "gdkd")):
        with pytest.raises(ValueError, match="teacher_logits must have the shape"):
            loss(student, teacher[:2], labels)


def test_mlkd_is_its_formula_and_its_levels_vanish_at_the_teacher():
    student, teacher, _ = random_batch(5, 4)
    found = losses.mlkd(student, teacher, temperatures=(2.0, 3.0))
    expected = {"instance": 0.0, "batch": 0.0, "class": 0.0}
    for temperature in (2.0, 3.0):
        p, q = (special.softmax(logits / temperature, axis=-1) for logits in (student, teacher))
        expected["instance"] += temperature**2 * np.mean(np.sum(special.rel_entr(q, p), axis=-1))
        expected["batch"] += np.sum((p @ p.T - q @ q.T) ** 2) / 5
        expected["class"] += np.sum((p.T @ p - q.T @ q) ** 2) / 4
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)
    alike = losses.mlkd(teacher, teacher, temperatures=(2.0,))
    assert all(abs(value) < 1e-15 for value in alike.values())


@pytest.mark.slow
def test_mlkd_leaves_examples_out_and_is_finite_at_any_margin():
    student, teacher, _ = random_batch(5, 4)
    where = np.array([True, False, True, True, False])
    expected = losses.mlkd(student[where], teacher[where], temperatures=(2.0,))
    student[~where], teacher[~where] = np.nan, np.inf
    total = jax.grad(lambda z, v, where=None: sum(losses.mlkd(z, v, temperatures=(1.0,), where=where).values()))
    found = losses.mlkd(student, teacher, temperatures=(2.0,), where=where)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)
    np.testing.assert_array_equal(total(jnp.asarray(student), teacher, where)[~where], 0.0)
    far = 1e4 * np.eye(4, dtype=np.float32)
    assert np.isfinite(total(jnp.asarray(far), far[::-1])).all()


@pytest.mark.parametrize("temperatures", [(), (2.0, 0.0)])
def test_mlkd_names_its_temperatures(temperatures):
    with pytest.raises(ValueError, match="temperatures must"):
        losses.mlkd(*random_batch(5, 4)[:2], temperatures=temperatures)
