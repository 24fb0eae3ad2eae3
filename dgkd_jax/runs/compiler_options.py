"""Options of XLA's compiler for the training step: those that are good for a kind of device, and the user's."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dgkd_jax.errors import BadInput
from dgkd_jax.runs import sharding

# By JAX's `device_kind`; not set where nobody has looked at what the compiler says of it (docs/plan.md).
_OF_KIND = {
    "TPU v5 lite": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
}
_SWITCHES = {"true": True, "false": False}  # JAX reads no switch from a text


def of(given: tuple[str, ...], mesh: Mesh) -> dict[str, str | bool] | None:
    """The options for programs on this mesh, as `jax.jit` takes them.

    Args:
        given: the config's `compiler_options`, each NAME=VALUE; one of a name that is set here counts instead.

    Raises:
        BadInput: the compiler does not know one, or cannot read its value.
    """
    own = {name: _SWITCHES.get(value.lower(), value) for name, value in (text.split("=", 1) for text in given)}
    _check(own, mesh)
    return _OF_KIND.get(mesh.devices.flat[0].device_kind, {}) | own or None


def _check(options: dict[str, str | bool], mesh: Mesh) -> None:
    for name, value in options.items():
        tiny = jax.jit(lambda: jnp.zeros(()), out_shardings=sharding.replicated(mesh), compiler_options={name: value})
        try:
            tiny.lower().compile()
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            raise BadInput(
                f"config.compiler_options: the compiler refuses {name}={value}: {str(error).splitlines()[0]}"
            ) from error
