"""One training step: computes the loss of student and teacher on a batch and updates the student.

A pure function of global arrays.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from dgkd_jax import losses
from dgkd_jax.evaluate import metrics
from dgkd_jax.losses import comparison
from dgkd_jax.methods import Method
from dgkd_jax.methods.progress import Progress
from dgkd_jax.models.network import Network
from dgkd_jax.training import parts
from dgkd_jax.training.named_gradients import value_and_named_gradients
from dgkd_jax.training.state import TrainState

Batch = dict[str, jax.Array]

# Separates the student's random numbers from those of the augmentation, which begin with the same seed.
_STUDENTS_STREAM = 0x5EED


class Teacher(Protocol):
    """Gives the teacher's logits: a `Network`, or a `CachedTeacher`, which reads them from the batch."""

    def logits(self, batch: Batch) -> jax.Array:
        """Float `[batch, classes]`, for a batch as `train_step` takes it."""


# Parts of the training loss in the order of computation: key of `finite_rows` -> key of `losses.examine`, or None.
PARTS = {
    "teacher logits": None,
    "student logits": None,
    "CE": None,
    "KD": "kd",
    "TCKD": "tckd",
    "NCKD": "nckd",
    "logit MSE": "logit_mse",
    "coupling": "coupling",
}


def metric_names(method: Method) -> tuple[str, ...]:
    """The names of the metrics that `train_step` adds to `TrainState.totals`."""
    common = ("loss", "accuracy", "grad_norm", "ce")
    compared = (*comparison.TERMS, *comparison.DIAGNOSTICS) if method.needs_teacher else ()
    return tuple(dict.fromkeys((*common, *compared, *method.term_units)))


def train_step(
    state: TrainState,
    teacher: Teacher | None,
    batch: Batch,
    *,
    student: Network,
    method: Method,
    optimizer: optax.GradientTransformation,
    steps_per_epoch: int,
    total_steps: int,
    seed: int = 0,
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    skip_limit: int = 1,
    gradient_names: tuple[str, ...] = (),
    accumulate: int = 1,
) -> TrainState:
    """One step of the student on one global batch.

    A step whose loss or gradient is not finite is skipped: only the step counters change. After `skip_limit` skipped
    steps in a row all further steps are skipped too, so the state stays as before the first of them, for inspection.

    Args:
        state: donated by the caller's `jit`.
        teacher: never changed, never donated, run outside the differentiated function; None where `method` needs none.
        batch: {"image": uint8 `[batch, height, width, channels]`, "label": int32 `[batch]`, or float32
            `[batch, classes]` where images are mixed}; for a `CachedTeacher` also "teacher_logits": float16
            `[batch, classes]`.
        student: without variables; those are in `state`.
        method: the objective.
        optimizer: from `optimizer.make_optimizer`.
        steps_per_epoch, total_steps: of the run, for the method's ramps.
        seed: of the run; read only by a student that is random in training.
        label_smoothing: of the cross-entropy, in [0, 1).
        ema_decay: of the average in `state.ema`, per step, in [0, 1); read only where there is an average.
        skip_limit: 1 or more.
        gradient_names: the gradients that `optimizer` takes, as `value_and_named_gradients` makes them, each term of
            the loss in exactly one; (): one tree, of the whole loss.
        accumulate: the loss and its gradient are computed in this many parts of the batch, one after the other
            (`parts`), and averaged; it divides the batch. BatchNorm normalises each part by its own statistics, and
            its running statistics move once for each part. All else is as for the whole batch, if the method does not
            need it (`Method.needs_whole_batch`).

    Returns:
        The next state; unless the step was skipped, `totals` and `epoch_totals` include this step's metrics.
    """
    progress = Progress(state.step, steps_per_epoch, total_steps)

    def of_part(carried: tuple[jax.Array, Any], part: Batch) -> tuple[tuple[jax.Array, Any], tuple, tuple]:
        number, batch_stats = carried
        teacher_logits = teacher.logits(part) if method.needs_teacher else None
        gradients_of = _gradient_function(
            student,
            batch_stats,
            part,
            teacher_logits,
            method=method,
            progress=progress,
            options=_in_training(student, state.step, seed, number),
            label_smoothing=label_smoothing,
            gradient_names=gradient_names,
        )
        (loss, (logits, terms, batch_stats)), gradients = gradients_of(state.params)
        return (number + 1, batch_stats), (loss, terms, gradients), (logits, teacher_logits)

    (_, batch_stats), (loss, terms, gradients), (logits, teacher_logits) = parts.computed(
        of_part, (jnp.int32(0), state.batch_stats), batch, count=accumulate
    )
    labels = batch["label"]
    whole = jax.tree.map(lambda *named: sum(named), *gradients.values()) if gradient_names else gradients
    gradient_norm = optax.tree.norm(whole)
    means = {"loss": loss, "grad_norm": gradient_norm}
    if teacher_logits is not None:
        logits = jax.lax.stop_gradient(logits)
        means |= losses.compare(logits, teacher_logits, labels, temperature=method.teacher_temperature or 1.0)
    step_totals = metrics.of_batch_means(means | terms) | {"accuracy": metrics.accuracy(logits, labels)}
    updated = _updated(state, gradients, batch_stats, step_totals, optimizer=optimizer, ema_decay=ema_decay)
    sound = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & (state.skipped_in_a_row < skip_limit)
    return _kept_if(sound, updated, state)


