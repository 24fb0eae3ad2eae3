"""Exact evaluation: counts every example of a set once, on any number of devices and hosts."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

from dgkd_jax import models
from dgkd_jax.data import order
from dgkd_jax.data.source import Source
from dgkd_jax.evaluate import calibration, collapse, metrics
from dgkd_jax.evaluate.step import Sums, full_step, plain_step
from dgkd_jax.models.host_network import HostNetwork
from dgkd_jax.models.network import Network
from dgkd_jax.runs import sharding

# With more classes their accuracies are left out: they would fill the metrics' line.
MOST_CLASSES_LISTED = 1000

MOST_REMEMBERED_BYTES = 1 << 29  # of a teacher's logits, over all devices: ImageNet's take 200 MB

EMBEDDED = 2000  # number of examples whose features are kept, projected to two dimensions

# (uint8 images, int32 numbers of the examples) -> images; runs on the device.
Corruption = Callable[[jax.Array, jax.Array], jax.Array]


class EvaluationSet(NamedTuple):
    """A set to evaluate on.

    Attributes:
        name: as the user gave it.
        num_examples: in the set.
        batches: global batch size -> this process's share of the batches, padded, with a mask; every process yields
            equally many.
        corruption: of the images, on the device; None: no corruption.
        classes: numbers of the network's classes that it may choose from; None: all.
    """

    name: str
    num_examples: int
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    corruption: Corruption | None = None
    classes: tuple[int, ...] | None = None


class Evaluation(NamedTuple):
    """The result of an evaluation.

    Attributes:
        metrics: `accuracy` in [0, 1] and `ce` in nats (the negative log-likelihood). With `diagnose` also `ece`
            (`calibration.expected_error`), `class_accuracy` (a list, NaN for a class without examples; left out for
            more than `MOST_CLASSES_LISTED` classes), the names of `collapse.measures`, and with a teacher `kl`,
            `agreement` and `logit_msd` (`step.Sums`).
        rows: with `by_example`, else None: the arrays of `evaluations/NAME.npz`, one row per example in the order of
            the set: label; student_prediction, student_confidence, student_nll; with a teacher also teacher_… and
            logit_distance; embedding, embedding_label.
    """

    metrics: dict[str, float | list[float]]
    rows: dict[str, np.ndarray] | None


def batch_rows(most: int, num_examples: int, *, devices: int) -> int:
    """Rows of a global batch: `most`, or the whole set if it is smaller, rounded up to a multiple of the devices."""
    return math.ceil(min(most, num_examples) / devices) * devices


def clean(source: Source) -> EvaluationSet:
    """The evaluation split of a data set."""

    def batches(batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        return source.eval_batches(
            batch_size=batch_size, process_index=jax.process_index(), process_count=jax.process_count()
        )

    return EvaluationSet("clean", source.num_eval, batches)


class Evaluator:
    """Evaluates networks; compiles once per kind of network and of evaluation.

    Without features of the student (`Network.gives_features`) there is no neural collapse, and the logits are embedded.

    Attributes:
        plain, full: `plain_step` and `full_step` under `jit`; `full` gets a teacher that is run as `Known`.
        ask: (network, batch) -> logits, under `jit`.

    Args:
        mesh: all devices.
        batch_size: the largest global batch; it changes no result.
        remembers_teacher: run a teacher over a set once, and keep its logits on the devices for the next evaluations of
            students by the same teacher on the set of the same name, if they take at most `MOST_REMEMBERED_BYTES`.
    """

    def __init__(self, mesh: Mesh, *, batch_size: int, remembers_teacher: bool = False):
        self._mesh, self._batch_size, self._remembers_teacher = mesh, batch_size, remembers_teacher
        self._remembered: dict[tuple[str, str], list[jax.Array]] = {}
        replicated, by_row = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        made = functools.partial(sharding.made_for, mesh)
        self.plain = jax.jit(made(plain_step), out_shardings=replicated)
        self.ask = jax.jit(made(Network.logits), out_shardings=by_row)
        self.full = jax.jit(made(full_step), static_argnames="classes", out_shardings=(replicated, by_row))
        self._add = jax.jit(metrics.merge, donate_argnums=0)
        self._gather = jax.jit(lambda rows: rows, out_shardings=replicated)
        self._scatter = jax.jit(collapse.scatter, out_shardings=replicated)
        self._classifier = jax.jit(models.classifier, out_shardings=replicated)

    def __call__(
        self,
        student: Network,
        chosen: EvaluationSet,
        *,
        teacher: Network | HostNetwork | None = None,
        diagnose: bool = False,
        by_example: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Compute the metrics over all examples of a set.

        Args:
            student: with variables on the mesh.
            chosen: the set.
            teacher: to compare with; read with `diagnose` or `by_example`. None: no comparison.
            diagnose: compute more than accuracy and cross-entropy. Keeps the features of the whole set on the devices
                meanwhile; `collapse` says how much memory that takes.
            by_example: also return a row per example.
            stop: called after every batch, at the same places on all processes; once true, the evaluation ends.

        Returns:
            None if it was stopped.

        Raises:
            RuntimeError: the batches did not hold each example exactly once.
        """
        sums, kept, examples = None, [], _Examples(chosen.num_examples)
        asked = self._asked(teacher, chosen) if diagnose or by_example else None
        for batch, places in self._batches(chosen):
            if diagnose or by_example:
                if asked is not None:
                    batch = batch | {"teacher_logits": asked(batch)}
                beside = teacher if asked is None else Known()
                found, rows = self.full(student, beside, batch, classes=chosen.classes)
                if diagnose:
                    kept.append(rows)
                if by_example:
                    examples.add(jax.device_get(self._gather(rows | {"index": places})))
            else:
                found = self.plain(student, batch)
            sums = self._sum(sums, found)
            if stop():
                return None
        counted = 0 if sums is None else int(sums.means["accuracy"][1])
        if counted != chosen.num_examples:
            raise RuntimeError(f"evaluation counted {counted} examples where the set has {chosen.num_examples}")
        if asked is not None and asked.logits is not None:
            self._remembered[chosen.name, teacher.fingerprint] = asked.logits
        found = metrics.compute(sums.means)
        if diagnose:
            found |= self._diagnosis(student, sums, kept)
        else:
            found = {name: found[name] for name in ("accuracy", "ce")}
        return Evaluation(found, examples.rows() if by_example else None)

    def _asked(self, teacher: Network | HostNetwork | None, chosen: EvaluationSet) -> "_Asked | None":
        """Gives the teacher's logits batch by batch, remembered or new; None: the teacher is run with the student."""
        if isinstance(teacher, HostNetwork):
            ask = self._from_host(teacher)
        elif not self._remembers_teacher or teacher is None or teacher.fingerprint is None:
            return None
        else:
            ask = functools.partial(self.ask, teacher)
        return _Asked(ask, self._remembered.get((chosen.name, teacher.fingerprint)))

    def _from_host(self, teacher: HostNetwork) -> Callable[[dict[str, jax.Array]], jax.Array]:
        """Runs the teacher on the host; its logits are on the mesh."""
        return lambda batch: sharding.to_global({"logits": teacher.on_host(np.asarray(batch["image"]))}, self._mesh)[
            "logits"
        ]

    def count(self, network: Network | HostNetwork, chosen: EvaluationSet, *, batches: int) -> tuple[int, int]:
        """(correct answers, examples) in the first `batches` batches of a set, at least one."""
        sums = None
        for (batch, _), _ in zip(self._batches(chosen), range(batches), strict=False):
            if isinstance(network, HostNetwork):
                batch = batch | {"teacher_logits": self._from_host(network)(batch)}
                sums = self._sum(sums, self.plain(Known(), batch))
            else:
                sums = self._sum(sums, self.plain(network, batch))
        correct, counted = sums.means["accuracy"]
        return int(correct), int(counted)

    def first_logits(self, network: Network | HostNetwork, chosen: EvaluationSet) -> np.ndarray:
        """Logits `[examples, classes]` of the first batch of a set."""
        batch, _ = next(self._batches(chosen))
        ask = self._from_host(network) if isinstance(network, HostNetwork) else functools.partial(self.ask, network)
        logits, mask = jax.device_get((self._gather(ask(batch)), self._gather(batch["mask"])))
        return logits[mask]

    def _batches(self, chosen: EvaluationSet) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        """Global batches, corrupted, with the places of their rows in the set."""
        size = batch_rows(self._batch_size, chosen.num_examples, devices=self._mesh.size)
        for number, batch in enumerate(chosen.batches(size)):
            placed = sharding.to_global(batch | {"index": _places(chosen.num_examples, number, size)}, self._mesh)
            places = placed.pop("index")
            if chosen.corruption is not None:
                placed["image"] = chosen.corruption(placed["image"], places)
            yield placed, places

    def _sum(self, sums: Sums | None, more: Sums) -> Sums:
        sums = more if sums is None else self._add(sums, more)
        sharding.wait_if_needed(sums, self._mesh)
        return sums

    def _diagnosis(
        self, student: Network, sums: Sums, kept: list[dict[str, jax.Array]]
    ) -> dict[str, float | list[float]]:
        values: dict[str, float | list[float]] = {}
        bins, classes, features = jax.device_get((sums.bins, sums.classes, sums.features))
        values["ece"] = calibration.expected_error(bins)
        if student.gives_features:
            values |= self._collapse(student, features, kept)
        if len(classes.count) <= MOST_CLASSES_LISTED:
            values["class_accuracy"] = calibration.class_accuracy(classes).tolist()
        return values

    def _collapse(
        self, student: Network, sums: collapse.ClassSums, kept: list[dict[str, jax.Array]]
    ) -> dict[str, float]:
        """The second pass, over the features that the first kept; it frees them batch by batch."""
        means = collapse.class_means(sums)
        around = jax.device_put({"means": means, "count": sums.count}, sharding.replicated(self._mesh))
        scattered = None
        while kept:
            rows = kept.pop(0)
            part = self._scatter(rows["features"], rows["label"], rows["mask"], rows["student_prediction"], **around)
            scattered = part if scattered is None else self._add(scattered, part)
            sharding.wait_if_needed(scattered, self._mesh)
        weights = jax.device_get(self._classifier(student.variables))
        return collapse.measures(sums, jax.device_get(scattered), means=means, classifier=weights)


