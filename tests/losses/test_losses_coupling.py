"""The coupling of the two gradients: conventions, distances, batch sizes, and how it enters DGKD."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.batches import compiled, random_batch
from scipy import special, stats

from dgkd_jax import losses

TEMPERATURE = 2.0
KAPPA = 0.3
COUPLINGS = tuple(itertools.product(losses.CONVENTIONS, losses.DISTANCES))
OPTIONS = [{"convention": convention, "distance": distance, "kappa": KAPPA} for convention, distance in COUPLINGS]

pytestmark = pytest.mark.usefixtures("float64")


def couplings(student, teacher, labels):
    """The coupling term in every convention and distance, in the order of `COUPLINGS`."""
    gradients = [
        gradient(student, teacher, labels, temperature=TEMPERATURE)
        for gradient in (losses.tckd_gradient, losses.nckd_gradient)
    ]
    return jnp.stack([losses.coupling_of_gradients(*gradients, **option) for option in OPTIONS])


def named(values):
    return dict(zip(COUPLINGS, np.asarray(values), strict=True))


@pytest.fixture(scope="module")
def batch():
    return random_batch(4, 6)


@pytest.fixture(scope="module")
def value(batch):
    """Coupling terms of `batch`: {(convention, distance): number}."""
    with jax.enable_x64(True):
        return named(compiled(couplings)(*batch))


@pytest.fixture(scope="module")
def gradient(batch):
    """Gradients of the coupling terms of `batch` with respect to the student's logits, by autodiff."""
    with jax.enable_x64(True):
        return named(compiled(jax.jacrev(couplings))(*batch))


def reference_gradients(student, teacher, labels):
    """∇TCKD and ∇NCKD of every sample, straight from the formulas."""
    s, t = (special.softmax(logits / TEMPERATURE, axis=-1) for logits in (student, teacher))
    target = np.eye(student.shape[-1])[labels]
    p, q = (s * target).sum(-1, keepdims=True), (t * target).sum(-1, keepdims=True)
    s_rest, t_rest = s * (1 - target) / (1 - p), t * (1 - target) / (1 - q)
    return TEMPERATURE * (p - q) * (target - s_rest), TEMPERATURE * (s_rest - t_rest)


def reference_distances(student, teacher, labels):
    """Mean over the samples of each distance between the two gradients, by numpy and scipy."""
    tckd, nckd = reference_gradients(student, teacher, labels)
    classes = np.arange(student.shape[-1])
    rows = list(zip(tckd, nckd, strict=True))
    return {
        "mse": np.mean([np.sum((a - b) ** 2) for a, b in rows]),
        "cosine": np.mean([1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in rows]),
        "kl": np.mean([stats.entropy(abs(b), abs(a)) for a, b in rows]),
        "wasserstein": np.mean([stats.wasserstein_distance(classes, classes, abs(a), abs(b)) for a, b in rows]),
    }


def test_conventions_and_distances_are_their_definitions(batch, value):
    distances = reference_distances(*batch)
    for distance, mean in distances.items():
        literal = mean / (4**2 * 6) if distance == "mse" else mean
        expected = {
            "per_sample": mean,
            "literal": literal,
            "normalized": literal / (literal + 1e-8),
            "self_normalized": mean / (mean + KAPPA),
        }
        for convention, number in expected.items():
            np.testing.assert_allclose(
                value[convention, distance], number, rtol=1e-12, err_msg=f"{convention} {distance}"
            )


def test_per_sample_and_literal_are_the_expanded_formulas(batch, value):
    student, teacher, labels = batch
    s, t = (special.softmax(logits / TEMPERATURE, axis=-1) for logits in (student, teacher))
    is_target = np.eye(6, dtype=bool)[labels]
    delta = s[is_target] - t[is_target]
    s_rest, t_rest = (x[~is_target].reshape(4, 5) / (1 - x[is_target])[:, None] for x in (s, t))
    squares = TEMPERATURE**2 * (delta**2 + np.sum(((1 + delta)[:, None] * s_rest - t_rest) ** 2, axis=-1))
    np.testing.assert_allclose(value["per_sample", "mse"], squares.mean(), rtol=1e-13)
    np.testing.assert_allclose(value["literal", "mse"], squares.sum() / (4**3 * 6), rtol=1e-13)
    # As the PyTorch code has it: `mse_loss` of the gradients of the batch means.
    of_batch_means = [gradients / 4 for gradients in reference_gradients(*batch)]
    np.testing.assert_allclose(value["literal", "mse"], np.mean(np.subtract(*of_batch_means) ** 2), rtol=1e-13)


