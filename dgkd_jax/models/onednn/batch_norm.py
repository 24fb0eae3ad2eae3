"""BatchNorm in training as JAX primitives in C++ for CPUs: differentiable in every mode and order.

A network calls `_normalise`. Its derivative, `_push_forward`, is linear in the tangents of x, scale and bias. The
transpose of that is `_pull_back`, and the transpose of `_pull_back` is `_push_forward` again. What the C++ does not do
(derivatives by the other arguments, forward mode, `jax.vmap`, several devices, other platforms, programs that are
exported) is XLA's, from the formulas below.

Shapes: values [batch, …, channels], float32 or bfloat16; scale, bias, mean, var [channels], float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dgkd_jax.models import batch_statistics
from dgkd_jax.models.onednn import library

_DTYPES = ("float32", "bfloat16")


def takes(x: jax.Array, scale: jax.Array) -> bool:
    """Whether the library is there and normalises such values."""
    fits = x.ndim >= 2 and x.dtype in _DTYPES and scale.dtype == "float32"
    return fits and library.may_take(x, scale) and library.find() is not None


def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y = (x − mean)/√(var + epsilon)·scale + bias in the dtype of x, the mean and the biased variance of each channel.

    Args:
        x: values [batch, …, channels]; `takes` says yes to it.
        scale, bias: [channels], float32.
        epsilon: added to the variance, greater than 0.
    """
    return tuple(_normalise.bind(x, scale, bias, epsilon=epsilon))


# ------------------------------------------------------------------------------------------------------- by XLA


def _axes(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _normalise_by_xla(x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float) -> list[jax.Array]:
    mean, var, centred = batch_statistics.in_two_passes(x.astype(jnp.float32), _axes(x))
    y = centred * (scale * jax.lax.rsqrt(var + epsilon)) + bias
    return [y.astype(x.dtype), mean.reshape(scale.shape), var.reshape(scale.shape)]


def _push_forward_by_xla(of_x, of_scale, of_bias, x, scale, mean, var, *, epsilon: float) -> list[jax.Array]:
    """The tangent of y from those of x, scale and bias."""
    rate = jax.lax.rsqrt(var + epsilon)
    moved, normal = of_x.astype(jnp.float32), (x.astype(jnp.float32) - mean) * rate
    of_normal = rate * (moved - jnp.mean(moved, _axes(x)) - normal * jnp.mean(moved * normal, _axes(x)))
    return [(scale * of_normal + of_scale * normal + of_bias).astype(x.dtype)]


def _pull_back_by_xla(of_y, x, scale, mean, var, *, epsilon: float) -> list[jax.Array]:
    """The gradients with respect to x, scale and bias from that with respect to y."""
    rate = jax.lax.rsqrt(var + epsilon)
    pulled, normal = of_y.astype(jnp.float32), (x.astype(jnp.float32) - mean) * rate
    of_bias, of_scale = jnp.sum(pulled, _axes(x)), jnp.sum(pulled * normal, _axes(x))
    count = x.size // x.shape[-1]
    of_x = scale * rate * (pulled - of_bias / count - normal * (of_scale / count))
    return [of_x.astype(x.dtype), of_scale, of_bias]


# ---------------------------------------------------------------------------------------------------- derivatives


def _differentiate_normalise(primals, tangents, *, epsilon: float):
    x, scale, bias = primals
    y, mean, var = _normalise.bind(x, scale, bias, epsilon=epsilon)
    of_x, of_scale, of_bias = map(ad.instantiate_zeros, tangents)
    (of_y,) = _push_forward.bind(of_x, of_scale, of_bias, x, scale, mean, var, epsilon=epsilon)
    moved = of_x.astype(jnp.float32)
    # Σ(x − mean) = 0, so the mean's own change has no part in the variance's.
    of_var = 2 * jnp.mean((x.astype(jnp.float32) - mean) * moved, _axes(x))
    return [y, mean, var], [of_y, jnp.mean(moved, _axes(x)), of_var]


def _differentiate_linear(primitive: Primitive, by_xla, linear: int, primals, tangents, *, epsilon: float):
    """Of a primitive that is linear in its first arguments, as many as `linear`."""
    if all(type(tangent) is ad.Zero for tangent in tangents[linear:]):
        moved = map(ad.instantiate_zeros, tangents[:linear])
        bind = partial(primitive.bind, epsilon=epsilon)
        return bind(*primals), bind(*moved, *primals[linear:])
    return jax.jvp(partial(by_xla, epsilon=epsilon), primals, tuple(map(ad.instantiate_zeros, tangents)))


def _transpose_push_forward(cotangents, *arguments, epsilon: float):
    (of_y,), known = cotangents, arguments[3:]
    return [*_pull_back.bind(ad.instantiate_zeros(of_y), *known, epsilon=epsilon), *[None] * len(known)]


def _transpose_pull_back(cotangents, *arguments, epsilon: float):
    known = arguments[1:]
    return [*_push_forward.bind(*map(ad.instantiate_zeros, cotangents), *known, epsilon=epsilon), *[None] * len(known)]


# ------------------------------------------------------------------------------------------------------- in C++


def _on_cpus(context: mlir.LoweringRuleContext, *operands, target: str, by_xla, epsilon: float):
    module = context.module_context
    compute = partial(by_xla, epsilon=epsilon)
    if getattr(module.axis_context, "num_devices", 1) == 1 and not module.lowering_parameters.for_export:
        results = [jax.ShapeDtypeStruct(result.shape, result.dtype) for result in context.avals_out]
        compute = partial(jax.ffi.ffi_call(f"{target}_{library.find().key}", results), epsilon=np.float32(epsilon))
    return mlir.lower_fun(compute, multiple_results=True)(context, *operands)


def _primitive(name: str, by_xla, *, target: str | None = None) -> Primitive:
    made = Primitive(f"batch_norm_{name}")
    made.multiple_results = True
    made.def_impl(jax.jit(made.bind, static_argnames="epsilon"))
    made.def_abstract_eval(
        lambda *operands, epsilon: jax.tree.map(jax.typeof, jax.eval_shape(partial(by_xla, epsilon=epsilon), *operands))
    )
    batching.primitive_batchers[made] = lambda operands, axes, *, epsilon: (
        (results := jax.vmap(partial(by_xla, epsilon=epsilon), axes)(*operands)),
        [0] * len(results),
    )
    mlir.register_lowering(made, mlir.lower_fun(by_xla, multiple_results=True))
    if target:
        mlir.register_lowering(made, partial(_on_cpus, target=target, by_xla=by_xla), platform="cpu")
    return made


_normalise = _primitive("normalise", _normalise_by_xla, target="dgkd_normalise")
_push_forward = _primitive("push_forward", _push_forward_by_xla)
_pull_back = _primitive("pull_back", _pull_back_by_xla, target="dgkd_pull_back")

ad.primitive_jvps[_normalise] = _differentiate_normalise
ad.primitive_jvps[_push_forward] = partial(_differentiate_linear, _push_forward, _push_forward_by_xla, 3)
ad.primitive_jvps[_pull_back] = partial(_differentiate_linear, _pull_back, _pull_back_by_xla, 1)
ad.primitive_transposes[_push_forward] = _transpose_push_forward
ad.primitive_transposes[_pull_back] = _transpose_pull_back
