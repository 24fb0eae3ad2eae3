"""Confident networks: finite wherever a float can be, and right where an oracle of 450 digits can tell."""

import decimal
import itertools
from decimal import Decimal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.batches import compiled

from dgkd_jax import losses

SIDES = {"student": (1, 0), "teacher": (0, 1), "both": (1, 1), "opposite": (1, -1)}


def with_margins(margins, *, classes, seed=0):
    """Logits in which one class is ahead or behind: every margin and sign, target or not, on every side.

    Returns:
        Student logits, teacher logits (float64, `[rows, classes]`) and labels `[rows]`.
    """
    rng = np.random.default_rng(seed)
    cases = list(itertools.product((*margins, *(-m for m in margins)), SIDES.values(), (0, 1)))
    labels = rng.integers(0, classes, len(cases))
    student, teacher = rng.standard_normal((2, len(cases), classes))
    for row, (margin, (of_student, of_teacher), beside_target) in enumerate(cases):
        index = (labels[row] + beside_target) % classes
        student[row, index] += margin * of_student
        teacher[row, index] += margin * of_teacher
    return student, teacher, labels


@compiled
@jax.vmap
def everything_of_one_sample(student, teacher, label):
    """Every loss, the gradient of their sum (not finite where one of them is not) and the diagnostics."""

    def values(z):
        sample, at = (z, teacher, label), {"temperature": 1.0}
        gradients = losses.tckd_gradient(*sample, **at), losses.nckd_gradient(*sample, **at)
        options = itertools.product(losses.CONVENTIONS, losses.DISTANCES)
        couplings = [losses.coupling_of_gradients(*gradients, convention=c, distance=d) for c, d in options]
        return jnp.stack(
            [
                losses.cross_entropy(z, label),
                losses.cross_entropy(z, label, label_smoothing=0.1),
                losses.kd(z, teacher, **at),
                losses.tckd(*sample, **at),
                losses.nckd(*sample, **at),
                losses.dkd(*sample, alpha=1.0, beta=8.0, **at),
                losses.dgkd(*sample, alpha=1.0, beta=8.0, epsilon=0.1, convention="per_sample", **at),
                losses.logit_mse(z, teacher),
                *(-6.0 * coupling for coupling in couplings),  # as `dgkd` has them, at a large ε
            ]
        )

    gradient = jax.grad(lambda z: jnp.sum(values(z)))(student)
    return values(student), gradient, losses.diagnostics(student, teacher, label, temperature=1.0)


# Beside 1e4, the margins whose exponentials are subnormal numbers (e^-87 to e^-104 in float32, e^-708 to e^-745 in
# float64) or have subnormal products: a reciprocal there overflows.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "margins"),
    [
        ("float32", (*np.arange(40.0, 110.0, 0.5), 1e3, 1e4)),
        ("float64", (*np.arange(345.0, 360.0, 0.5), *np.arange(695.0, 750.0, 0.5), 1e3, 1e4)),
    ],
)
def test_values_gradients_and_diagnostics_are_finite(dtype, margins):
    with jax.enable_x64(dtype == "float64"):
        student, teacher, labels = with_margins(margins, classes=5)
        student, teacher = student.astype(dtype), teacher.astype(dtype)
        values, gradient, diagnostics = everything_of_one_sample(student, teacher, labels)
    assert values.dtype == gradient.dtype == dtype
    for name, array in {"values": values, "gradient": gradient, **diagnostics}.items():
        bad = np.unique(np.argwhere(~np.isfinite(np.asarray(array)))[:, 0])
        assert not bad.size, f"{name}: {bad.size} samples, the first {student[bad[0]]} {teacher[bad[0]]}"


def oracle(student, teacher, label):
    """Losses and distances of one sample at temperature 1 by the textbook formulas, in `Decimal`."""

    def softmax(logits):
        exponentials = [z.exp() for z in logits]
        return [e / sum(exponentials) for e in exponentials]

    def kl(a, b):
        return sum((x * (x / y).ln() for x, y in zip(a, b, strict=True) if x), Decimal(0))

    def normalized(a):
        return [abs(x) / sum(map(abs, a)) for x in a]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    classes = range(len(student))
    s, t = softmax(student), softmax(teacher)
    p, q = s[label], t[label]
    rest = [j for j in classes if j != label]
    s_rest, t_rest = ([x[j] / (1 - x[label]) for j in rest] for x in (s, t))
    tckd = [(p - q) * (1 if j == label else -s[j] / (1 - p)) for j in classes]
    nckd = [0 if j == label else s[j] / (1 - p) - t[j] / (1 - q) for j in classes]
    steps = itertools.accumulate(x - y for x, y in zip(normalized(tckd), normalized(nckd), strict=True))
    return {
        "ce": -p.ln(),
        "kd": kl(t, s),
        "tckd": kl([q, 1 - q], [p, 1 - p]),
        "nckd": kl(t_rest, s_rest),
        "mse": sum((x - y) ** 2 for x, y in zip(tckd, nckd, strict=True)),
        "cosine": 1 - dot(tckd, nckd) / (dot(tckd, tckd) * dot(nckd, nckd)).sqrt(),
        "kl": kl(normalized(nckd), normalized(tckd)),
        "wasserstein": sum(map(abs, steps)),
    }