def _in_training(student: Network, step: jax.Array, seed: int, number: jax.Array) -> dict[str, Any]:
    """What the student is called with in part `number` of a training step: a pure function of (seed, step, number)."""
    options = {"train": True, "mutable": ["batch_stats"]}
    if not student.random:
        return options
    # Of a fixed generator: another default of JAX's would train otherwise.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _STUDENTS_STREAM)
    return options | {"key": jax.random.fold_in(jax.random.fold_in(key, step), number)}


def _gradient_function(
    student: Network,
    batch_stats: Any,
    batch: Batch,
    teacher_logits: jax.Array | None,
    *,
    method: Method,
    progress: Progress,
    options: dict[str, Any],
    label_smoothing: float,
    gradient_names: tuple[str, ...],
) -> Callable[[Any], tuple[tuple[jax.Array, tuple], Any]]:
    """A function: parameters -> (loss, (logits, batch means of the loss terms, BatchNorm statistics)), gradients."""
    labels = batch["label"]

    def forward(params):
        network = student.with_variables({"params": params, "batch_stats": batch_stats})
        logits, updated = network(batch["image"], **options)
        return logits, updated.get("batch_stats", {})

    def terms_of(params):
        if method.needs_parameter_gradients:
            logits, pull_back, batch_stats = jax.vjp(forward, params, has_aux=True)
            given = {"pull_back": pull_back}
        else:
            (logits, batch_stats), given = forward(params), {}
        # Keep this order: autodiff adds the terms' gradients in it, and floating-point sums depend on the order.
        terms = {"ce": losses.cross_entropy(logits, labels, label_smoothing=label_smoothing)}
        terms |= method.terms(logits, teacher_logits, labels, **given)
        terms = jax.tree.map(jnp.mean, terms)
        return terms, (logits, terms, batch_stats)

    def loss_of(params):
        terms, beside = terms_of(params)
        return method.loss(terms, progress), beside

    if gradient_names:
        return value_and_named_gradients(terms_of, lambda terms: method.loss(terms, progress), gradient_names)
    return jax.value_and_grad(loss_of, has_aux=True)


def _updated(
    state: TrainState,
    gradients: Any,
    batch_stats: Any,
    step_totals: metrics.Totals,
    *,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
) -> TrainState:
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update({"params": params, "batch_stats": batch_stats}, ema, 1.0 - ema_decay)
    return state.replace(
        params=params,
        batch_stats=batch_stats,
        opt_state=opt_state,
        ema=ema,
        totals=metrics.merge(state.totals, step_totals),
        epoch_totals=metrics.merge(state.epoch_totals, step_totals),
    )


def _kept_if(sound: jax.Array, updated: TrainState, state: TrainState) -> TrainState:
    kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, state)
    return kept.replace(
        step=state.step + 1,
        skipped=state.skipped + ~sound,
        skipped_in_a_row=jnp.where(sound, 0, state.skipped_in_a_row + 1),
    )


def finite_rows(
    state: TrainState,
    teacher: Teacher | None,
    batch: Batch,
    *,
    student: Network,
    method: Method,
    seed: int = 0,
    accumulate: int = 1,
) -> dict[str, jax.Array]:
    """For each part of the training loss, the rows of a batch in which it is finite.

    Args: as `train_step`.

    Returns:
        Name from `PARTS` -> bool `[batch]`, for the parts that this method has. All are true where only the gradient
        with respect to the parameters is not finite.
    """

    def of_part(number: jax.Array, part: Batch) -> tuple[jax.Array, None, dict[str, jax.Array]]:
        labels = part["label"]
        options = _in_training(student, state.step, seed, number)
        logits, _ = student.with_variables(state.variables)(part["image"], **options)
        rows = {"student logits": logits, "CE": losses.cross_entropy(logits, labels)}
        if method.needs_teacher:
            rows["teacher logits"] = teacher_logits = teacher.logits(part)
            terms = losses.examine(logits, teacher_logits, labels, temperature=method.teacher_temperature or 1.0)
            rows |= {name: terms[term] for name, term in PARTS.items() if term is not None}
        finite = {name: jnp.isfinite(value).reshape(len(labels), -1).all(axis=1) for name, value in rows.items()}
        return number + 1, None, finite

    _, _, rows = parts.computed(of_part, jnp.int32(0), batch, count=accumulate)
    return rows
