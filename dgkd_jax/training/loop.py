"""The training loop: trains one network on one data set, with or without a teacher, from its newest checkpoint."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput, Preempted
from dgkd_jax.evaluate import metrics, per_example
from dgkd_jax.evaluate.evaluator import Evaluation, Evaluator, clean
from dgkd_jax.evaluate.step import TEACHER_METRICS
from dgkd_jax.models.network import Network
from dgkd_jax.runs import config as config_rules
from dgkd_jax.runs import sharding
from dgkd_jax.runs import workdir as workdir_lib
from dgkd_jax.runs.checkpoint import Checkpoints
from dgkd_jax.runs.record import History, Record, TaughtBy
from dgkd_jax.training import nonfinite
from dgkd_jax.training.build import Program, build
from dgkd_jax.training.cached_logits.teacher import live, taught_by
from dgkd_jax.training.checks import check_batch
from dgkd_jax.training.feed import OnDevice, Streamed, feed
from dgkd_jax.training.given import NOTHING, Given
from dgkd_jax.training.monitor.recorder import Recorder
from dgkd_jax.training.monitor.timing import Timing
from dgkd_jax.training.state import TrainState
from dgkd_jax.training.step import Teacher


class Trained(NamedTuple):
    """A trained network (the average of its variables if the run keeps one), its history and its parameter count."""

    network: Network
    history: History
    parameters: int

    @property
    def variables(self) -> Any:
        return self.network.variables


def fit(
    config: ConfigDict,
    *,
    workdir: epath.Path,
    source: Source,
    mesh: Mesh,
    teacher: Teacher | None = None,
    leave_examples: bool = False,
    beside: Network | None = None,
    given: Given = NOTHING,
    wait: bool = False,
    which: str = "",
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train `config.student` by `config.method` and leave checkpoints, config and metrics in `workdir`.

    Continues from the newest checkpoint there. The result equals that of an uninterrupted run, bit for bit on one
    device. A finished run is not repeated: its result is read and returned.

    Args:
        config: validated.
        workdir: created if missing.
        source: the data set.
        mesh: all devices.
        teacher: None for method `ce` only.
        leave_examples: also write the evaluation of each example, `evaluations/clean`.
        beside: the network that the examples are compared with; None: the teacher.
        given: objects in place of the config's names.
        wait: if another run is using `workdir`, wait until it ends instead of raising BadInput: for a teacher that two
            students need at once.
        which: which of several runs this is, such as "3 of 5", for the progress line; "": the only one.
        stop: called after every call of the step function and every evaluation batch, at the same places on all
            processes; once it returns true, the run saves and ends.

    Raises:
        BadInput: `workdir` belongs to a run with another config or teacher, or another run is using it; the
            batch does not fit the devices.
        NumericFailure: `config.nonfinite_limit` steps in a row had a loss or gradient that was not finite.
        StorageFailure: a checkpoint or a log could not be written.
        Preempted: `stop` returned true; the same call continues from there.
    """
    spent = Timing()
    with spent.measure("init"):
        check_batch(config, mesh)
        program, initial = build(config, source, mesh, teacher, given=given)
    run = _Run(
        config=config,
        workdir=workdir,
        program=program,
        source=source,
        mesh=mesh,
        evaluator=Evaluator(mesh, batch_size=config.eval_batch_size, remembers_teacher=True),
        beside=beside or live(teacher),
        leave_examples=leave_examples,
        which=which,
        stop=stop,
        spent=spent,
    )
    return run.finish(initial, wait=wait)


