"""The training loop: one network on one data set, with or without a teacher, from wherever it was left."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax import checkpoint, compiled_step, faults, feed, metrics, ownership, sharding, state, steps, writer
from dgkd_jax import config as config_rules
from dgkd_jax import program as program_lib
from dgkd_jax.data import Source
from dgkd_jax.epoch_log import EpochLog
from dgkd_jax.errors import BadInput, NumericFailure, Preempted
from dgkd_jax.evaluate import Evaluator
from dgkd_jax.goodput import Goodput, summary
from dgkd_jax.program import Program, Teacher
from dgkd_jax.progress import Progress
from dgkd_jax.watchdog import Watchdog


class History(NamedTuple):
    """How a run went so far, kept in each checkpoint. Accuracies in [0, 1], NaN before the first.

    `best_accuracy` is that of the evaluation with the highest score, at `best_step`.
    """

    last_accuracy: float = math.nan
    best_accuracy: float = math.nan
    best_score: float = math.nan
    best_step: int = 0
    seconds: float = 0.0

    def after(self, *, step: int, accuracy: float, score: float) -> "History":
        later = self._replace(last_accuracy=accuracy)
        if score <= self.best_score:
            return later
        return later._replace(best_accuracy=accuracy, best_score=score, best_step=step)


class Trained(NamedTuple):
    """A network after its training: what is evaluated (the average, where there is one) and how it got there."""

    variables: Any
    history: History
    parameters: int


def fit(
    config: ConfigDict,
    *,
    workdir: epath.Path,
    source: Source,
    mesh: Mesh,
    teacher: Teacher | None = None,
    stop: Callable[[], bool] = lambda: False,
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
        stop: asked after every call of the compiled steps and every batch of an evaluation, on all processes alike;
            once true, the run saves and ends.

    Raises:
        BadInput: `workdir` belongs to a run with another configuration or teacher, or is in use by another job; the
            batch does not fit the devices.
        NumericFailure: `config.nonfinite_limit` steps in a row had a loss or gradient that was not finite.
        StorageFailure: a checkpoint or a log could not be written.
        Preempted: `stop` was true; the same call goes on from here.
    """
    goodput = Goodput()
    with goodput.measure("init"):
        _check_batch(config, mesh)
        program, current = program_lib.build(config, source, mesh, teacher)
    workdir.mkdir(parents=True, exist_ok=True)
    claimed = ownership.check(workdir, config)

    def restore(checkpoints: checkpoint.Checkpoints) -> tuple[state.TrainState, dict[str, Any]]:
        restored = checkpoints.restore(current, accept=functools.partial(_accept, config, teacher, workdir))
        return restored or (current, {})

    folder, keep = workdir / "checkpoints", config.keep_checkpoints
    if claimed and latest_step(workdir) == program.total_steps:
        # Without a lock, so that many students can begin at once with one teacher that is finished.
        with checkpoint.Checkpoints(folder, keep=keep, read_only=True) as checkpoints:
            restored, record = restore(checkpoints)
        if not _unfinished(restored, record, program):
            return _trained(restored, record)
    with ownership.lock(workdir):
        ownership.claim(workdir, config, source)
        with checkpoint.Checkpoints(folder, keep=keep) as checkpoints:
            with goodput.measure("init"):
                current, record = restore(checkpoints)
            if _unfinished(current, record, program):
                current, record = _loop(
                    config,
                    program,
                    current,
                    record,
                    source=source,
                    mesh=mesh,
                    checkpoints=checkpoints,
                    workdir=workdir,
                    stop=stop,
                    goodput=goodput,
                )
    return _trained(current, record)


def latest_step(workdir: epath.Path) -> int | None:
    """Of the newest checkpoint in a work directory, whole or not; None where there is none."""
    if not (workdir / "checkpoints").exists():
        return None
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=1, read_only=True) as checkpoints:
        return checkpoints.latest_step