def test_kl_is_log_2_and_a_divergence_among_the_non_targets(batch, value):
    student, _, labels = batch
    _, nckd = reference_gradients(*batch)
    rest = ~np.eye(6, dtype=bool)[labels]
    gap = np.abs(nckd[rest]).reshape(4, 5)
    s_rest = special.softmax(student[rest].reshape(4, 5) / TEMPERATURE, axis=-1)
    expected = np.log(2) + np.mean(stats.entropy(gap, s_rest, axis=-1))
    np.testing.assert_allclose(value["per_sample", "kl"], expected, rtol=1e-13)


@pytest.mark.slow
def test_gradients_of_the_coupling_are_those_of_finite_differences(batch, gradient):
    student, teacher, labels = batch
    evaluate, step = compiled(couplings), 1e-5

    def objective(z):
        # What the conventions with a guard descend is the logarithm; their own value is nearly constant.
        value = named(evaluate(z, teacher, labels))
        for distance in losses.DISTANCES:
            value["normalized", distance] = np.log(value["literal", distance] + 1e-8)
            value["self_normalized", distance] = np.log(value["per_sample", distance] + KAPPA)
        return np.array(list(value.values()))

    differences = np.zeros((len(COUPLINGS), *student.shape))
    for index in np.ndindex(student.shape):
        shift = np.zeros_like(student)
        shift[index] = step
        differences[:, *index] = (objective(student + shift) - objective(student - shift)) / (2 * step)
    for name, expected in named(differences).items():
        # Central differences are good to step² of the third derivative and to rounding / step.
        tolerance = 1e-8 * np.abs(expected).max()
        np.testing.assert_allclose(gradient[name], expected, rtol=0, atol=tolerance, err_msg=str(name))


@pytest.mark.slow
def test_gradient_coupling_is_the_coupling_of_the_gradients(batch, value):
    @compiled
    def gradient_couplings(*batch):
        return [losses.gradient_coupling(*batch, temperature=TEMPERATURE, **option) for option in OPTIONS]

    np.testing.assert_allclose(gradient_couplings(*batch), list(value.values()), rtol=1e-14)


@pytest.mark.slow
def test_directions_count_and_lengths_do_not_in_the_other_distances(batch, value):
    tckd, nckd = reference_gradients(*batch)
    for distance in ("cosine", "kl", "wasserstein"):
        for length in (1e-30, 1e-9, 1e9):
            ours = losses.coupling_of_gradients(
                length * tckd, nckd / length, convention="per_sample", distance=distance
            )
            np.testing.assert_allclose(ours, value["per_sample", distance], rtol=1e-12)


def test_a_gradient_of_zero_has_no_direction():
    zero, some = np.zeros((2, 4)), np.array([[0.0, 1.0, -2.0, 1.0], [-3.0, 1.0, 1.0, 1.0]])
    for distance, expected in (("cosine", 1.0), ("kl", 0.0), ("wasserstein", 0.0)):
        distance_of = partial(losses.coupling_of_gradients, convention="per_sample", distance=distance)
        program = compiled(jax.value_and_grad(distance_of, argnums=(0, 1)))
        for pair in ((zero, some), (some, zero), (zero, zero)):
            measured, gradients = program(*pair)
            assert measured == expected, distance
            assert not np.any(gradients), distance


def test_parity_batch_64_on_256_samples_is_the_mean_over_four_batches_of_64():
    whole = random_batch(256, 10)

    @partial(compiled, static_argnames=("convention", "parity_batch"))
    def coupling(*batch, convention="literal", parity_batch=None):
        return losses.gradient_coupling(
            *batch, temperature=TEMPERATURE, convention=convention, parity_batch=parity_batch
        )

    quarters = [[part[i : i + 64] for part in whole] for i in range(0, 256, 64)]
    mean = np.mean([coupling(*quarter) for quarter in quarters])
    np.testing.assert_allclose(coupling(*whole, parity_batch=64), mean, rtol=1e-13)
    np.testing.assert_allclose(coupling(*whole), mean / 16, rtol=1e-13)
    normalized = coupling(*whole, convention="normalized", parity_batch=64)
    np.testing.assert_allclose(normalized, mean / (mean + 1e-8), rtol=1e-13)


