"""Computes one batch of an evaluation: sums over its examples, and a row per example."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dgkd_jax import losses
from dgkd_jax.evaluate import calibration, collapse, metrics
from dgkd_jax.models.network import Network

Batch = dict[str, jax.Array]

TEACHER_METRICS = ("kl", "agreement", "logit_msd")  # only with a teacher


class Sums(NamedTuple):
    """Sums over a batch, or over several batches when added. `plain_step` gives only `means`.

    Attributes:
        means: `accuracy` and `ce`; from `full_step` with a teacher also `kl` (KL(teacher ‖ student) at T = 1, nats),
            `agreement` (share with the same top class) and `logit_msd` (‖z − v‖²).
        bins: calibration sums per interval of confidence.
        classes: examples and correct answers per class.
        features: sums of the features per class.
    """

    means: metrics.Totals
    bins: calibration.Bins | None = None
    classes: calibration.ClassCounts | None = None
    features: collapse.ClassSums | None = None


def plain_step(student: Network, batch: Batch) -> Sums:
    """Accuracy and cross-entropy of one batch.

    Args:
        student: run in evaluation mode.
        batch: {"image": uint8 `[batch, height, width, channels]`, "label": int32 `[batch]`, "mask": bool `[batch]`}.

    Returns:
        Totals `accuracy` (int32, int32) and `ce` (float32, int32) over the rows where the mask is true.
    """
    return Sums(_means(student.logits(batch), batch["label"], batch["mask"]))


def full_step(
    student: Network, teacher: Network | None, batch: Batch, *, classes: tuple[int, ...] | None = None
) -> tuple[Sums, dict[str, jax.Array]]:
    """`plain_step`, and calibration, neural collapse, the distance to a teacher, and a row per example.

    Args:
        student: where its `apply` gives no features, its logits stand for them.
        teacher: a `Network`, or whatever else gives `logits(batch)`; None: no comparison.
        batch: as for `plain_step`.
        classes: the network's classes to choose among, ascending; None: all. All measurements use only these logits.

    Returns:
        The sums, and arrays `[batch, ...]`: features, label, mask; for NAME `student` and `teacher` NAME_prediction
        (the network's class number), NAME_confidence (probability of the top class) and NAME_nll; and with a teacher
        logit_distance, ‖z − v‖.
    """
    if student.gives_features:
        logits, features = student(batch["image"], features=True)
    else:
        logits = features = student(batch["image"])
    logits_of = {"student": logits} | ({} if teacher is None else {"teacher": teacher.logits(batch)})
    label, mask = batch["label"], batch["mask"]
    if classes is not None:
        chosen = jnp.asarray(classes)
        logits_of = {who: logits[:, chosen] for who, logits in logits_of.items()}
        label = jnp.searchsorted(chosen, label)
    logits = logits_of["student"]
    sums = Sums(
        means=_means(logits, label, mask) | _beside_teacher(logits, logits_of.get("teacher"), mask),
        bins=calibration.bins(logits, label, mask),
        classes=calibration.class_counts(logits, label, mask),
        features=collapse.class_sums(features, label, mask, num_classes=logits.shape[-1]),
    )
    rows = {"features": features, "label": batch["label"], "mask": mask} | _by_example(logits_of, label)
    if classes is not None:
        for who in logits_of:
            rows[f"{who}_prediction"] = chosen[rows[f"{who}_prediction"]].astype(jnp.int32)
    return sums, rows


def _means(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> metrics.Totals:
    return {
        "accuracy": metrics.accuracy(logits, labels, mask),
        "ce": metrics.masked_mean(losses.cross_entropy(logits, labels), mask),
    }


def _beside_teacher(logits: jax.Array, teacher_logits: jax.Array | None, mask: jax.Array) -> metrics.Totals:
    if teacher_logits is None:
        return {}
    return {
        "kl": metrics.masked_mean(losses.kd(logits, teacher_logits, temperature=1.0), mask),
        "agreement": metrics.accuracy(teacher_logits, jnp.argmax(logits, axis=-1), mask),
        "logit_msd": metrics.masked_mean(jnp.sum((logits - teacher_logits) ** 2, axis=-1), mask),
    }


def _by_example(logits_of: dict[str, jax.Array], label: jax.Array) -> dict[str, jax.Array]:
    rows = {}
    for who, logits in logits_of.items():
        rows[f"{who}_prediction"] = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        rows[f"{who}_confidence"] = jnp.max(jax.nn.softmax(logits), axis=-1).astype(jnp.float32)
        rows[f"{who}_nll"] = losses.cross_entropy(logits, label).astype(jnp.float32)
    if "teacher" in logits_of:
        distance = jnp.linalg.norm(logits_of["student"] - logits_of["teacher"], axis=-1)
        rows["logit_distance"] = distance.astype(jnp.float32)
    return rows