def latest_step(workdir: epath.Path) -> int | None:
    """Step of the newest checkpoint in a work directory, damaged or not; None where there is none."""
    if not (workdir / "checkpoints").exists():
        return None
    with Checkpoints(workdir / "checkpoints", keep=1, read_only=True) as checkpoints:
        return checkpoints.latest_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """The parts of a run that do not change from step to step; the state and its record are passed as arguments."""

    config: ConfigDict
    workdir: epath.Path
    program: Program
    source: Source
    mesh: Mesh
    evaluator: Evaluator
    beside: Network | None
    leave_examples: bool
    which: str
    stop: Callable[[], bool]
    spent: Timing

    @property
    def _taught_by(self) -> TaughtBy | None:
        return taught_by(self.program.teacher)

    @property
    def _evaluate_every(self) -> int:
        return max(round(self.config.eval_every * self.program.steps_per_epoch), 1)

    def finish(self, initial: TrainState, *, wait: bool) -> Trained:
        """Read the result of a finished run, or go on from the newest checkpoint to the end.

        Args, Raises: as for `fit`; `initial` is the state at step 0.
        """
        self.workdir.mkdir(parents=True, exist_ok=True)
        folder, keep = self.workdir / "checkpoints", self.config.keep_checkpoints
        if workdir_lib.check(self.workdir, self.config) and latest_step(self.workdir) == self.program.total_steps:
            # Without a lock, so that many students of one finished teacher can start at the same time.
            with Checkpoints(folder, keep=keep, read_only=True) as checkpoints:
                current, record = self.restore(checkpoints, initial)
            if self.finished(current, record):
                self.evaluate_examples(current)
                return self.trained(current, record)
        # Of several processes one waits, and only all of them together can ask whether to stop.
        waiting = (self.stop if jax.process_count() == 1 else lambda: False) if wait else None
        with workdir_lib.lock(self.workdir, wait=waiting):
            workdir_lib.claim(
                self.workdir,
                self.config,
                self.source,
                self.program.student,
                total_steps=self.program.total_steps,
                architecture=self.program.architecture,
            )
            with Checkpoints(folder, keep=keep) as checkpoints:
                with self.spent.measure("init"):
                    current, record = self.restore(checkpoints, initial)
                if not self.finished(current, record):
                    current, record = self.train(current, record, checkpoints)
        self.evaluate_examples(current)
        return self.trained(current, record)

    def restore(self, checkpoints: Checkpoints, initial: TrainState) -> tuple[TrainState, Record | None]:
        """The state and record of the newest checkpoint, or the initial state and None.

        Raises:
            BadInput: the checkpoints belong to another run.
        """
        restored = checkpoints.restore(initial, accept=self._accept)
        if restored is None:
            return initial, None
        current, record = restored
        return current, Record.from_json(record)

    def _accept(self, record: dict[str, Any]) -> None:
        """Refuse a checkpoint that belongs to another run."""
        config_rules.check_same_run(record["identity"], self.config, workdir=self.workdir)
        current = self._taught_by and str(self._taught_by)
        if record["teacher"] != current:
            raise BadInput(
                f"{self.workdir} was trained with another teacher (weights {record['teacher']}, now {current}). "
                "Give another --workdir, or remove this one."
            )

    def finished(self, current: TrainState, record: Record | None) -> bool:
        return int(current.step) == self.program.total_steps and not record.evaluation_due

    def trained(self, current: TrainState, record: Record) -> Trained:
        parameters = sum(leaf.size for leaf in jax.tree.leaves(current.params))
        return Trained(self.program.student.with_variables(current.evaluated), record.history, parameters)

    def train(self, current: TrainState, record: Record | None, checkpoints: Checkpoints) -> tuple[TrainState, Record]:
        """Do the remaining steps; after each call log, evaluate and save if due, in this order."""
        start, total = int(current.step), self.program.total_steps
        evaluation_due = record is not None and record.evaluation_due
        history = record.history if record else History()
        self.spent.go_on_from(record.seconds_by_part if record else {})
        seconds_before = history.seconds
        with self.spent.measure("data"):
            fed = feed(self.config, self.program, source=self.source, mesh=self.mesh, start=start)
        recorder = Recorder(
            self.config,
            self.program,
            self.workdir,
            start=start,
            evaluation_due=evaluation_due,
            spent=self.spent,
            which=self.which,
        )
        with fed, recorder:
            recorder.note(fed.note)
            step_function, done = _Compiled(fed, self.program.teacher, recorder, self.mesh), start
            for step in self._ends_of_calls(start, first=evaluation_due, most=fed.steps_per_call):
                if step > start:
                    current, done = step_function(current, done, step), step
                stopping = self.stop()
                if step > start:
                    current = self._log(current, step, recorder, stopping=stopping)
                evaluation, due = None, self._evaluates(step)
                if due and not stopping:
                    evaluation = self._evaluate(current, step, recorder)
                    stopping = evaluation is None
                if evaluation is not None:
                    history = self._after(history, step, evaluation)
                    recorder.evaluated(step, evaluation.metrics, split=self.source.eval_split)
                due = due and evaluation is None  # without the evaluation the epoch's row must wait too
                if step % self.program.steps_per_epoch == 0 and not due:
                    current = self._end_epoch(current, step, recorder, evaluation)
                if self._saves(step, evaluation) or (stopping and step > 0):
                    history = history._replace(seconds=seconds_before + time.monotonic() - recorder.began)
                    record = self._save(current, history, checkpoints, recorder, evaluation, evaluation_due=due)
                if step == total and not due:
                    recorder.ended(history)
                if stopping:
                    raise Preempted(
                        f"stopped after step {step} of {total}, saved in {self.workdir}; "
                        "the same command goes on from there"
                    )
        return current, record

    def _ends_of_calls(self, start: int, *, first: bool, most: int) -> Iterator[int]:
        """The steps after which something is due, `start` itself included if its evaluation is still due."""
        total = self.program.total_steps
        every = [self.config.log_every, self._evaluate_every, self.program.steps_per_epoch]
        calls = ends_of_calls(start, total, every=[*every, self.config.checkpoint_every or total], most=most)
        return itertools.chain([start], calls) if first else calls

    def _log(self, current: TrainState, step: int, recorder: Recorder, *, stopping: bool) -> TrainState:
        due = step % self.config.log_every == 0 or step == self.program.total_steps
        if not (due or stopping):
            return current
        values = metrics.compute(current.totals)
        self._check_finite(current)
        if due:
            current = current.replace(totals=metrics.zeros_like(current.totals))
            recorder.logged(step, values | {"skipped_steps": int(current.skipped)})
        recorder.loss(step, values["loss"])
        return current

    def _check_finite(self, current: TrainState) -> None:
        nonfinite.check(self.config, self.program, current, self.source, self.mesh)

    def _evaluates(self, step: int) -> bool:
        return step % self._evaluate_every == 0 or step == self.program.total_steps

    def _evaluate(self, current: TrainState, step: int, recorder: Recorder) -> Evaluation | None:
        """Evaluate; None if stopped. After the last step this also writes the examples, if they are wanted."""
        last = self.leave_examples and step == self.program.total_steps
        with self.spent.measure("evaluation"):
            evaluation = self.evaluator(
                self.program.student.with_variables(current.evaluated),
                clean(self.source),
                teacher=self.beside if last else live(self.program.teacher),
                diagnose=self.config.diagnose,
                by_example=last,
                stop=lambda: recorder.alive() or self.stop(),
            )
        if evaluation is None:
            return None
        if last:
            self._write_examples(evaluation)
        if self.program.teacher is None:
            found = {name: value for name, value in evaluation.metrics.items() if name not in TEACHER_METRICS}
            evaluation = evaluation._replace(metrics=found)
        return evaluation

    def evaluate_examples(self, current: TrainState) -> None:
        """Write the examples' evaluation of a finished run, if it is wanted and missing."""
        step, taught = self.program.total_steps, self.beside is not None
        folder = self.workdir / "evaluations"
        if not self.leave_examples or per_example.is_there(folder, step=step, taught=taught):
            return
        student = self.program.student.with_variables(current.evaluated)
        self._write_examples(self.evaluator(student, clean(self.source), teacher=self.beside, by_example=True))

    def _write_examples(self, evaluation: Evaluation) -> None:
        summary = per_example.summary(evaluation.rows, data="clean", step=self.program.total_steps)
        per_example.write(self.workdir / "evaluations", summary, evaluation.rows)

    def _after(self, history: History, step: int, evaluation: Evaluation) -> History:
        return history.after(step=step, accuracy=evaluation.metrics["accuracy"], score=self._score(evaluation))

    def _score(self, evaluation: Evaluation) -> float:
        """The score that the best checkpoint has the highest of."""
        found = evaluation.metrics
        return found["accuracy"] if self.config.best_metric == "accuracy" else -found["ce"]

    def _end_epoch(
        self, current: TrainState, step: int, recorder: Recorder, evaluation: Evaluation | None
    ) -> TrainState:
        recorder.epoch_ended(
            step // self.program.steps_per_epoch,
            metrics.compute(current.epoch_totals),
            test_accuracy=evaluation and evaluation.metrics["accuracy"],
        )
        return current.replace(epoch_totals=metrics.zeros_like(current.epoch_totals))

    def _saves(self, step: int, evaluation: Evaluation | None) -> bool:
        every = self.config.checkpoint_every
        return evaluation is not None or bool(every and step % every == 0)

    def _save(
        self,
        current: TrainState,
        history: History,
        checkpoints: Checkpoints,
        recorder: Recorder,
        evaluation: Evaluation | None,
        *,
        evaluation_due: bool,
    ) -> Record:
        self._check_finite(current)
        record = Record(
            identity=config_rules.identity(self.config),
            config=self.config.to_dict(),
            teacher=self._taught_by,
            history=history,
            seconds_by_part=self.spent.seconds(),
            accuracy=evaluation and evaluation.metrics["accuracy"],
            evaluation_due=evaluation_due,
        )
        with self.spent.measure("save"):
            checkpoints.save(current, record=record.to_json(), score=evaluation and self._score(evaluation))
        recorder.alive()
        return record


