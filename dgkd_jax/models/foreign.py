"""A user's own network as an `Architecture`: a Linen module, an NNX module, or a pure function with its variables.

    foreign.architecture(MyLinenModule(width=8))                  # its own `init`, any collections, dropout
    foreign.architecture((my_linen_module, variables))            # the same, with values to begin from
    foreign.architecture(my_nnx_module)                           # begins from the module's own values
    foreign.architecture((apply, parameters))                     # apply(parameters, images) -> logits

Networks get normalised float32 images [batch, height, width, channels] and return logits [batch, classes]. Whether they
train is told by the argument `train`, `training`, `is_training`, `deterministic` or `use_running_average` of their call
if it has one of these, and to NNX modules also by `train()` and `eval()`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from dgkd_jax import own_code
from dgkd_jax.errors import BadInput
from dgkd_jax.models import initial_values
from dgkd_jax.models.architecture import Architecture

# Argument of a network's call -> whether it is true in training.
_MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
WANTED = (
    "a Flax Linen module, (module, variables), a Flax NNX module, or (function of parameters and images, parameters)"
)


def is_network(value: Any) -> bool:
    """Whether `architecture` takes it."""
    pair = isinstance(value, tuple) and len(value) == 2
    return isinstance(value, (nn.Module, nnx.Module)) or (pair and callable(value[0]))


def architecture(network: Any, *, role: str = "student", name: str = "") -> Architecture:
    """A user's network as an `Architecture`.

    Args:
        network: one of the kinds above.
        role: student or teacher, for messages.
        name: of the network; "": that of its class or function. `check` completes it.

    Raises:
        BadInput: it is none of them.
    """
    match network:
        case nn.Module():
            return _linen(network, None, name)
        case (nn.Module() as module, variables):
            return _linen(module, variables, name)
        case nnx.Module():
            found = _nnx(lambda seed: network, name or type(network).__name__)
            return found._replace(begins_from=found.initialise((), 0))
        case (apply, variables) if callable(apply) and isinstance(getattr(apply, "__self__", None), nn.Module):
            return _linen(apply.__self__, variables, name)
        case (apply, variables) if callable(apply):
            return _function(apply, variables, name)
    raise BadInput(f"the {role} is of type {type(network).__name__}; it must be {WANTED}")


def imported(text: str, *, key: str, num_classes: int) -> Architecture:
    """The network that an import path names: a module's class, or a function that makes a module.

    A class or function that has an argument `num_classes` gets the data set's unless the path gives it; an NNX class
    gets `rngs` of the run's seed.

    Raises:
        BadInput: it cannot be imported or made, or is no network.
    """
    found = own_code.load(text, key=key)
    takes = inspect.signature(found.value).parameters if callable(found.value) else {}
    more = {"num_classes": num_classes} if "num_classes" in takes else {}
    if isinstance(found.value, type) and issubclass(found.value, nnx.Module):

        def make(seed: int) -> nnx.Module:
            return found.called(key=key, **more, **({"rngs": nnx.Rngs(seed)} if "rngs" in takes else {}))

        return _nnx(make, text)
    is_value = isinstance(found.value, (nn.Module, nnx.Module, tuple)) and found.arguments is None
    made = found.value if is_value else found.called(key=key, **more)
    return architecture(made, role=key.split(".")[0], name=text)


def check(
    found: Architecture, *, role: str, data: str, num_classes: int, image_shape: tuple[int, int, int]
) -> Architecture:
    """Try a user's network on the shapes of a data set; returns it with its complete name. Computes nothing.

    Raises:
        BadInput: it cannot take the images, or its results are no logits of the data set's classes.
    """
    title = f"the {role} {found.name}"
    try:
        shapes = found.shapes(image_shape)
    except Exception as error:
        height, width, channels = image_shape
        raise BadInput(
            f"{title} cannot take the images of {data}, float32 [batch, {height}, {width}, {channels}]: {_line(error)}"
        ) from error
    if not jax.tree.leaves(shapes["params"]):
        raise BadInput(f"{title} has no parameters to train")
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = []
    for train in (False, True):
        try:
            traced.append(
                jax.make_jaxpr(functools.partial(_try, found.apply, train), return_shape=True)(shapes, images, key)
            )
        except BadInput as problem:
            raise BadInput(f"{title} {problem}") from problem
        except Exception as error:
            mode = "training" if train else "evaluation"
            raise BadInput(f"{title} fails in {mode}: {_line(error)}") from error
        shape = traced[-1][1].shape
        if shape != (2, num_classes):
            outputs = f"{shape[1]} outputs" if len(shape) == 2 else f"outputs of shape {('batch', *shape[1:])}"
            raise BadInput(f"{title} has {outputs}, and the labels of {data} are of {num_classes} classes")
    if own_code.is_import_path(found.name):
        return found
    program = "\n".join([str(jax.tree_util.tree_flatten_with_path(shapes)), *(str(jaxpr) for jaxpr, _ in traced)])
    values = (np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(found.begins_from))
    return found._replace(name=own_code.name_of_given(found.name, program, *values))


def _try(apply: Callable, train: bool, variables: Any, images: jax.Array, key: jax.Array) -> jax.Array:
    if not train:
        return apply(variables, images)
    logits, _ = apply(variables, images, train=True, mutable=["batch_stats"], key=key)
    return logits


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _mode(call: Callable) -> Callable[[bool], dict[str, bool]]:
    """A function: training or not -> the arguments that tell a network so."""
    known = [name for name in inspect.signature(call).parameters if name in _MODES]
    return lambda train: {name: _MODES[name] == train for name in known}


def _as_logits(found: Any) -> jax.Array:
    if isinstance(found, (tuple, list, dict)):
        raise BadInput(f"returns a {type(found).__name__} of {len(found)}; it must return the logits alone")
    return found.astype(jnp.promote_types(found.dtype, jnp.float32))


def _linen(module: nn.Module, variables: Any, name: str) -> Architecture:
    mode = _mode(type(module).__call__)

    def initial(key: jax.Array, images: jax.Array) -> dict[str, Any]:
        # A stream that the module asks for and that is not there is taken from "params".
        return _split(nn.unbox(module.init({"params": key}, images, **mode(False))))

    def apply(packed, images, train=False, mutable=False, key=None):
        rngs = None if key is None else {"params": key}
        collections = _joined(packed)
        if not train:
            return _as_logits(module.apply(collections, images, **mode(False), rngs=rngs))
        changing = list(packed["batch_stats"])
        logits, updated = module.apply(collections, images, **mode(True), mutable=changing, rngs=rngs)
        return _as_logits(logits), {"batch_stats": {**packed["batch_stats"], **nn.unbox(updated)}}

    def shapes(image_shape: tuple[int, int, int]) -> dict[str, Any]:
        if variables is not None:
            return jax.tree.map(_shape, _split(nn.unbox(variables)))
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.eval_shape(initial, key, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))

    def initialise(image_shape: tuple[int, int, int], seed: int) -> dict[str, Any]:
        if variables is not None:
            return jax.tree.map(np.asarray, _split(nn.unbox(variables)))
        if _is_ours(module):  # it declares its leaves without values
            return _split(initial_values.fill(_joined(shapes(image_shape)), module.initial_values, seed))
        images = jnp.zeros((1, *image_shape), jnp.float32)
        return jax.tree.map(np.asarray, jax.jit(initial)(jax.random.key(seed), images))

    return Architecture(
        name or type(module).__name__,
        apply,
        shapes,
        initialise,
        gives_features=False,
        random=True,
        unpacked=_joined,
        begins_from=variables,
    )


def _is_ours(module: nn.Module) -> bool:
    """Whether it is a network of `dgkd_jax.models`, or of a class derived from one."""
    return any(kind.__module__.startswith("dgkd_jax.models.") for kind in type(module).__mro__)


def _split(collections: Any) -> dict[str, Any]:
    """Linen's collections -> {"params": …, "batch_stats": all others by name}, without what a module only shows."""
    left_out = ("params", "intermediates", "perturbations")
    others = {name: dict(collection) for name, collection in collections.items() if name not in left_out}
    return {"params": dict(collections.get("params", {})), "batch_stats": others}


