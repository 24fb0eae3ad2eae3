"""The training loop: one network on one data set, with or without a teacher, from wherever it was left."""

import collections
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax import checkpoint, metrics, models, sharding, state, steps, writer
from dgkd_jax import config as config_rules
from dgkd_jax.data import Source
from dgkd_jax.errors import BadInput, NumericFailure
from dgkd_jax.evaluate import Evaluator
from dgkd_jax.progress import Progress

# Batches on their way to the device while one is computed.
_AHEAD = 2


class Teacher(NamedTuple):
    """A frozen network: `apply`, its variables on the mesh, their fingerprint, and the mean and std of its pixels.

    Without mean and std it sees the images as the student does.
    """

    apply: steps.Apply
    variables: Any
    fingerprint: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class History(NamedTuple):
    """How a run went so far, kept in each checkpoint. Accuracies in [0, 1], NaN before the first."""

    last_accuracy: float = math.nan
    best_accuracy: float = math.nan
    best_step: int = 0
    seconds: float = 0.0

    def after(self, *, step: int, accuracy: float) -> "History":
        better = not accuracy <= self.best_accuracy
        return self._replace(
            last_accuracy=accuracy,
            best_accuracy=accuracy if better else self.best_accuracy,
            best_step=step if better else self.best_step,
        )


class Trained(NamedTuple):
    """A network after its training: what is evaluated (the average, where there is one) and how it got there."""

    variables: Any
    history: History
    parameters: int


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


def fit(
    config: ConfigDict, *, workdir: epath.Path, source: Source, mesh: Mesh, teacher: Teacher | None = None
) -> Trained:
    """Train `config.student` by `config.method` and leave checkpoints, config and metrics in `workdir`.

    Continues from the newest checkpoint there; the result is the same as that of an uninterrupted run, bit for bit on
    one device. A finished run is read and returned.

    Args:
        config: validated.
        workdir: created if missing.
        source: the data set.
        mesh: all devices.
        teacher: None for method `ce` only.

    Raises:
        BadInput: `workdir` belongs to a run with another configuration or teacher; the batch does not fit the devices.
        NumericFailure: the loss is no longer finite.
    """
    _check_batch(config, mesh)
    program, current = _build(config, source, mesh, teacher)
    workdir.mkdir(parents=True, exist_ok=True)
    _claim(workdir, config, source)
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=config.keep_checkpoints) as checkpoints:
        history = History()
        restored = checkpoints.restore(current)
        if restored is not None:
            current, record = restored
            _check_teacher(record["teacher"], teacher, workdir)
            history = History(**record["history"])
        if int(current.step) < program.total_steps:
            current, history = _loop(
                config, program, current, history, source=source, mesh=mesh, checkpoints=checkpoints, workdir=workdir
            )
    return Trained(current.evaluated, history, sum(leaf.size for leaf in jax.tree.leaves(current.params)))


class _Program(NamedTuple):
    """What a configuration becomes: compiled functions and lengths."""

    train_step: Callable[[state.TrainState, dict[str, jax.Array]], state.TrainState]
    evaluator: Evaluator
    learning_rate: Callable[[int], jax.Array]
    teacher_fingerprint: str | None
    steps_per_epoch: int
    total_steps: int


