r"""The softmaxes of student and teacher over the same classes, and their differences to full relative precision.

All losses of this package start here. The naive difference of two log-softmaxes loses every digit where student and
teacher are close, so x = log ŝ − log t̂ is computed from differences of logits, and the divergence from x:

    KL(t̂ ‖ ŝ) = Σ_j t̂_j·(e^x_j − 1 − x_j)          ŝ_j − t̂_j = t̂_j·(e^x_j − 1)

(The added terms vanish, since both shares sum to 1.) No summand is negative, so nothing cancels; and an error that all
x_j share changes the sum in second order only.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero


class LogMass(NamedTuple):
    """log Σ_j exp(logit_j/T) over some classes for student and teacher, in parts whose differences keep their digits.

    The sum of one side is exp(highest/T + log_sum). The student's log-sum less the teacher's is
    (top_student − top_teacher)/T + growth.
    """

    there: tuple[jax.Array, jax.Array]  # [...] whether the side has any of the classes
    highest: tuple[jax.Array, jax.Array]  # [...] 0 where it has none
    log_sum: tuple[jax.Array, jax.Array]  # [...]
    top: tuple[jax.Array, jax.Array]  # [...] both logits of the teacher's top class
    growth: jax.Array  # [...]


class SoftmaxPair(NamedTuple):
    """Both softmaxes over some classes at temperature T; 0 at the other classes."""

    student: jax.Array  # [..., classes] ŝ
    teacher: jax.Array  # [..., classes] t̂
    gap: jax.Array  # [..., classes] ŝ − t̂
    summands: jax.Array  # [..., classes] of KL(t̂ ‖ ŝ), none negative
    mass: LogMass


@jax.custom_jvp
def compare(student_logits: jax.Array, teacher_logits: jax.Array, inside: jax.Array, temperature) -> SoftmaxPair:
    """Compare the softmaxes of student and teacher over the classes that `inside` selects.

    A logit of −inf means that the side has not that class, whose share there is 0. Where only the student lacks a
    class, the divergence is +inf. Where the student or the teacher has none of the classes, it is 0.

    Args:
        student_logits, teacher_logits: `[..., classes]` of one dtype, float32 or float64.
        inside: bool `[..., classes]`.
        temperature: T > 0.

    Derivatives with respect to the teacher's logits are those of constants.
    """
    return _compare(student_logits, teacher_logits, inside, temperature)


@functools.partial(compare.defjvp, symbolic_zeros=True)
def _compare_derivative(primals, tangents):
    """By dx_j = (dz_j − Σ_i ŝ_i·dz_i) / T. Autodiff of the formulas below would lose it where a ŝ_j is nearly 1."""
    logits, _, inside, temperature = primals
    of_logits, _, _, of_temperature = tangents
    pair = compare(*primals)
    tangent = jax.tree.map(_no_tangent, pair)
    if not isinstance(of_logits, SymbolicZero):
        # Relative to the student's top class: of a share of nearly 1, the difference from the mean would cancel.
        is_top = inside & (logits == pair.mass.highest[0][..., None])
        count = jnp.maximum(jnp.sum(is_top, axis=-1, keepdims=True), 1)
        of_top = jnp.sum(jnp.where(is_top, of_logits, 0.0), axis=-1, keepdims=True) / count
        apart = jnp.where(is_top & (count == 1), 0.0, of_logits - of_top)  # a constant 0, in reverse mode too
        mean = jnp.sum(pair.student * apart, axis=-1, keepdims=True)
        of_x = (apart - mean) / temperature
        of_sum = (of_top + mean)[..., 0] / temperature
        tangent = tangent._replace(
            student=pair.student * of_x,
            gap=pair.student * of_x,
            summands=pair.gap * of_x,
            mass=tangent.mass._replace(log_sum=(of_sum, tangent.mass.log_sum[1]), growth=of_sum),
        )
    if not isinstance(of_temperature, SymbolicZero):
        _, more = jax.jvp(lambda t: _compare(*primals[:3], t), (temperature,), (of_temperature,))
        tangent = jax.tree.map(lambda a, b: a if a.dtype == jax.dtypes.float0 else a + b, tangent, more)
    return pair, tangent


def _no_tangent(array: jax.Array) -> Any:
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return jnp.zeros_like(array) if is_float else np.zeros(array.shape, jax.dtypes.float0)


@jax.jit  # traced once for all losses of a program, and compiled once outside of programs
def _compare(z: jax.Array, v: jax.Array, inside: jax.Array, temperature) -> SoftmaxPair:
    z_there, v_there = inside & (z != -jnp.inf), inside & (v != -jnp.inf)  # NaN counts as there, and stays NaN
    z_any, v_any = (jnp.any(there, axis=-1, keepdims=True) for there in (z_there, v_there))
    both = z_there & v_there
    lacks = jnp.any(v_there & ~z_there, axis=-1, keepdims=True)
    z_highest, v_highest = _highest(z, z_there), _highest(v, v_there)
    z_exp, v_exp = (
        jnp.where(there, jnp.exp(jnp.where(there, logits - highest, 0.0) / temperature), 0.0)
        for logits, there, highest in ((z, z_there, z_highest), (v, v_there, v_highest))
    )
    z_sum, v_sum = (jnp.where(total == 0, 1.0, total)[..., None] for total in row_sums(z_exp, v_exp))
    s, t = z_exp * (1 / z_sum), v_exp * (1 / v_sum)

    # Logits are taken relative to the teacher's top class, whatever the student's logit there is.
    z_top = _highest(z, both & (v == v_highest))
    apart = jnp.where(both, difference_of_differences(z, v, z_top, v_highest), 0.0) / temperature
    ahead = (z_highest - z_top) / temperature
    raised = z_exp * (jnp.exp(jnp.minimum(ahead, _FAR)) / v_sum)  # exp((z − z_top)/T), relative to the teacher's sum
    (growth,) = row_sums(_excess_and_gap(apart, t, raised)[1])
    is_near = (jnp.abs(growth) < 0.5)[..., None]
    near = jnp.log1p(jnp.where(is_near, growth[..., None], 0.0))
    log_growth = jnp.where(is_near, near, ahead + jnp.log(z_sum) - jnp.log(v_sum))
    x = apart - log_growth

    comparable = z_any & v_any
    summands, gap = _excess_and_gap(x, t, s)
    summands = jnp.where(lacks & comparable, jnp.inf, jnp.where(both, summands, s))
    return SoftmaxPair(
        student=s,
        teacher=t,
        gap=jnp.where(comparable, jnp.where(both & ~lacks, gap, s - t), 0.0),
        summands=jnp.where(comparable, summands, 0.0),
        mass=LogMass(
            there=(z_any[..., 0], v_any[..., 0]),
            highest=(z_highest[..., 0], v_highest[..., 0]),
            log_sum=(jnp.log(z_sum)[..., 0], jnp.log(v_sum)[..., 0]),
            top=(z_top[..., 0], v_highest[..., 0]),
            growth=log_growth[..., 0],
        ),
    )


def mass_of_one(student_logit: jax.Array, teacher_logit: jax.Array) -> LogMass:
    """`LogMass` of a single class, from its logits `[...]`."""
    logits = student_logit, teacher_logit
    there = tuple(logit != -jnp.inf for logit in logits)
    highest = tuple(jnp.where(is_there, logit, 0.0) for is_there, logit in zip(there, logits, strict=True))
    zero = jnp.zeros_like(student_logit)
    return LogMass(there, highest, (zero, zero), highest, zero)


class Odds(NamedTuple):
    """Log-odds of one set of classes against another. The probability of the first set is sigmoid(log-odds)."""

    student: jax.Array  # [...] u_s
    teacher: jax.Array  # [...] u_t
    apart: jax.Array  # [...] u_s − u_t


def odds(these: LogMass, others: LogMass, temperature) -> Odds:
    """Log-odds of `these` classes against the `others`: ±inf where a side has only one of the two sets."""
    sides = [
        jnp.where(
            these.there[i] & others.there[i],
            (these.highest[i] - others.highest[i]) / temperature + these.log_sum[i] - others.log_sum[i],
            jnp.where(these.there[i], jnp.inf, -jnp.inf),
        )
        for i in (0, 1)
    ]
    apart = difference_of_differences(*these.top, *others.top) / temperature + (these.growth - others.growth)
    four = these.there[0] & these.there[1] & others.there[0] & others.there[1]
    limit = jnp.where(sides[0] == sides[1], 0.0, sides[0] - sides[1])
    return Odds(*sides, jnp.where(four, apart, limit))


def binary_divergence(between: Odds) -> jax.Array:
    """KL([q, 1−q] ‖ [p, 1−p]), nats, with p = sigmoid(u_s) and q = sigmoid(u_t)."""
    return _half(between) + _half(Odds(*(-u for u in between)))


def probability_gap(between: Odds) -> jax.Array:
    """p − q, to full relative precision."""
    u_s, u_t, apart = between
    is_near = jnp.abs(apart) < 1
    q, growth = jax.nn.sigmoid(u_t), jnp.expm1(jnp.where(is_near, apart, 0.0))
    near = q * jax.nn.sigmoid(-u_t) * growth / (1 + q * growth)
    # Where both are near 1, the difference of 1 − q and 1 − p does not cancel.
    far = jnp.where(
        u_s + u_t > 0,
        jax.nn.sigmoid(-u_t) - jax.nn.sigmoid(-u_s),
        jax.nn.sigmoid(u_s) - jax.nn.sigmoid(u_t),
    )
    return jnp.where(is_near, near, far)


def _half(between: Odds) -> jax.Array:
    """q·(e^x − 1 − x) with x = log p − log q."""
    u_s, u_t, apart = between
    is_near = jnp.abs(apart) < 1
    near = -jnp.log1p(jax.nn.sigmoid(-u_t) * jnp.expm1(jnp.where(is_near, -apart, 0.0)))
    x = jnp.where(is_near, near, jax.nn.log_sigmoid(u_s) - jax.nn.log_sigmoid(u_t))
    return excess(x, jax.nn.sigmoid(u_t), jax.nn.sigmoid(u_s))


def excess(x: jax.Array, t: jax.Array, s: jax.Array) -> jax.Array:
    """t·(e^x − 1 − x) ≥ 0, where s = t·e^x; s where t is 0."""
    return _excess_and_gap(x, t, s)[0]


def _excess_and_gap(x: jax.Array, t: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """t·(e^x − 1 − x) and s − t, where s = t·e^x; both s where t is 0."""
    is_near = (jnp.abs(x) < 1) & (t > 0)
    near = jnp.where(is_near, x, 0)
    curve = near * near * _series(near)
    gap = s - t
    far = gap - t * jnp.where(is_near | (t == 0), 0, x)
    return jnp.where(is_near, t * curve, far), jnp.where(is_near, t * (near + curve), gap)


def _series(x: jax.Array) -> jax.Array:
    """(e^x − 1 − x) / x² for |x| < 1, to the precision of the dtype."""
    last = 12 if x.dtype == jnp.float32 else 19
    total = jnp.full_like(x, 1 / math.factorial(last))
    for n in range(last - 1, 1, -1):
        total = total * x + 1 / math.factorial(n)
    return total


# exp(_FAR) is far above any number of classes, so that `growth` is then above 1/2 and the far form is taken.
_FAR = 30.0


def _highest(logits: jax.Array, there: jax.Array) -> jax.Array:
    """[..., 1] largest logit that is there, 0 if none is."""
    highest = jnp.max(jnp.where(there, logits, -jnp.inf), axis=-1, keepdims=True)
    return jnp.where(highest == -jnp.inf, 0.0, highest)


def difference_of_differences(a, b, c, d) -> jax.Array:
    """(a − b) − (c − d), rounded once at the end."""
    left, left_error = _difference(a, b)
    right, right_error = _difference(c, d)
    total, error = _difference(left, right)
    return total + (error + (left_error - right_error))


def _difference(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """a − b as rounded, and what the rounding left out (Knuth's two-sum); 0 where that is not finite."""
    difference = a - b
    of_b = difference - a
    error = (a - (difference - of_b)) - (b + of_b)
    return difference, jnp.where(jnp.isfinite(error), error, 0.0)


def row_sums(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The sums of several arrays `[..., classes]` over the classes: `[...]` each.

    In two stages of about √classes each: adding 131,072 float32 numbers one after the other loses three digits. A TPU
    adds them in 128 lanes of eight in any case, and two stages would have it write each array once more.
    """
    in_one_stage = functools.partial(jnp.sum, axis=-1)
    return tuple(jax.lax.platform_dependent(each, tpu=in_one_stage, default=_in_two_stages) for each in arrays)


def _in_two_stages(array: jax.Array) -> jax.Array:
    *leading, classes = array.shape
    length = max(1, int(classes**0.5))
    whole = classes // length * length
    total = jnp.sum(jnp.sum(array[..., :whole].reshape(*leading, whole // length, length), axis=-1), axis=-1)
    return total + jnp.sum(array[..., whole:], axis=-1) if whole < classes else total