def _accept(config: ConfigDict, teacher: Teacher | None, workdir: epath.Path, record: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run, which is not a damaged one."""
    config_rules.check_same_run(record["identity"], config, workdir=workdir)
    current = teacher and teacher.fingerprint
    if record["teacher"] != current:
        raise BadInput(
            f"{workdir} was trained with another teacher (weights {record['teacher']}, now {current}). "
            "Give another --workdir, or remove this one."
        )


def _unfinished(current: state.TrainState, record: dict[str, Any], program: Program) -> bool:
    return int(current.step) < program.total_steps or record["evaluation_due"]


def _trained(current: state.TrainState, record: dict[str, Any]) -> Trained:
    return Trained(
        current.evaluated, History(**record["history"]), sum(leaf.size for leaf in jax.tree.leaves(current.params))
    )


def _loop(
    config: ConfigDict,
    program: Program,
    current: state.TrainState,
    record: dict[str, Any],
    *,
    source: Source,
    mesh: Mesh,
    checkpoints: checkpoint.Checkpoints,
    workdir: epath.Path,
    stop: Callable[[], bool],
    goodput: Goodput,
) -> tuple[state.TrainState, dict[str, Any]]:
    """Every step that is left: train, then log, evaluate and save where that is due, in this order."""
    start, total = int(current.step), program.total_steps
    history = History(**record["history"]) if record else History()
    goodput.go_on_from(record.get("goodput", {}))
    # A run that was stopped before or in the evaluation of its last step begins with that evaluation.
    first = start if record and record["evaluation_due"] else start + 1
    evaluate_every = max(round(config.eval_every * program.steps_per_epoch), 1)
    with goodput.measure("data"):
        fed = feed.of(config, program, source=source, mesh=mesh, start=start)
    every = [config.log_every, evaluate_every, program.steps_per_epoch, config.checkpoint_every or total]
    calls = _calls(start, total, every=every, also=faults.planned("step"), most=fed.steps_per_call)
    # On CPUs, steps of several processes that are in flight together can wait for each other for ever.
    wait = jax.process_count() > 1 and jax.default_backend() == "cpu"
    progress_line = Progress(
        f"{config.student.model} by {config.method}",
        start=start,
        total=total,
        steps_per_epoch=program.steps_per_epoch,
        batch_size=config.batch_size,
    )
    epoch_log = EpochLog(workdir, epoch=(first - 1) // program.steps_per_epoch)
    teacher_variables = program.teacher and program.teacher.variables
    compiled, cost, loss = None, {}, "loss not fetched yet"
    with goodput.measure("init"):
        metrics_file = writer.MetricWriter(workdir, step=start, evaluation_due=first == start)
    with (
        fed,
        metrics_file as out,
        progress_line as progress,
        Watchdog(config.watchdog_s) as watchdog,
    ):
        began, seconds_before = time.monotonic(), history.seconds
        logged_step, logged_time = start, began
        if fed.note:
            progress.note(fed.note)
        done = start
        for step in calls if first > start else itertools.chain([start], calls):
            last = step == total
            if step > start:
                with goodput.measure("data"):
                    arguments = fed.arguments(done, step - done)
                if compiled is None:
                    faults.at("compile")
                    with goodput.measure("compile"):
                        compiled = fed.program.lower(current, teacher_variables, *arguments).compile()
                    cost = compiled_step.cost(compiled)
                    out.write(done, "goodput", goodput.seconds() | cost)
                    progress.note(f"ready for the first step: {summary(goodput.seconds())}")
                    progress.note(f"one step, on each device: {compiled_step.summary(cost)}")
                with jax.transfer_guard("disallow"):  # what the device needs went there beforehand
                    current = compiled(current, teacher_variables, *arguments)
                if wait:
                    jax.block_until_ready(current)
                faults.at("step", step)
                progress.advance(step - done)
                watchdog.beat()
                done = step
            stopping = stop()

            if step > start and (step % config.log_every == 0 or last or stopping):
                values = metrics.compute(current.totals)
                _check_skipped(config, program, current, source, mesh)
                values["skipped_steps"] = int(current.skipped)
                if step % config.log_every == 0 or last:
                    current = current.replace(totals=metrics.zeros_like(current.totals))
                    now = time.monotonic()
                    values["learning_rate"] = float(program.learning_rate(step - 1))
                    values["images_per_second"] = (step - logged_step) * config.batch_size / (now - logged_time)
                    values |= compiled_step.utilisation(cost, (step - logged_step) / (now - logged_time))
                    logged_step, logged_time = step, now
                    out.write(step, "train", values)
                loss = f"loss {values['loss']:.4f}"
                progress.metrics(step, loss)

            evaluation_due, accuracy, score = step % evaluate_every == 0 or last, None, None
            if evaluation_due and not stopping:
                with goodput.measure("evaluation"):
                    evaluation = program.evaluator(
                        current.evaluated,
                        _eval_batches(config, source, mesh),
                        num_examples=source.num_eval,
                        stop=lambda: faults.at("eval") or watchdog.beat() or stop(),
                    )
                stopping = evaluation is None
            if evaluation_due and not stopping:
                evaluation_due, accuracy = False, evaluation["accuracy"]
                score = accuracy if config.best_metric == "accuracy" else -evaluation["ce"]
                history = history.after(step=step, accuracy=accuracy, score=score)
                out.write(step, "eval", evaluation)
                out.write(step, "goodput", goodput.seconds())
                progress.line(step, f"{loss}, {source.eval_split} accuracy {100 * accuracy:.2f} %")

            # Where the evaluation is still due, the row is too.
            if step % program.steps_per_epoch == 0 and not evaluation_due:
                means = metrics.compute(current.epoch_totals)
                epoch_log.write(step // program.steps_per_epoch, means, test_accuracy=accuracy)
                current = current.replace(epoch_totals=metrics.zeros_like(current.epoch_totals))

            due = accuracy is not None or (config.checkpoint_every and step % config.checkpoint_every == 0)
            if due or (stopping and step > 0):
                if step != logged_step:
                    _check_skipped(config, program, current, source, mesh)
                history = history._replace(seconds=seconds_before + time.monotonic() - began)
                record = {
                    "identity": config_rules.identity(config),
                    "config": config.to_dict(),
                    "teacher": program.teacher and program.teacher.fingerprint,
                    "history": history._asdict(),
                    "goodput": goodput.seconds(),
                    "accuracy": accuracy,  # None: this step was not evaluated
                    "evaluation_due": evaluation_due,
                }
                with goodput.measure("save"):
                    checkpoints.save(current, record=record, score=score)
                faults.at("save")
                watchdog.beat()
            if last:
                progress.note(f"where the time went: {summary(goodput.seconds())}")
            if stopping:
                raise Preempted(
                    f"stopped after step {step} of {total}, saved in {workdir}; the same command goes on from there"
                )
    return current, record


def evaluate(
    config: ConfigDict, model_apply: steps.Apply, variables: Any, *, source: Source, mesh: Mesh
) -> dict[str, float]:
    """`accuracy` and `ce` of any network on the evaluation split of `source`."""
    evaluator = Evaluator(model_apply, mesh=mesh, mean=source.mean, std=source.std)
    return evaluator(variables, _eval_batches(config, source, mesh), num_examples=source.num_eval)


def count_correct(
    config: ConfigDict, model_apply: steps.Apply, variables: Any, *, source: Source, mesh: Mesh, batches: int
) -> tuple[int, int]:
    """(correct answers, examples) of any network on the first `batches` batches of the evaluation split."""
    evaluator = Evaluator(model_apply, mesh=mesh, mean=source.mean, std=source.std)
    return evaluator.count(variables, itertools.islice(_eval_batches(config, source, mesh), batches))


def _eval_batches(config: ConfigDict, source: Source, mesh: Mesh) -> Iterator[dict[str, np.ndarray]]:
    return source.eval_batches(
        batch_size=_round_up(min(config.eval_batch_size, source.num_eval), mesh.size),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _calls(done: int, total: int, *, every: Iterable[int], also: Iterable[int], most: int) -> Iterator[int]:
    """The steps at which calls end: at multiples of `every`, at `also`, at `total`, and `most` steps after the last."""
    while done < total:
        due = [done - done % period + period for period in every] + [step for step in also if step > done]
        done = min(total, done + most, *due)
        yield done


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
    if config.batch_size % mesh.size:
        raise BadInput(
            f"config.batch_size={config.batch_size} must be a multiple of the number of devices, {mesh.size}: "
            f"try --config.batch_size={_round_up(config.batch_size, mesh.size)}"
        )


def _round_up(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _check_skipped(config: ConfigDict, program: Program, current: state.TrainState, source: Source, mesh: Mesh) -> None:
    """End the run where the last `config.nonfinite_limit` steps had to be skipped, and say what was wrong in them.

    The state is still that before the first of them and a batch is a function of its step, so both can be looked at.
    """
    skipped = int(current.skipped_in_a_row)
    if skipped < config.nonfinite_limit:
        return
    bad = int(current.step) - skipped + 1  # the first of them
    batches = source.train_batches(
        seed=config.seed,
        batch_size=config.batch_size,
        start_step=bad - 1,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    teacher_variables = program.teacher and program.teacher.variables
    finite = program.finite_rows(current, teacher_variables, sharding.to_global(next(batches), mesh))
    rows = {name: np.flatnonzero(~np.asarray(finite[name])) for name in steps.PARTS if name in finite}
    parts = [name for name, bad_rows in rows.items() if bad_rows.size]
    if parts:
        ids = source.train_ids(seed=config.seed, batch_size=config.batch_size, step=bad - 1)
        where = [ids[row] for row in rows[parts[0]]]
        what = (
            f"{', '.join(parts)} in {len(where)} of {config.batch_size} examples of step {bad}: "
            f"{', '.join(where[:4])}{', …' if len(where) > 4 else ''}"
        )
    else:
        what = "only the gradient with respect to the parameters"
    raise NumericFailure(
        f"{config.nonfinite_limit} steps in a row, from step {bad} on, had a loss or gradient that is not finite "
        f"({what}). Nothing of them was saved. "
        "Try a lower optimizer.learning_rate, optimizer.clip_norm=5, or a smaller dgkd.epsilon."
    )
