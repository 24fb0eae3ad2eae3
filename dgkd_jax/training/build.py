"""Builds the model, the compiled steps and the initial state from a config."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from dgkd_jax.data import device_augment, on_device
from dgkd_jax.data.source import Description, Source
from dgkd_jax.methods import Method
from dgkd_jax.models import kernel_gradient, network
from dgkd_jax.models.architecture import Architecture
from dgkd_jax.models.network import Network
from dgkd_jax.runs import compiler_options, sharding
from dgkd_jax.runs.default import NAMED_GRADIENTS
from dgkd_jax.training import optimizer as optimizer_lib
from dgkd_jax.training import state
from dgkd_jax.training.given import NOTHING, Given
from dgkd_jax.training.step import Batch, Teacher, finite_rows, metric_names, train_step


class Program(NamedTuple):
    """The compiled functions of a run, and its length.

    Attributes:
        train_step: (state, teacher, batch) -> state, under `jit`.
        steps_on_device: the function below with its first five arguments, under `jit`.
        finite_rows: (state, teacher, batch) -> which rows of the batch are finite; the batch is that of `state.step`.
        begins_as: the state at step 0 as shapes, dtypes and shardings.
        student: without variables; those are in the state.
        architecture: of the student.
        teacher: None where the method needs none.
        learning_rate: number of steps done -> rate.
        platform: of the mesh.
    """

    train_step: jax.stages.Wrapped
    steps_on_device: jax.stages.Wrapped
    finite_rows: Callable[..., dict[str, jax.Array]]
    begins_as: state.TrainState
    student: Network
    architecture: Architecture
    teacher: Teacher | None
    learning_rate: Callable[[int], jax.Array]
    steps_per_epoch: int
    total_steps: int
    platform: str


def build(
    config: ConfigDict, source: Source, mesh: Mesh, teacher: Teacher | None, *, given: Given = NOTHING
) -> tuple[Program, state.TrainState]:
    """The compiled functions of a run, and its state at step 0 on the mesh; arguments as for `program_of`."""
    program = program_of(config, source, mesh, teacher, given=given)
    variables = program.architecture.initialise(source.image_shape, config.seed)
    optimizer, _ = _optimizer(config, source)
    return program, sharding.place(_initial(config, variables, optimizer, given.method_of(config)), mesh)


def program_of(
    config: ConfigDict, source: Description, mesh: Mesh, teacher: Teacher | None, *, given: Given = NOTHING
) -> Program:
    """The compiled functions of a run. No array is made, and none of the mesh's devices is used.

    Args:
        config: validated.
        source: the data set, or what is known of it.
        mesh: all devices, or those of another machine.
        teacher: None where the method needs none. Its variables may be shapes.
        given: objects in place of the config's names.
    """
    steps_per_epoch, total_steps = _length(config, source)
    optimizer, learning_rate = _optimizer(config, source)
    method, architecture = given.method_of(config), sharding.made_for(mesh, given.student_of)(config, source)
    # The config of a teacher's own training may set other pixel statistics than the data set's.
    mean, std = tuple(config.data.mean) or source.mean, tuple(config.data.std) or source.std
    student = network.of(architecture, None, mean=mean, std=std)
    begins_as = sharding.shapes(_shapes(config, source, architecture, optimizer, method), mesh)
    augment = device_augment.from_config(config.data, source, seed=config.seed)
    one_step = functools.partial(
        sharding.made_for(mesh, _summed_as_asked(config, mesh, _on_augmented(train_step, augment))),
        student=student,
        method=method,
        optimizer=optimizer,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        seed=config.seed,
        label_smoothing=config.label_smoothing,
        ema_decay=config.optimizer.ema_decay,
        skip_limit=config.nonfinite_limit,
        gradient_names=NAMED_GRADIENTS.get(config.optimizer.name, ()),
        accumulate=config.accumulate,
    )
    many_steps = functools.partial(
        steps_on_device,
        one_step=one_step,
        steps_per_epoch=steps_per_epoch,
        steps_per_call=config.steps_per_call,
        image_shape=tuple(source.image_shape),
        batch_sharding=sharding.batch_sharding(mesh),
    )
    look = functools.partial(
        sharding.made_for(mesh, _on_augmented(finite_rows, augment)),
        student=student,
        method=method,
        seed=config.seed,
        accumulate=config.accumulate,
    )
    compiled = {
        "donate_argnums": 0,
        "out_shardings": jax.tree.map(lambda leaf: leaf.sharding, begins_as),
        "compiler_options": compiler_options.of(config.compiler_options, mesh),
    }
    return Program(
        train_step=jax.jit(one_step, **compiled),
        steps_on_device=jax.jit(many_steps, **compiled),
        finite_rows=jax.jit(look, out_shardings=sharding.replicated(mesh)),
        begins_as=begins_as,
        student=student,
        architecture=architecture,
        teacher=teacher,
        learning_rate=learning_rate,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        platform=sharding.platform_of(mesh),
    )


def _on_augmented(function: Callable[..., Any], augment: device_augment.DeviceAugment) -> Callable[..., Any]:
    """The function (state, teacher, batch) with the batch as the networks see it, teacher and student alike."""

    @functools.wraps(function)
    def on_augmented(current: state.TrainState, teacher: Teacher | None, batch: Batch, **options: Any) -> Any:
        return function(current, teacher, augment(batch, current.step), **options)

    return on_augmented


def _summed_as_asked(config: ConfigDict, mesh: Mesh, step: Callable[..., Any]) -> Callable[..., Any]:
    asked = config.gradient_sums
    is_wide = asked == "float32" or (asked == "auto" and sharding.platform_of(mesh) == "tpu")
    return kernel_gradient.summed_in_parameters_dtype()(step) if is_wide else step


def bytes_of_state(config: ConfigDict, source: Source, *, given: Given = NOTHING) -> int:
    """The size of the state of a run, and nearly that of one of its checkpoints.

    Raises:
        BadInput: as `Given.student_of`.
    """
    optimizer, _ = _optimizer(config, source)
    shapes = _shapes(config, source, given.student_of(config, source), optimizer, given.method_of(config))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _shapes(
    config: ConfigDict,
    source: Description,
    architecture: Architecture,
    optimizer: optax.GradientTransformation,
    method: Method,
) -> state.TrainState:
    """The state at step 0 as `jax.ShapeDtypeStruct`s."""
    variables = architecture.shapes(source.image_shape)
    return jax.eval_shape(lambda variables: _initial(config, variables, optimizer, method), variables)


def _initial(
    config: ConfigDict, variables: dict[str, Any], optimizer: optax.GradientTransformation, method: Method
) -> state.TrainState:
    names = metric_names(method)
    return state.create(variables, optimizer, ema=config.optimizer.ema_decay > 0, metric_names=names)


def _length(config: ConfigDict, source: Description) -> tuple[int, int]:
    """Steps in an epoch, and in the run."""
    steps_per_epoch = source.steps_per_epoch(config.batch_size)
    return steps_per_epoch, config.epochs * steps_per_epoch


def _optimizer(config: ConfigDict, source: Description) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer, and its learning rate by the number of steps done."""
    steps_per_epoch, total_steps = _length(config, source)
    learning_rate = optimizer_lib.learning_rate_schedule(
        config.schedule,
        peak=config.optimizer.learning_rate,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    return optimizer_lib.make_optimizer(config.optimizer, learning_rate), learning_rate


def steps_on_device(
    current: state.TrainState,
    teacher: Teacher | None,
    examples: dict[str, jax.Array],
    epoch: dict[str, jax.Array],
    count: jax.Array,
    *,
    one_step: Callable[..., state.TrainState],
    steps_per_epoch: int,
    steps_per_call: int,
    image_shape: tuple[int, int, int],
    batch_sharding: NamedSharding,
) -> state.TrainState:
    """The next `count` steps on a training set in the device's memory.

    The loop's length is not fixed, so one program serves any `count`. With one step per call there is no loop, because
    XLA's CPU backend computes convolutions in a loop 3 to 20 times slower (docs/performance.md).

    Args:
        current: the state, donated by the caller's `jit`; its step gives the position in the epoch.
        teacher: as for `train_step`.
        examples: of `on_device.as_rows`.
        epoch: arrays `[steps_per_epoch, batch, ...]`: the `rows` of `on_device.batch`, for each step of this epoch.
        count: int32 scalar, 1 … steps_per_call, at most the steps left in the epoch.
        one_step: (state, teacher, batch) -> state.
        steps_per_epoch: steps in an epoch.
        steps_per_call: the largest `count`; with 1, `count` is not read.
        image_shape: of the examples' images.
        batch_sharding: of each batch.
    """

    def one(_, current):
        step = current.step % steps_per_epoch
        rows = {name: jax.lax.dynamic_index_in_dim(array, step, keepdims=False) for name, array in epoch.items()}
        batch = on_device.batch(
            examples,
            rows,
            image_shape=image_shape,
            sharding=batch_sharding,
            by_products=sharding.platform_of(batch_sharding.mesh) == "tpu",
        )
        return one_step(current, teacher, batch)

    return one(0, current) if steps_per_call == 1 else jax.lax.fori_loop(0, count, one, current)
