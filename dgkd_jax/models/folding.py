"""BatchNorm folded into the convolution before it: what a frozen network computes, with less work.

In evaluation BatchNorm multiplies by γ/√(σ² + ε) and adds β − μγ/√(σ² + ε), both constant. The factor goes into the
convolution's kernel, and only the addition is left. Which BatchNorm follows which convolution is read off the traced
network, not off names: a convolution whose result goes to one BatchNorm and nowhere else. Others stay as they are, such
as those of pre-activation networks whose input is a sum.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from dgkd_jax.models import layers


class Pair(NamedTuple):
    """A convolution and the BatchNorm that its result goes to: their paths in the variables, and the latter's ε."""

    convolution: tuple[str, ...]
    batch_norm: tuple[str, ...]
    epsilon: float


def pairs(model: nn.Module, variables: Any, image_shape: tuple[int, int, int]) -> tuple[Pair, ...]:
    """Every convolution whose result is used by one BatchNorm only; traced, not run.

    Args:
        model: from `models.create`.
        variables: its variables, or their `jax.ShapeDtypeStruct`.
        image_shape: (height, width, channels) of the images.
    """
    made_by, taken_by = {}, {}  # name of the mark -> the module that put it there

    def mark(call, args, kwargs, context):
        module = context.module
        if isinstance(module, layers.Conv):
            name = f"result {len(made_by)} of a convolution"
            made_by[name] = module.path
            return checkpoint_name(call(*args, **kwargs), name)
        if isinstance(module, layers.BatchNorm):
            name = f"input {len(taken_by)} of a BatchNorm"
            taken_by[name] = (module.path, module.epsilon)
            return call(checkpoint_name(args[0], name), *args[1:], **kwargs)
        return call(*args, **kwargs)

    with nn.intercept_methods(mark):
        program = jax.make_jaxpr(lambda variables, images: model.apply(variables, images, features=True))(
            variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        ).jaxpr
    used = Counter(
        atom for equation in program.eqns for atom in equation.invars if isinstance(atom, jax.extend.core.Var)
    )
    used.update(atom for atom in program.outvars if isinstance(atom, jax.extend.core.Var))
    marks = [equation for equation in program.eqns if equation.primitive.name == "name"]
    results = {mark.outvars[0]: made_by[mark.params["name"]] for mark in marks if mark.params["name"] in made_by}
    # A module that is called twice has two results; its one kernel serves both.
    calls = Counter(made_by.values()) + Counter(path for path, _ in taken_by.values())
    found = []
    for norm in (mark for mark in marks if mark.params["name"] in taken_by):
        convolution = results.get(norm.invars[0])
        path, epsilon = taken_by[norm.params["name"]]
        if convolution and used[norm.invars[0]] == 1 and calls[convolution] == calls[path] == 1:
            found.append(Pair(convolution, path, epsilon))
    return tuple(found)


def fold(found: tuple[Pair, ...], variables: Any) -> dict:
    """The variables with each pair's BatchNorm folded: of it, only a "bias" is left.

    Args:
        found: from `pairs`.
        variables: {"params": …, "batch_stats": …} of the same network.

    Returns:
        Variables for `folded_apply`; leaves keep their dtypes, products are taken in at least float32.
    """
    leaves = flatten_dict(variables)
    for convolution, norm, epsilon in found:
        scale, bias = leaves.pop(("params", *norm, "scale")), leaves[("params", *norm, "bias")]
        mean, var = (leaves.pop(("batch_stats", *norm, leaf)) for leaf in ("mean", "var"))
        wide = layers.at_least_float32(scale.dtype)
        factor = scale.astype(wide) / jnp.sqrt(var.astype(wide) + epsilon)
        leaves[("params", *norm, "bias")] = (bias.astype(wide) - mean.astype(wide) * factor).astype(bias.dtype)
        for leaf in ("kernel", "bias"):
            path = ("params", *convolution, leaf)
            if path in leaves:
                leaves[path] = (leaves[path].astype(wide) * factor).astype(leaves[path].dtype)
    return unflatten_dict(leaves)


def folded_apply(model: nn.Module, found: tuple[Pair, ...]) -> Callable[..., Any]:
    """`model.apply` for variables from `fold`: in evaluation only.

    Args:
        model: from `models.create`.
        found: from `pairs`.

    Returns:
        A function of (variables, images, features=False), as `model.apply`.
    """
    folded = {pair.batch_norm for pair in found}

    def shift_only(call, args, kwargs, context):
        module = context.module
        if not (isinstance(module, layers.BatchNorm) and module.path in folded):
            return call(*args, **kwargs)
        (x,), wide = args, layers.at_least_float32(module.dtype)
        bias = module.get_variable("params", "bias").astype(wide)
        return (x.astype(wide) + bias).astype(module.dtype)

    def apply(variables: Any, images: jax.Array, *, features: bool = False):
        with nn.intercept_methods(shift_only):
            return model.apply(variables, images, train=False, features=features)

    return apply