def _build(
    config: ConfigDict, source: Source, mesh: Mesh, teacher: Teacher | None
) -> tuple[_Program, state.TrainState]:
    """The program of a run and its state at step 0, on the mesh."""
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
    initial = _initial_state(config, models.initialise(model, source.image_shape, config.seed), optimizer)
    current = sharding.place(initial, mesh)
    compiled = jax.jit(
        functools.partial(
            steps.train_step,
            student=model.apply,
            teacher=teacher and teacher.apply,
            optimizer=optimizer,
            objective=objective,
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
            mean=source.mean,
            std=source.std,
            teacher_mean=teacher and teacher.mean,
            teacher_std=teacher and teacher.std,
            ema_decay=config.optimizer.ema_decay,
        ),
        donate_argnums=0,
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, current),
    )
    program = _Program(
        train_step=lambda current, batch: compiled(current, teacher and teacher.variables, batch),
        evaluator=Evaluator(model.apply, mesh=mesh, mean=source.mean, std=source.std),
        learning_rate=learning_rate,
        teacher_fingerprint=teacher and teacher.fingerprint,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    return program, current


def _initial_state(config: ConfigDict, variables: Any, optimizer: optax.GradientTransformation) -> state.TrainState:
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
    return jax.eval_shape(lambda variables: _initial_state(config, variables, optimizer), variables)


def _loop(
    config: ConfigDict,
    program: _Program,
    current: state.TrainState,
    history: History,
    *,
    source: Source,
    mesh: Mesh,
    checkpoints: checkpoint.Checkpoints,
    workdir: epath.Path,
) -> tuple[state.TrainState, History]:
    """Every step that is left: train, then log, evaluate and save where that is due, in this order."""
    start, total = int(current.step), program.total_steps
    evaluate_every = max(round(config.eval_every * program.steps_per_epoch), 1)
    batches = source.train_batches(
        seed=config.seed,
        batch_size=config.batch_size,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    progress_line = Progress(
        f"{config.student.model} by {config.method}",
        start=start,
        total=total,
        steps_per_epoch=program.steps_per_epoch,
        batch_size=config.batch_size,
    )
    with writer.MetricWriter(workdir, step=start) as out, progress_line as progress:
        loss = "loss not fetched yet"
        began, seconds_before = time.monotonic(), history.seconds
        logged_step, logged_time = start, began
        ahead = _on_device(batches, mesh, limit=total - start)
        for step, batch in zip(range(start + 1, total + 1), ahead, strict=True):
            current = program.train_step(current, batch)
            progress.advance()
            last = step == total

            if step % config.log_every == 0 or last:
                values = metrics.compute(current.totals)
                _check_finite(values, step)
                current = current.replace(totals=metrics.zeros_like(current.totals))
                now = time.monotonic()
                values["learning_rate"] = float(program.learning_rate(step - 1))
                values["images_per_second"] = (step - logged_step) * config.batch_size / (now - logged_time)
                logged_step, logged_time = step, now
                out.write(step, "train", values)
                loss = f"loss {values['loss']:.4f}"
                progress.metrics(step, loss)

            accuracy = None
            if step % evaluate_every == 0 or last:
                evaluation = program.evaluator(
                    current.evaluated, _eval_batches(config, source, mesh), num_examples=source.num_eval
                )
                accuracy = evaluation["accuracy"]
                history = history.after(step=step, accuracy=accuracy)
                out.write(step, "eval", evaluation)
                progress.line(step, f"{loss}, {source.eval_split} accuracy {100 * accuracy:.2f} %")

            if accuracy is not None or (config.checkpoint_every and step % config.checkpoint_every == 0):
                if step != logged_step:
                    _check_finite(metrics.compute(current.totals), step)  # never save what is broken
                history = history._replace(seconds=seconds_before + time.monotonic() - began)
                record = {
                    "teacher": program.teacher_fingerprint,
                    "history": history._asdict(),
                    "accuracy": accuracy,  # None: this step was not evaluated
                }
                checkpoints.save(current, record=record, accuracy=accuracy)
    return current, history


def evaluate(
    config: ConfigDict, model_apply: steps.Apply, variables: Any, *, source: Source, mesh: Mesh
) -> dict[str, float]:
    """`accuracy` and `ce` of any network on the evaluation split of `source`."""
    evaluator = Evaluator(model_apply, mesh=mesh, mean=source.mean, std=source.std)
    return evaluator(variables, _eval_batches(config, source, mesh), num_examples=source.num_eval)


def _eval_batches(config: ConfigDict, source: Source, mesh: Mesh) -> Iterator[dict[str, np.ndarray]]:
    return source.eval_batches(
        batch_size=_round_up(min(config.eval_batch_size, source.num_eval), mesh.size),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _on_device(batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, *, limit: int) -> Iterator[dict[str, jax.Array]]:
    """The first `limit` batches as global arrays, the next ones already on their way."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    for batch in itertools.islice(batches, limit):
        queue.append(sharding.to_global(batch, mesh))
        if len(queue) > _AHEAD:
            yield queue.popleft()
    yield from queue


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
    if config.batch_size % mesh.size:
        raise BadInput(
            f"config.batch_size={config.batch_size} must be a multiple of the number of devices, {mesh.size}: "
            f"try --config.batch_size={_round_up(config.batch_size, mesh.size)}"
        )


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _claim(workdir: epath.Path, config: ConfigDict, source: Source) -> None:
    """Write the resolved configuration and what the network sees, or refuse a folder that was claimed by another."""
    path = workdir / "config.json"
    if path.exists():
        recorded = ConfigDict(json.loads(path.read_text()))
        config_rules.check_same_run(config_rules.identity(recorded), config, workdir=workdir)
    if jax.process_index() == 0:
        path.write_text(config.to_json(indent=2) + "\n")
        # What it takes besides to read the checkpoints where the data set is not.
        about = {key: getattr(source, key) for key in ("name", "num_classes", "image_shape", "mean", "std")}
        about["enable_x64"] = jax.config.jax_enable_x64
        (workdir / "student.json").write_text(json.dumps(about) + "\n")


def _check_teacher(recorded: str | None, teacher: Teacher | None, workdir: epath.Path) -> None:
    current = teacher and teacher.fingerprint
    if recorded != current:
        raise BadInput(
            f"{workdir} was trained with another teacher (weights {recorded}, now {current}). "
            "Give another --workdir, or remove this one."
        )


def _check_finite(values: dict[str, float], step: int) -> None:
    if not math.isfinite(values["loss"]):
        parts = [name for name in ("ce", "kd", "tckd", "nckd", "logit_mse", "coupling") if name in values]
        bad = [name for name in parts if not math.isfinite(values[name])]
        raise NumericFailure(
            f"the loss is not finite at or shortly before step {step} "
            f"(not finite: {', '.join(bad) or 'only their sum'}). "
            "Try a lower optimizer.learning_rate, optimizer.clip_norm=5, or a smaller dgkd.epsilon."
        )
