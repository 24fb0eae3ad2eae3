"""A dense convolution by oneDNN as a JAX primitive: differentiable in every mode and order, sharded by the batch.

⟨convolution(images, kernel), output⟩ is linear in each of the three arrays. The primitive computes its gradient with
respect to one of them, `of`, from the other two, in this order: the convolution itself, its input gradient or its
kernel gradient. So the derivatives of each of these are the other two. What oneDNN does not do (`jax.vmap`, other
platforms, programs that are exported) is XLA's.

Shapes: images [batch, height, width, in], kernel [height, width, in, out], output [batch, height, width, out].
"""

from functools import partial

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P

from dgkd_jax.models.cpu_convolution import Padding, by_library
from dgkd_jax.models.onednn import library

_ROLES = ("images", "kernel", "output")
_DTYPES = ("float32", "bfloat16")


def takes(x: jax.Array, kernel: jax.Array, *, padding: Padding, groups: int) -> bool:
    """Whether oneDNN is there and computes this convolution. Arguments: those of `cpu_convolution.by_library`."""
    if groups != 1 or x.ndim != 4 or kernel.ndim != 4 or x.dtype != kernel.dtype or x.dtype not in _DTYPES:
        return False
    if not library.may_take(x, kernel):
        return False
    for axis, zeros in enumerate(padding):
        if min(zeros) < 0 or x.shape[1 + axis] + sum(zeros) < kernel.shape[axis]:
            return False
    found = library.find()
    return found is not None and (x.dtype == "float32" or found.takes_bfloat16)


def convolution(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Padding) -> jax.Array:
    """As `cpu_convolution.by_library` in one group, for what `takes` says yes to."""
    shape = jax.eval_shape(partial(by_library, stride=stride, padding=padding, groups=1), x, kernel).shape
    return _gradient.bind(x, kernel, of="output", sides=shape[1:3], stride=stride, padding=padding)


def _result(first: jax.Array, second: jax.Array, *, of: str, sides: tuple[int, int], **_) -> jax.ShapeDtypeStruct:
    """Shape and dtype of what is computed; `sides` are its height and width."""
    shapes = {
        "images": lambda kernel, output: (output[0], *sides, kernel[2]),
        "kernel": lambda images, output: (*sides, images[3], output[3]),
        "output": lambda images, kernel: (images[0], *sides, kernel[3]),
    }
    return jax.ShapeDtypeStruct(shapes[of](first.shape, second.shape), first.dtype)


def _by_xla(first: jax.Array, second: jax.Array, *, stride: int, padding: Padding, **of_what) -> jax.Array:
    forward = partial(by_library, stride=stride, padding=padding, groups=1)
    result = _result(first, second, **of_what)
    if of_what["of"] == "images":
        return jax.linear_transpose(lambda images: forward(images, first), result)(second)[0]
    if of_what["of"] == "kernel":
        return jax.linear_transpose(lambda kernel: forward(first, kernel), result)(second)[0]
    return forward(first, second)


def _by_onednn(first: jax.Array, second: jax.Array, *, stride: int, padding: Padding, **of_what) -> jax.Array:
    (top, bottom), (left, right) = padding
    numbers = {"stride": stride, "top": top, "bottom": bottom, "left": left, "right": right}
    numbers["of"] = _ROLES.index(of_what["of"])
    call = jax.ffi.ffi_call(f"dgkd_convolve_{library.find().key}", _result(first, second, **of_what))
    return call(first, second, **{name: np.int64(number) for name, number in numbers.items()})


def _on_each_device(first: jax.Array, second: jax.Array, *, devices: int, of: str, **options) -> jax.Array:
    """Each device computes its part of the batch; the kernel's gradient is the sum over the devices.

    A `shard_map` over a mesh of its own, because a primitive does not know the program's. `custom_partitioning` would
    put an address into the program, so that the compilation cache never finds it again.
    """
    compute, batch = partial(_by_onednn, of=of, **options), (second if of == "images" else first).shape[0]
    if devices == 1 or batch % devices:
        return compute(first, second)
    specs = {"images": P("batch"), "kernel": P(), "output": P("batch")}
    mapped = jax.shard_map(
        lambda *parts: jax.lax.psum(compute(*parts), "batch") if of == "kernel" else compute(*parts),
        mesh=jax.sharding.AbstractMesh((devices,), ("batch",)),
        in_specs=tuple(specs[role] for role in _ROLES if role != of),
        out_specs=specs[of],
        check_vma=False,
    )
    return mapped(first, second)


def _lower_on_cpus(context: mlir.LoweringRuleContext, *operands, **options):
    module = context.module_context
    compute = partial(_on_each_device, devices=getattr(module.axis_context, "num_devices", 1), **options)
    if module.lowering_parameters.for_export:
        compute = partial(_by_xla, **options)
    return mlir.lower_fun(compute, multiple_results=False)(context, *operands)


def _transpose(which: int, cotangent: jax.Array, *operands, of: str, sides: tuple[int, int], **options) -> jax.Array:
    """The gradient with respect to operand `which`; `cotangent` has the place of what was computed."""
    del sides
    roles = [role for role in _ROLES if role != of]
    known = {of: cotangent, roles[1 - which]: operands[1 - which]}
    shape = operands[which].aval.shape
    sides = shape[:2] if roles[which] == "kernel" else shape[1:3]
    return _gradient.bind(*(known[role] for role in _ROLES if role in known), of=roles[which], sides=sides, **options)


_gradient = Primitive("onednn_convolution")
_gradient.def_impl(jax.jit(_gradient.bind, static_argnames=("of", "sides", "stride", "padding")))
_gradient.def_abstract_eval(lambda *operands, **options: jax.typeof(_result(*operands, **options)))
ad.defbilinear(_gradient, partial(_transpose, 0), partial(_transpose, 1))
batching.primitive_batchers[_gradient] = lambda operands, axes, **options: (
    jax.vmap(partial(_by_xla, **options), axes)(*operands),
    0,
)
mlir.register_lowering(_gradient, mlir.lower_fun(_by_xla, multiple_results=False))
mlir.register_lowering(_gradient, _lower_on_cpus, platform="cpu")