def test_repeating_the_batch_changes_only_what_divides_by_its_size(batch, value):
    thrice = [np.concatenate([part] * 3) for part in batch]
    repeated = named(compiled(couplings)(*thrice))
    literal = value["literal", "mse"] / 9
    expected = value | {
        ("literal", "mse"): literal,
        ("normalized", "mse"): literal / (literal + 1e-8),
    }
    for name in COUPLINGS:
        np.testing.assert_allclose(repeated[name], expected[name], rtol=1e-13, err_msg=str(name))


def test_every_leading_dimension_counts_as_batch(batch, value):
    folded = [part.reshape(2, 2, *part.shape[1:]) for part in batch]
    unfolded = named(compiled(couplings)(*folded))
    for name in COUPLINGS:
        np.testing.assert_allclose(unfolded[name], value[name], rtol=1e-13, err_msg=str(name))


@pytest.mark.slow
def test_dgkd_is_dkd_less_epsilon_times_the_coupling(batch, value, gradient):
    student, teacher, labels = batch
    weights = {"alpha": 0.7, "beta": 3.0, "temperature": TEMPERATURE}

    @compiled
    @partial(jax.value_and_grad, has_aux=True)
    def all_of_them(z, epsilon):
        dkd = jnp.mean(losses.dkd(z, teacher, labels, **weights))
        dgkd = [losses.dgkd(z, teacher, labels, epsilon=epsilon, **weights, **option) for option in OPTIONS]
        return sum(dgkd) - len(COUPLINGS) * dkd, (dkd, jnp.stack(dgkd))

    for epsilon in (-2.0, 0.0, 0.1, 6.0):
        (_, (dkd, dgkd)), slope = all_of_them(student, epsilon)
        for name, loss in named(dgkd).items():
            np.testing.assert_allclose(loss, dkd - epsilon * value[name], rtol=1e-13, err_msg=str(name))
        np.testing.assert_allclose(slope, -epsilon * sum(gradient.values()), rtol=1e-12, atol=1e-13)


def test_positive_epsilon_parts_the_gradients_and_negative_epsilon_aligns_them(batch, value):
    student, teacher, labels = batch

    @compiled
    def descend(z, epsilon):
        def loss(z):
            return losses.dgkd(
                z,
                teacher,
                labels,
                alpha=0.0,
                beta=0.0,
                epsilon=epsilon,
                temperature=TEMPERATURE,
                convention="per_sample",
            )

        return z - 0.1 * jax.grad(loss)(z)

    before = value["per_sample", "mse"]
    apart, together = (reference_distances(descend(student, sign), teacher, labels)["mse"] for sign in (1.0, -1.0))
    assert together < before < apart


@pytest.mark.slow
def test_nothing_is_lost_or_learnt_where_the_student_is_the_teacher():
    _, teacher, labels = random_batch(4, 6)

    mixture = np.random.default_rng(1).standard_normal(5 * 4 + len(COUPLINGS))

    @compiled
    @partial(jax.grad, has_aux=True)
    def gradient_and_values(z):
        at = {"temperature": TEMPERATURE}
        values = jnp.concatenate(
            [
                losses.tckd(z, teacher, labels, **at),
                losses.nckd(z, teacher, labels, **at),
                losses.kd(z, teacher, **at),
                losses.dkd(z, teacher, labels, alpha=1.0, beta=8.0, **at),
                losses.logit_mse(z, teacher),
                couplings(z, teacher, labels),
            ]
        )
        return mixture @ values, values

    gradient, values = gradient_and_values(teacher)
    # Zero but for the last places of the products that autodiff sums to q − q and t̂ − t̂.
    np.testing.assert_allclose(gradient, 0.0, atol=1e-14)
    per_sample, coupling = np.split(values, [5 * 4])
    assert not np.any(per_sample)
    for (convention, distance), number in named(coupling).items():
        if distance == "cosine":  # two gradients of zero are orthogonal
            guard = {"normalized": 1e-8, "self_normalized": KAPPA}.get(convention, 0.0)
            np.testing.assert_allclose(number, 1 / (1 + guard), rtol=1e-15)
        else:
            assert number == 0.0, (convention, distance)


