"""The letters of docs/derivation.md, computed from plain softmaxes, and autodiff of `dgkd_jax.losses` per sample."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
from scipy import optimize, special

from dgkd_jax import losses

ALPHA, BETA = 1.0, 8.0
SAFE = min(ALPHA, BETA, (ALPHA + BETA) / 3)  # ε₀ of statement 13

# Each program runs a few times, so that optimising it costs more than it saves.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_batch(classes, temperature, scale, *, batch=256, seed=0):
    """Random logits of standard deviation `scale`·T; everything that the document names, by plain softmaxes."""
    rng = np.random.default_rng([classes, int(temperature), int(scale), seed])
    z, v = scale * temperature * rng.standard_normal((2, batch, classes))
    return split(z, v, rng.integers(0, classes, batch), temperature)


def split(z, v, labels, temperature):
    target = np.eye(z.shape[-1])[labels]
    student, teacher = (special.softmax(logits / temperature, axis=-1) for logits in (z, v))
    p, q = (student * target).sum(-1), (teacher * target).sum(-1)
    # 1 − p as the sum of the others, which does not cancel.
    s, t = (x * (1 - target) / (x * (1 - target)).sum(-1, keepdims=True) for x in (student, teacher))
    delta = ((1 - target) * (teacher - student)).sum(-1)
    g = s - t
    r = g + delta[:, None] * s
    c = -(g * s).sum(-1)
    squares = (s * s).sum(-1)
    return SimpleNamespace(
        logits=(z, v, labels),
        T=temperature,
        target=target,
        p=p,
        q=q,
        p_rest=(student * (1 - target)).sum(-1),
        q_rest=(teacher * (1 - target)).sum(-1),
        s=s,
        t=t,
        delta=delta,
        g=g,
        r=r,
        c=c,
        squares=squares,
        v=(student * target).sum(-1) * (student * (1 - target)).sum(-1),
        a=delta * (1 + squares) - c,
        m=target - s,
        spread_r=s * (r - (s * r).sum(-1, keepdims=True)),  # S(ŝ)·r
    )


class Closed:
    """Losses and gradients of each sample by the closed forms of statements 1 to 4, quick enough for searches."""

    @staticmethod
    def tckd(x):
        return x.T**2 * (special.kl_div(x.q, x.p) + special.kl_div(x.q_rest, x.p_rest))

    @staticmethod
    def nckd(x):
        return x.T**2 * special.kl_div(x.t, x.s).sum(-1)

    @staticmethod
    def coupling(x):
        return x.T**2 * (x.delta**2 + dot(x.r, x.r))

    @staticmethod
    def dkd_gradient(x, alpha=ALPHA, beta=BETA):
        return x.T * (alpha * x.delta[:, None] * x.m + beta * x.g)

    @staticmethod
    def coupling_gradient(x):
        return 2 * x.T * ((x.a * x.v)[:, None] * x.m + (1 + x.delta)[:, None] * x.spread_r)


def logits_of(p, shape, temperature):
    """Logits whose softmax at T has `p` at class 0 and, among the others, `shape` (of all samples or of each)."""
    p = np.atleast_1d(p)[:, None]
    return temperature * np.log(np.concatenate([p, (1 - p) * np.asarray(shape, float)], -1))


def hessian_parts(q, shape):
    """(αv·mmᵀ + βS, J) of statement 14 at a teacher with `q` at class 0 and `shape` among the others."""
    t = np.r_[0.0, np.asarray(shape, float)]
    m, spread = np.eye(len(t))[0] - t, np.diag(t) - np.outer(t, t)
    targets = q * (1 - q) * np.outer(m, m)
    return ALPHA * targets + BETA * spread, targets - spread


def random_teachers(sizes):
    """(q, t̂) with each of these numbers of non-target classes."""
    rng = np.random.default_rng(14)
    return [(rng.uniform(0.02, 0.98), rng.dirichlet(np.full(n, 0.7))) for n in sizes]


def tckd(z, v, labels, temperature):
    return losses.tckd(z, v, labels, temperature=temperature)


def nckd(z, v, labels, temperature):
    return losses.nckd(z, v, labels, temperature=temperature)


def dkd(z, v, labels, temperature):
    return losses.dkd(z, v, labels, temperature=temperature, alpha=ALPHA, beta=BETA)


def coupling(z, v, labels, temperature):
    """G_i, [batch]: `per_sample`'s mean of one sample each."""
    alone = partial(losses.gradient_coupling, temperature=temperature, convention="per_sample")
    return jax.vmap(lambda a, b, y: alone(a[None], b[None], y[None]))(z, v, labels)


@partial(compiled, static_argnums=0)
def _values(function, *inputs):
    return function(*inputs)


@partial(compiled, static_argnums=0)
def _gradients(function, z, *others):
    return jax.grad(lambda logits: function(logits, *others).sum())(z)


def values(function, x):
    """`function` of each sample, [batch]."""
    return np.array(_values(function, *x.logits, x.T))


def gradients(function, x):
    """Each sample's own gradient by autodiff, [batch, classes]."""
    return np.array(_gradients(function, *x.logits, x.T))


def dgkd(z, v, labels, temperature, epsilon, *, convention="per_sample", kappa=1e-8):
    settings = {"convention": convention, "kappa": kappa}
    weights = {"alpha": ALPHA, "beta": BETA, "epsilon": epsilon}
    return losses.dgkd(z, v, labels, temperature=temperature, **weights, **settings)


several_epsilons = compiled(jax.vmap(dgkd, (None, None, None, None, 0)))  # at several ε


def descend(loss, z):
    """Where L-BFGS with autodiff gradients ends that starts at `z`."""
    slope = compiled(jax.value_and_grad(lambda flat: loss(flat.reshape(z.shape))))

    def evaluate(flat):
        return [np.asarray(part) for part in slope(flat)]

    found = optimize.minimize(evaluate, z.ravel(), jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-10})
    return found.x.reshape(z.shape)


def assert_close(found, expected, tolerance=1e-10):
    """To rounding, relative to the largest entry: autodiff and softmax each round by 1e-16 times a sum's terms."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(np.max(np.abs(expected)), 1e-6))


def dot(a, b):
    return (a * b).sum(-1)
