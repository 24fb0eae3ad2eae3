"""Close to the teacher, under large offsets and at all temperatures: float32 against 60 digits."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from losses.batches import compiled

from dgkd_jax import losses
from dgkd_jax.losses import fused
from dgkd_jax.losses.target_split import target_mask

SCALES = (1e-4, 1e-2, 1.0, 1e2, 1e4)
TEMPERATURES = (1e-2, 0.5, 3.0, 1e3, 1e4)
# The student is the teacher with noise of this share of the logits' scale; 1: logits of its own. The offset is added to
# the student's logits, and 0.7 of it taken from the teacher's.
CASES = [(1e-6, 0.0), (1e-3, 1e4), (0.1, 0.0), (0.1, 1e6), (1.0, 0.0), (1.0, 1e4)]


def logits_of(classes, scale):
    """float32 logits of both for all `CASES`, and labels."""
    rng = np.random.default_rng([classes, int(1e6 * scale)])
    rows = []
    for near, offset in CASES:
        teacher = (scale * rng.standard_normal(classes)).astype(np.float32)
        noise = near * scale * rng.standard_normal(classes)
        student = (noise + teacher if near < 1 else noise).astype(np.float32)
        rows.append(((student + np.float32(offset)), (teacher - np.float32(0.7 * offset))))
    student, teacher = map(np.array, zip(*rows, strict=True))
    return student, teacher, rng.integers(0, classes, len(rows))


@functools.cache  # for it compiles once for each temperature, which the fused pass takes as a number
def program(temperature):
    """A function: batch -> {name: (value [batch], gradient [batch, classes])}, of the plain and of the fused path."""

    def of_fused(part):
        return lambda z, v, y: fused.terms(z, v, target_mask(y, z), temperature)[part]

    per_sample = {
        "kd": lambda z, v, y: losses.kd(z, v, temperature=temperature),
        "tckd": partial(losses.tckd, temperature=temperature),
        "nckd": partial(losses.nckd, temperature=temperature),
        "fused tckd": of_fused(0),
        "fused nckd": of_fused(1),
    }

    @compiled
    def run(student, teacher, labels):
        found = {}
        for name, loss in per_sample.items():
            value, pull_back = jax.vjp(lambda z, loss=loss: loss(z, teacher, labels), student)
            found[name] = value, pull_back(jnp.ones_like(value))[0]
        return found

    return run


def oracle(student, teacher, label, temperature):
    """{name: (value, gradient)} of one sample, and the range of the differences that TCKD's log-odds gap is made of."""
    temperature = mpmath.mpf(float(temperature))
    z, v = ([mpmath.mpf(float(a)) / temperature for a in side] for side in (student, teacher))
    classes = range(len(z))
    z_exp, v_exp = ([mpmath.exp(a - max(side)) for a in side] for side in (z, v))
    rest = [j for j in classes if j != label]

    def softmax(parts, of):
        total = sum(parts[j] for j in of)
        return {j: parts[j] / total for j in of}

    def kl(s, t):
        return sum(t[j] * mpmath.log(t[j] / s[j]) for j in t if t[j])

    found = {}
    for name, of in (("kd", classes), ("nckd", rest)):
        s, t = softmax(z_exp, of), softmax(v_exp, of)
        gradient = [s[j] - t[j] if j in s else mpmath.mpf(0) for j in classes]
        found[name] = temperature**2 * kl(s, t), [temperature * g for g in gradient]
        shares = s
    (p, not_p), (q, not_q) = (
        (side[label] / sum(side), sum(side[j] for j in rest) / sum(side)) for side in (z_exp, v_exp)
    )
    binary = kl({0: p, 1: not_p}, {0: q, 1: not_q})
    gradient = [(p - q) * (1 if j == label else -shares[j]) for j in classes]
    found["tckd"] = temperature**2 * binary, [temperature * g for g in gradient]
    apart = [a - b for a, b in zip(z, v, strict=True)]
    return found, abs(p - q), max(apart) - min(apart)


TINY = 1e-34  # below it float32 has no full precision


# A few hundred classes once, since mpmath is slow; 131,072 below.
@pytest.mark.parametrize(
    ("classes", "temperature"), [*((c, t) for c in (2, 10) for t in TEMPERATURES), (200, 3.0)], ids=str
)
def test_every_value_and_gradient_keeps_five_digits_in_float32(classes, temperature):
    mpmath.mp.dps = 60
    for scale in SCALES if classes < 100 else (1e-4, 1.0):
        batch = logits_of(classes, scale)
        found = jax.tree.map(np.asarray, program(temperature)(*batch))
        for row, sample in enumerate(zip(*batch, strict=True)):
            expected, gap, spread = oracle(*sample, temperature)
            # TCKD's log-odds gap is a difference of averages: it keeps its digits relative to the range that they are
            # over. It enters the value by δ and in second order, and the gradient by ∂p/∂u ≤ 1/4.
            of_odds = 1e-6 * temperature * spread
            slack = {"tckd": (temperature * gap * of_odds + of_odds**2 / 4, of_odds / 4)}
            for name, (value, gradient) in found.items():
                right, slope = expected[name.split()[-1]]
                place = f"{name}, {classes} classes, scale {scale}, {CASES[row]}: {sample}"
                of_value, of_slope = slack.get(name.split()[-1], (0, 0))
                assert abs(mpmath.mpf(float(value[row])) - right) <= 1e-5 * right + of_value + TINY, place
                worst = max(abs(mpmath.mpf(float(a)) - b) for a, b in zip(gradient[row], slope, strict=True))
                assert worst <= 1e-5 * max(map(abs, slope)) + of_slope + TINY, place


@pytest.mark.slow
def test_a_vocabulary_of_131072_classes_close_to_the_teacher():
    """float64 has digits to spare: the plain and the fused path in float32 agree with it to 1e-5."""
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((2, 131072)).astype(np.float32)
    student = (teacher + 1e-3 * rng.standard_normal(teacher.shape)).astype(np.float32)
    labels = np.array([3, 70000])
    ours = program(4.0)(student, teacher, labels)
    with jax.enable_x64(True):
        exact = program(4.0)(student.astype(np.float64), teacher.astype(np.float64), labels)
    for name, (value, gradient) in exact.items():
        np.testing.assert_allclose(ours[name][0], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours[name][1], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=name)
