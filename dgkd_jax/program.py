"""What a configuration becomes: networks, one compiled step, one evaluator, and the state that they begin with."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from dgkd_jax import models, sharding, state, steps
from dgkd_jax.data import Source, resident
from dgkd_jax.errors import BadInput
from dgkd_jax.evaluate import Evaluator


class Teacher(NamedTuple):
    """A frozen network: `apply`, its variables on the mesh, their fingerprint, and the mean and std of its pixels.

    Without mean and std it sees the images as the student does.
    """

    apply: steps.Apply
    variables: Any
    fingerprint: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def network(name: str, dtype: str, *, source: Source, batch_norm_groups: int = 1) -> Any:
    """The Linen module called `name` for a data set.

    Args:
        name: of `models.NAMES`.
        dtype: a `dtype` key of the configuration; `auto` is bfloat16 where the hardware computes in it, else float32.
        source: gives the number of classes and the shape of the images.
        batch_norm_groups: as `models.create`.

    Raises:
        BadInput: the network cannot take images of this shape.
    """
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = models.create(
        name, num_classes=source.num_classes, dtype=jnp.dtype(dtype), batch_norm_groups=batch_norm_groups
    )
    try:
        models.shapes(model, source.image_shape)
    except ValueError as error:
        height, width, channels = source.image_shape
        raise BadInput(
            f"model {name} cannot take the images of {source.name}, {height}x{width}x{channels}: {error}. "
            "Set config.data.image_size (and data.eval_resize), or choose another model"
        ) from error
    return model


class Program(NamedTuple):
    """What a configuration becomes: functions and lengths.

    Attributes:
        train_step: of state, the teacher's variables and a batch; to be compiled for a mesh.
        resident_steps: `resident_steps` below, as a function of its five arguments; likewise.
        finite_rows: of the same: which rows of the batch are sound.
        teacher: None where the method needs none.
        evaluator: of the student, on its evaluation split.
        learning_rate: of the number of steps done.
    """

    train_step: jax.stages.Wrapped
    resident_steps: jax.stages.Wrapped
    finite_rows: Callable[..., dict[str, jax.Array]]
    teacher: Teacher | None
    evaluator: Evaluator
    learning_rate: Callable[[int], jax.Array]
    steps_per_epoch: int
    total_steps: int


def build(config: ConfigDict, source: Source, mesh: Mesh, teacher: Teacher | None) -> tuple[Program, state.TrainState]:
    """The program of a run and its state at step 0, on the mesh.

    Args:
        config: validated.
        source: the data set.
        mesh: all devices.
        teacher: None where the method needs none.
    """
    steps_per_epoch = source.steps_per_epoch(config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    model = network(
        config.student.model, config.student.dtype, source=source, batch_norm_groups=config.batch_norm_groups
    )
    learning_rate = state.learning_rate_schedule(
        config.schedule,
        peak=config.optimizer.learning_rate,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    optimizer = state.make_optimizer(config.optimizer, learning_rate)
    objective = steps.objective_of(config)
    initial = initial_state(config, models.initialise(model, source.image_shape, config.seed), optimizer)
    current = sharding.place(initial, mesh)
    networks = {
        "student": model.apply,
        "teacher": teacher and teacher.apply,
        "objective": objective,
        "mean": source.mean,
        "std": source.std,
        "teacher_mean": teacher and teacher.mean,
        "teacher_std": teacher and teacher.std,
    }
    train_step = functools.partial(
        steps.train_step,
        **networks,
        optimizer=optimizer,
        ramp=state.distillation_ramp(
            warmup_epochs=config.dkd.warmup_epochs,
            form=config.dkd.warmup_form,
            steps_per_epoch=steps_per_epoch,
        ),
        epsilon=state.epsilon_schedule(
            start=config.dgkd.epsilon,
            end=config.dgkd.epsilon_end,
            name=config.dgkd.epsilon_schedule,
            total_steps=total_steps,
        ),
        ema_decay=config.optimizer.ema_decay,
        skip_limit=config.nonfinite_limit,
    )
    many_steps = functools.partial(
        resident_steps,
        train_step=train_step,
        steps_per_epoch=steps_per_epoch,
        steps_per_call=config.steps_per_call,
        batch_sharding=sharding.batch_sharding(mesh),
    )
    compiled = {"donate_argnums": 0, "out_shardings": jax.tree.map(lambda leaf: leaf.sharding, current)}
    program = Program(
        train_step=jax.jit(train_step, **compiled),
        resident_steps=jax.jit(many_steps, **compiled),
        finite_rows=jax.jit(functools.partial(steps.finite_rows, **networks), out_shardings=sharding.replicated(mesh)),
        teacher=teacher,
        evaluator=Evaluator(
            model.apply,
            mesh=mesh,
            mean=source.mean,
            std=source.std,
            diagnose=config.diagnose,
            teacher=teacher,
        ),
        learning_rate=learning_rate,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    return program, current


def resident_steps(
    current: state.TrainState,
    teacher_variables: Any,
    examples: dict[str, jax.Array],
    epoch: dict[str, jax.Array],
    count: jax.Array,
    *,
    train_step: Callable[..., state.TrainState],
    steps_per_epoch: int,
    steps_per_call: int,
    batch_sharding: NamedSharding,
) -> state.TrainState:
    """The next `count` steps on a training set that lies on the device.

    One program serves any `count`: its loop has no fixed length. Where a call is one step there is no loop, since XLA's
    CPU backend computes convolutions 3 to 20 times slower within one (docs/performance.md).

    Args:
        current: donated by the caller's `jit`; its next step says where in the epoch to begin.
        teacher_variables: as `steps.train_step`.
        examples: as `resident.batch`.
        epoch: arrays `[steps_per_epoch, batch, ...]`, the rows of `resident.batch` for each step of this epoch.
        count: int32 scalar, 1 … steps_per_call; no more than are left of the epoch.
        train_step: of state, the teacher's variables and a batch.
        steps_per_epoch: in all.
        steps_per_call: 1: `count` is not read.
        batch_sharding: of each batch.
    """

    def one(_, current):
        step = current.step % steps_per_epoch
        rows = {name: jax.lax.dynamic_index_in_dim(array, step, keepdims=False) for name, array in epoch.items()}
        return train_step(current, teacher_variables, resident.batch(examples, rows, sharding=batch_sharding))

    return one(0, current) if steps_per_call == 1 else jax.lax.fori_loop(0, count, one, current)


def initial_state(config: ConfigDict, variables: Any, optimizer: optax.GradientTransformation) -> state.TrainState:
    return state.create(
        variables,
        optimizer,
        ema=config.optimizer.ema_decay > 0,
        metric_names=steps.metric_names(steps.objective_of(config)),
    )


def abstract_state(config: ConfigDict, variables: Any) -> state.TrainState:
    """The state of a run as `jax.ShapeDtypeStruct`, to restore its checkpoints without its data or its devices.

    Args:
        config: of the run.
        variables: the student's, from `models.shapes`.
    """
    # Any schedule: the optimizer's state holds its step and not its values.
    optimizer = state.make_optimizer(config.optimizer, optax.constant_schedule(0.0))
    return jax.eval_shape(lambda variables: initial_state(config, variables, optimizer), variables)