@pytest.mark.slow
def test_literal_hardly_trains_and_the_guard_of_normalized_ends_with_the_batch_size():
    """The facts of the derivation: ε = 6, T = 4, β = 8, a teacher that is often right, a student that is less so."""

    @compiled
    def measure(z, v, y):
        dkd = jax.grad(lambda z: jnp.mean(losses.dkd(z, v, y, alpha=1.0, beta=8.0, temperature=4.0)))(z)
        coupling, slope = jax.value_and_grad(losses.gradient_coupling)(z, v, y, temperature=4.0, convention="literal")
        return 6 * jnp.linalg.norm(slope) / jnp.linalg.norm(dkd), coupling / (coupling + 1e-8)

    results = {}
    for samples, classes in ((64, 100), (4096, 1000)):
        student, teacher, labels = (x.astype(np.float32) for x in random_batch(samples, classes, scale=4.0))
        labels = labels.astype(np.int32)
        teacher[np.arange(samples), labels] += 16
        student[np.arange(samples), labels] += 8
        results[samples] = measure(student, teacher, labels)

    share, guard = results[64]
    assert 1e-7 < share < 1e-6
    assert 0.98 < guard < 1.0
    share, guard = results[4096]
    assert share < 1e-10
    assert guard < 0.01


def own_logits(student, teacher, labels, temperature=TEMPERATURE, **options):
    return losses.gradient_coupling(
        student, teacher, labels, temperature=temperature, wrt="own_logits", **{"convention": "per_sample"} | options
    )


def by_autodiff_in_own_logits(student, teacher, labels):
    """Both gradients by `jax.grad`, each cut to its own coordinates, through `coupling_of_gradients`."""
    is_target = jnp.arange(student.shape[-1]) == labels[:, None]
    of_target, of_nontarget = (
        jax.grad(lambda z, loss=loss: loss(z, teacher, labels, temperature=TEMPERATURE).sum())(student)
        for loss in (losses.tckd, losses.nckd)
    )
    cut = jnp.where(is_target, of_target, 0), jnp.where(is_target, 0, of_nontarget)
    return jnp.stack([losses.coupling_of_gradients(*cut, convention=c, kappa=KAPPA) for c in losses.CONVENTIONS])


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
def test_in_own_logits_each_gradient_counts_in_its_own_coordinates_only(scale):
    """Values and gradients in all conventions; the closed form of G; a traced temperature has another program."""
    batch = random_batch(8, 6, scale=scale)

    def ours(*batch, temperature=TEMPERATURE):
        each = (own_logits(*batch, temperature, convention=c, kappa=KAPPA) for c in losses.CONVENTIONS)
        return jnp.stack(list(each))

    found, expected = (
        compiled(lambda *b, f=f: (f(*b), jax.jacrev(f)(*b)))(*batch) for f in (ours, by_autodiff_in_own_logits)
    )
    for value, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-10, atol=1e-10 * np.abs(other).max())
    np.testing.assert_allclose(compiled(ours)(*batch, temperature=TEMPERATURE), expected[0], rtol=1e-12)
    s, t = (special.softmax(logits / TEMPERATURE, axis=-1) for logits in batch[:2])
    target = np.eye(6)[batch[2]]
    p, q = ((x * target).sum(-1) for x in (s, t))
    shapes = [x * (1 - target) / (x * (1 - target)).sum(-1, keepdims=True) for x in (s, t)]
    closed = TEMPERATURE**2 * ((p - q) ** 2 + ((shapes[0] - shapes[1]) ** 2).sum(-1))
    np.testing.assert_allclose(own_logits(*batch), closed.mean(), rtol=1e-9)  # 1 − p cancels in this simple form


def test_in_own_logits_another_distance_has_no_meaning_and_is_refused():
    batch = random_batch(2, 3)
    with pytest.raises(ValueError, match="'cosine' compares .* they have none in common; take distance='mse'"):
        own_logits(*batch, distance="cosine")
    with pytest.raises(ValueError, match="wrt"):
        losses.gradient_coupling(*batch, temperature=1.0, convention="per_sample", wrt="params")