@flax.struct.dataclass
class Known:
    """A teacher whose logits are in the batch."""

    def logits(self, batch: dict[str, jax.Array]) -> jax.Array:
        return batch["teacher_logits"]


class _Asked:
    """A teacher's logits of one batch after the other; they are the same batches each time."""

    def __init__(self, ask: Callable[[dict[str, jax.Array]], jax.Array], remembered: list[jax.Array] | None):
        self._ask, self._left = ask, None if remembered is None else iter(remembered)
        self.logits: list[jax.Array] | None = []  # None: they are too large to be kept

    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        logits = self._ask(batch) if self._left is None else next(self._left)
        if self.logits is not None:
            self.logits.append(logits)
            if sum(each.nbytes for each in self.logits) > MOST_REMEMBERED_BYTES:
                self.logits = None
        return logits


class _Examples:
    """Collects rows of batches in the order of the set."""

    def __init__(self, num_examples: int):
        self._rows: dict[str, np.ndarray] = {}
        self._counted = np.zeros(num_examples, np.int32)
        self._embedded = np.arange(min(num_examples, EMBEDDED)) * num_examples // max(min(num_examples, EMBEDDED), 1)

    def add(self, batch: dict[str, np.ndarray]) -> None:
        mask, places = batch.pop("mask"), batch.pop("index")
        places = places[mask]
        self._counted[places] += 1
        embedded = np.isin(places, self._embedded)
        for name, values in batch.items():
            values = values[mask]
            if name == "features":
                where, size = np.searchsorted(self._embedded, places[embedded]), len(self._embedded)
                values = values[embedded].astype(np.float32)
            else:
                where, size = places, len(self._counted)
            self._rows.setdefault(name, np.zeros((size, *values.shape[1:]), values.dtype))[where] = values

    def rows(self) -> dict[str, np.ndarray]:
        """As `Evaluation.rows`.

        Raises:
            RuntimeError: an example is missing, or occurred twice.
        """
        if not (self._counted == 1).all():
            wrong = (self._counted != 1).sum()
            raise RuntimeError(f"{wrong} of {len(self._counted)} examples were not evaluated exactly once")
        rows = dict(self._rows)
        rows["embedding"] = principal_components(rows.pop("features"))
        rows["embedding_label"] = rows["label"][self._embedded]
        return rows


def _places(num_examples: int, number: int, batch_size: int) -> np.ndarray:
    """Places in the set of this process's rows of batch `number`; meaningless on padding rows."""
    share = batch_size // jax.process_count()
    start, _ = order.piece(num_examples, jax.process_index(), jax.process_count())
    return (start + number * share + np.arange(share)).astype(np.int32)


def principal_components(features: np.ndarray) -> np.ndarray:
    """Project centred features on their two main directions; signs are set so that the largest loading is positive.

    Args:
        features: float `[examples, channels]`.

    Returns:
        float32 `[examples, 2]`; 0 in directions that do not exist.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred)
    directions = directions[:, ::-1][:, :2]
    directions *= np.sign(directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])])
    embedding = np.zeros((len(features), 2), np.float32)
    embedding[:, : directions.shape[1]] = centred @ directions
    return embedding