class _Compiled:
    """The step function with its feed; compiled at the first call."""

    def __init__(self, fed: Streamed | OnDevice, teacher: Teacher | None, recorder: Recorder, mesh: Mesh):
        self._fed, self._teacher, self._recorder, self._mesh = fed, teacher, recorder, mesh
        self._compiled: jax.stages.Compiled | None = None

    def __call__(self, current: TrainState, done: int, step: int) -> TrainState:
        """Continue from the state after step `done` to the state after `step`."""
        spent = self._recorder.spent
        with spent.measure("data"):
            arguments = self._fed.arguments(done, step - done)
        if self._compiled is None:
            with spent.measure("compile"):
                self._compiled = self._fed.program.lower(current, self._teacher, *arguments).compile()
            self._recorder.compiled(done, self._compiled)
        with jax.transfer_guard("disallow"):  # all inputs are already on the device
            current = self._compiled(current, self._teacher, *arguments)
        sharding.wait_if_needed(current, self._mesh)
        self._recorder.stepped(step, count=step - done)
        return current


def ends_of_calls(done: int, total: int, *, every: Iterable[int], most: int) -> Iterator[int]:
    """Steps at which calls of the step function end: multiples of `every`, `total`; at most `most` steps apart."""
    while done < total:
        due = [done - done % period + period for period in every]
        done = min(total, done + most, *due)
        yield done
