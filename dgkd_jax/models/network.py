"""A network as one value: its function, its variables and its pixel statistics. It takes uint8 images."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dgkd_jax import models, own_code
from dgkd_jax.errors import BadInput
from dgkd_jax.models import foreign, platform
from dgkd_jax.models.architecture import Apply, Architecture


@flax.struct.dataclass
class Network:
    """A network that takes raw images. Under jit its variables are traced, everything else is static.

    Attributes:
        apply: of its `Architecture`; takes normalised images.
        variables: on the mesh; None: they are given later (`with_variables`).
        mean, std: of the pixels that it was trained on, per channel, in units of pixel/255.
        fingerprint: of the variables; None where it is not needed.
        gives_features, random: as in its `Architecture`.
    """

    apply: Apply = flax.struct.field(pytree_node=False)
    variables: Any
    mean: tuple[float, ...] = flax.struct.field(pytree_node=False)
    std: tuple[float, ...] = flax.struct.field(pytree_node=False)
    fingerprint: str | None = flax.struct.field(pytree_node=False, default=None)
    gives_features: bool = flax.struct.field(pytree_node=False, default=True)
    random: bool = flax.struct.field(pytree_node=False, default=False)

    def __call__(self, images: jax.Array, **options: Any) -> Any:
        """`apply` on images.

        Args:
            images: uint8 `[batch, height, width, channels]`, normalised here; floats must be normalised already.
            options: of `apply`: train, mutable, features, key.
        """
        return self.apply(self.variables, normalize(images, mean=self.mean, std=self.std), **options)

    def logits(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Logits `[batch, classes]` of the batch's images, in evaluation mode: used for teachers."""
        return self(batch["image"])

    def with_variables(self, variables: Any) -> "Network":
        return self.replace(variables=variables)


def normalize(images: jax.Array, *, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """uint8 `[batch, height, width, channels]` -> float32 (pixel/255 − mean) / std.

    Float images are returned unchanged: parity checks pass normalised ones.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def of(
    architecture: Architecture,
    variables: Any,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    fingerprint: str | None = None,
) -> Network:
    """The network of this architecture with these variables; arguments as the attributes of `Network`."""
    return Network(
        architecture.apply,
        variables,
        mean,
        std,
        fingerprint,
        gives_features=architecture.gives_features,
        random=architecture.random,
    )


def of_section(section: Any, seen: Any, *, role: str, batch_norm_groups: int = 1) -> Architecture:
    """The network that a section of the config names.

    Args:
        section: `config.student` or `config.teacher`: its model and dtype.
        seen: a `Source`, or what a work directory's student.json says of one: name, num_classes, image_shape.
        role: the section's name.
        batch_norm_groups: as for `models.create`.

    Raises:
        BadInput: as `create`.
    """
    return create(
        section.model,
        section.dtype,
        role=role,
        data=seen.name,
        num_classes=seen.num_classes,
        image_shape=seen.image_shape,
        batch_norm_groups=batch_norm_groups,
    )


def create(
    name: str,
    dtype: str,
    *,
    role: str,
    data: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    batch_norm_groups: int = 1,
) -> Architecture:
    """The network called `name`, for a data set's images.

    Args:
        name: from `models.NAMES`, or an import path (`foreign.imported`).
        dtype: a config `dtype`; `auto` is float32 where `platform.current()` is a CPU, else bfloat16. An imported
            network has its own.
        role: student or teacher: the section of the config that names it.
        data: name of the data set, for the error message.
        num_classes: of the data set.
        image_shape: (height, width, channels).
        batch_norm_groups: as for `models.create`.

    Raises:
        BadInput: the network cannot take images of this shape; an imported one cannot be imported or returns no logits.
    """
    if own_code.is_import_path(name):
        found = foreign.imported(name, key=f"{role}.model", num_classes=num_classes)
        return foreign.check(found, role=role, data=data, num_classes=num_classes, image_shape=image_shape)
    if own_code.is_given(name):
        raise BadInput(
            f"config.{role}.model={name!r} is a Python object, which only Python can give: dgkd_jax.distill({role}=…)"
        )
    if dtype == "auto":
        dtype = "float32" if platform.current() == "cpu" else "bfloat16"
    model = models.create(name, num_classes=num_classes, dtype=jnp.dtype(dtype), batch_norm_groups=batch_norm_groups)
    try:
        models.shapes(model, image_shape)
    except ValueError as error:
        height, width, channels = image_shape
        raise BadInput(
            f"model {name} cannot take the images of {data}, {height}x{width}x{channels}: {error}. "
            "Set config.data.image_size (and data.eval_resize), or choose another model"
        ) from error
    return Architecture(
        name, model.apply, functools.partial(models.shapes, model), functools.partial(models.initialise, model)
    )