def _joined(packed: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_split`."""
    return {"params": packed["params"], **packed["batch_stats"]}


def _nnx(make: Callable[[int], nnx.Module], name: str) -> Architecture:
    """NNX's state is split into parameters and the rest; random keys are no state: they come from the step."""

    def split(seed: int, *, train: bool) -> tuple[Any, ...]:
        module = nnx.clone(make(seed))
        module.train() if train else module.eval()
        return nnx.split(module, nnx.Param, nnx.RngState, ...)

    graphs = {train: split(0, train=train) for train in (False, True)}
    _, params, random, others = graphs[False]
    packings = {"params": _Packing(nnx.to_pure_dict(params)), "batch_stats": _Packing(nnx.to_pure_dict(others))}
    mode = _mode(type(make(0)).__call__)

    def module_of(packed, *, train: bool, key: jax.Array | None) -> nnx.Module:
        graph, *states = graphs[train]
        states = [jax.tree.map(lambda value: value, state) for state in states]  # copies: they are replaced in place
        for state, kind in ((states[0], "params"), (states[2], "batch_stats")):
            values = jax.tree.map(jnp.asarray, packed[kind])  # numpy's cannot be changed in place, as BatchNorm does
            nnx.replace_by_pure_dict(state, packings[kind].unpacked(values))
        if key is not None:
            _reseed(states[1], key)
        return nnx.merge(graph, *states)

    def apply(packed, images, train=False, mutable=False, key=None):
        module = module_of(packed, train=train, key=key)
        logits = _as_logits(module(images, **mode(train)))
        if not train:
            return logits
        _, _, _, changed = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return logits, {"batch_stats": packings["batch_stats"].packed(nnx.to_pure_dict(changed))}

    def values(seed: int) -> dict[str, Any]:
        _, params, _, others = split(seed, train=False)
        found = {"params": params, "batch_stats": others}
        return {kind: packings[kind].packed(nnx.to_pure_dict(state)) for kind, state in found.items()}

    return Architecture(
        name,
        apply,
        shapes=lambda image_shape: jax.tree.map(_shape, values(0)),
        initialise=lambda image_shape, seed: jax.tree.map(np.asarray, values(seed)),
        gives_features=False,
        random=bool(jax.tree.leaves(random)),
        unpacked=lambda packed: nnx.state(module_of(packed, train=False, key=None), nnx.Not(nnx.RngState)),
    )


def _reseed(state: nnx.State, key: jax.Array) -> None:
    """Replace every stream of random keys in place by one of its own, drawn from `key`."""
    for number, (_, variable) in enumerate(nnx.to_flat_state(state)):
        if isinstance(variable, nnx.RngKey):
            variable.set_value(jax.random.fold_in(key, number))


def _function(apply: Callable, parameters: Any, name: str) -> Architecture:
    packing, mode = _Packing(parameters), _mode(apply)

    def applied(packed, images, train=False, mutable=False, key=None):
        logits = _as_logits(apply(packing.unpacked(packed["params"]), images, **mode(train)))
        return (logits, {"batch_stats": {}}) if train else logits

    def packed() -> dict[str, Any]:
        return {"params": packing.packed(parameters), "batch_stats": {}}

    return Architecture(
        name or getattr(apply, "__name__", type(apply).__name__),
        applied,
        shapes=lambda image_shape: jax.tree.map(_shape, packed()),
        initialise=lambda image_shape, seed: jax.tree.map(np.asarray, packed()),
        gives_features=False,
        unpacked=lambda packed: packing.unpacked(packed["params"]),
        begins_from=parameters,
    )


class _Packing:
    """Turns trees of one structure into nested dictionaries with text as keys, as checkpoints give them back."""

    def __init__(self, tree: Any):
        paths, self._structure = jax.tree_util.tree_flatten_with_path(tree)
        self._paths = [tuple(map(_entry, path)) or ("value",) for path, _ in paths]

    def packed(self, tree: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, leaf in zip(self._paths, jax.tree.leaves(tree), strict=True):
            place = found
            for entry in path[:-1]:
                place = place.setdefault(entry, {})
            place[path[-1]] = leaf
        return found

    def unpacked(self, packed: dict[str, Any]) -> Any:
        leaves = [functools.reduce(lambda place, entry: place[entry], path, packed) for path in self._paths]
        return jax.tree.unflatten(self._structure, leaves)


def _entry(key: Any) -> str:
    """The text of one step of a path through a tree."""
    return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