def in_decimal(logits):
    return [Decimal(float(z)) for z in logits]


@compiled
@jax.vmap
def values_and_gradients(student, teacher, label):
    """What `oracle` computes, and its derivatives with respect to the student's logits."""

    def values(z):
        coupling = partial(losses.gradient_coupling, temperature=1.0, convention="per_sample")
        return {
            "ce": losses.cross_entropy(z, label),
            "kd": losses.kd(z, teacher, temperature=1.0),
            "tckd": losses.tckd(z, teacher, label, temperature=1.0),
            "nckd": losses.nckd(z, teacher, label, temperature=1.0),
            **{distance: coupling(z, teacher, label, distance=distance) for distance in losses.DISTANCES},
        }

    return values(student), jax.jacrev(values)(student)


# Exact to 1e-11 (a logit of 300 has lost 5e-14), beside the rounding of terms of order 1 that cancel.
close = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-15)


@pytest.fixture(scope="module")
def confident():
    return with_margins((30.0, 100.0, 300.0), classes=4)


@pytest.fixture(scope="module")
def ours(confident):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, values_and_gradients(*confident))


@pytest.mark.slow
def test_values_are_right_at_large_margins(confident, ours):
    values, _ = ours
    with decimal.localcontext(prec=450):  # e^-300 is 1e-130, its square must still be seen beside 1
        for row, (student, teacher, label) in enumerate(zip(*confident, strict=True)):
            expected = oracle(in_decimal(student), in_decimal(teacher), label)
            for name, number in expected.items():
                close(values[name][row], float(number), err_msg=f"{name} of {student} {teacher} {label}")
            # TCKD does not cancel at all, however confident both are.
            np.testing.assert_allclose(values["tckd"][row], float(expected["tckd"]), rtol=1e-11)


@pytest.mark.slow
def test_gradients_are_right_at_large_margins(confident, ours):
    _, gradients = ours
    step = Decimal("1e-60")  # far below the e^-100 at which the distances have kinks
    with decimal.localcontext(prec=200):
        for row, (student, teacher, label) in enumerate(zip(*confident, strict=True)):
            if np.abs([student, teacher]).max() > 200:
                continue
            for index in range(len(student)):
                above, below = in_decimal(student), in_decimal(student)
                above[index] += step
                below[index] -= step
                rise, fall = (oracle(z, in_decimal(teacher), label) for z in (above, below))
                for name in rise:
                    slope = float((rise[name] - fall[name]) / (2 * step))
                    message = f"{name} of {student} {teacher} {label}"
                    # The logarithms that cancel in the gradient of `kl` reach 100.
                    close(gradients[name][row, index], slope, atol=1e-13, err_msg=message)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_tckd_of_a_student_at_a_margin_of_10000_is_the_asymptote(margin, dtype):
    """−log p or −log(1−p) is then the log-odds itself, and the other of them is 0."""
    with jax.enable_x64(dtype == "float64"):
        student = np.array([0.0, margin, 0.0], dtype)
        teacher = np.array([0.0, 0.5, 0.0], dtype)
        loss, gradient = compiled(jax.value_and_grad(losses.tckd))(student, teacher, 1, temperature=1.0)
    q = 1 / (1 + 2 * np.exp(-0.5))
    log_odds = abs(margin - np.log(2))
    expected = q * np.log(q) + (1 - q) * np.log(1 - q) + log_odds * (1 - q if margin > 0 else q)
    slope = (1.0 if margin > 0 else 0.0) - q
    tolerance = 4 * np.finfo(dtype).eps
    np.testing.assert_allclose(loss, expected, rtol=tolerance)
    np.testing.assert_allclose(gradient, slope * np.array([-0.5, 1.0, -0.5]), rtol=tolerance)
