"""What a student and its teacher say of each example of a set: measured once, summed up, and written for reports.

In a work directory, `evaluations/NAME.npz` holds what was measured of each example, and `evaluations/NAME.json` the
figures that follow from it. The JSON is written last: where it is, the arrays are whole.
"""

import functools
import io
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dgkd_jax import losses, sharding, steps
from dgkd_jax.analysis import calibration
from dgkd_jax.data import Source, order

EMBEDDED = 2000  # examples of a set whose features are kept, as two numbers each

# (uint8 images, int32 numbers of the examples) -> images, on the device.
Corruption = Callable[[jax.Array, jax.Array], jax.Array]


class Network(NamedTuple):
    """A trained network: its model's `apply`, its variables on the mesh, and the pixel mean and std that it knows."""

    apply: steps.Apply
    variables: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Predictor:
    """Compiles student and teacher once, for any number of sets.

    Args:
        student: its `apply` must give features too.
        teacher: anything with the same attributes; None = there is none.
        mesh: where the batches go.
    """

    def __init__(self, student: Network, teacher: Network | None, *, mesh: Mesh):
        self._mesh = mesh
        self._variables = (student.variables, teacher and teacher.variables)
        self._step = jax.jit(
            functools.partial(_measure, student=_view(student), teacher=teacher and _view(teacher)),
            static_argnames="classes",
            out_shardings=sharding.replicated(mesh),
        )

    def batch_size(self, wanted: int, num_examples: int) -> int:
        """`wanted` or less, and a multiple of the devices."""
        return math.ceil(min(wanted, num_examples) / self._mesh.size) * self._mesh.size

    def __call__(
        self,
        batches: Iterable[dict[str, np.ndarray]],
        *,
        num_examples: int,
        batch_size: int,
        corruption: Corruption | None = None,
        classes: tuple[int, ...] | None = None,
    ) -> dict[str, np.ndarray]:
        """One row for each example, in the order of the split.

        Args:
            batches: this process's share, padded, with a mask; equally many batches on every process.
            num_examples: the size of the split.
            batch_size: of the global batch.
            corruption: of the images, on the device.
            classes: the network's classes to choose among, ascending; None = all. Everything is then measured on
                these logits alone.

        Returns:
            The arrays of `evaluations/NAME.npz`: label, student_prediction (the network's class numbers), …_confidence,
            …_nll, the same of the teacher and logit_distance ‖z − v‖ where there is one; embedding, embedding_label.

        Raises:
            RuntimeError: the batches did not hold each example exactly once.
        """
        rows: dict[str, np.ndarray] = {}
        counted = np.zeros(num_examples, np.int32)
        kept = np.arange(min(num_examples, EMBEDDED)) * num_examples // max(min(num_examples, EMBEDDED), 1)
        for number, batch in enumerate(batches):
            batch = {**batch, "index": _places(num_examples, number, batch_size)}
            placed = sharding.to_global(batch, self._mesh)
            if corruption is not None:
                placed["image"] = corruption(placed["image"], placed["index"])
            measured = jax.device_get(self._step(*self._variables, placed, classes=classes))
            mask, index = measured.pop("mask"), measured.pop("index")
            counted[index[mask]] += 1
            for name, values in measured.items():
                values, places = values[mask], index[mask]
                if name == "features":
                    places = np.searchsorted(kept, places)
                    chosen = np.isin(index[mask], kept)
                    values, places = values[chosen], places[chosen]
                size = len(kept) if name == "features" else num_examples
                rows.setdefault(name, np.zeros((size, *values.shape[1:]), values.dtype))[places] = values
        if not (counted == 1).all():
            raise RuntimeError(f"{(counted != 1).sum()} of {num_examples} examples were not evaluated exactly once")
        rows["embedding"] = principal_components(rows.pop("features"))
        rows["embedding_label"] = rows["label"][kept]
        return rows


def _view(network: Network) -> steps.Apply:
    """The network of uint8 images."""

    def apply(variables, images, **options):
        return network.apply(variables, steps.normalize(images, mean=network.mean, std=network.std), **options)

    return apply


def _measure(student_variables, teacher_variables, batch, *, student, teacher, classes):
    logits, features = student(student_variables, batch["image"], features=True)
    logits_of = {"student": logits}
    if teacher is not None:
        logits_of["teacher"] = teacher(teacher_variables, batch["image"])
    label = batch["label"]
    if classes is not None:
        chosen = jnp.asarray(classes)
        logits_of = {who: logits[:, chosen] for who, logits in logits_of.items()}
        label = jnp.searchsorted(chosen, label)
    measured = {key: batch[key] for key in ("label", "mask", "index")} | {"features": features.astype(jnp.float32)}
    for who, logits in logits_of.items():
        prediction = jnp.argmax(logits, axis=-1)
        measured[f"{who}_prediction"] = (prediction if classes is None else chosen[prediction]).astype(jnp.int32)
        measured[f"{who}_confidence"] = jnp.max(jax.nn.softmax(logits), axis=-1).astype(jnp.float32)
        measured[f"{who}_nll"] = losses.cross_entropy(logits, label).astype(jnp.float32)
    if teacher is not None:
        distance = jnp.linalg.norm(logits_of["student"] - logits_of["teacher"], axis=-1)
        measured["logit_distance"] = distance.astype(jnp.float32)
    return measured


def _places(num_examples: int, number: int, batch_size: int) -> np.ndarray:
    """This process's places in the split of batch `number`; on padding they point anywhere and are not used."""
    share = batch_size // jax.process_count()
    start, _ = order.piece(num_examples, jax.process_index(), jax.process_count())
    return (start + number * share + np.arange(share)).astype(np.int32)


def principal_components(features: np.ndarray) -> np.ndarray:
    """Centred features on the two directions in which they vary most; the sign makes each largest loading positive.

    Args:
        features: float `[examples, channels]`.

    Returns:
        float32 `[examples, 2]`; zeros where there are fewer directions.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    _, directions = np.linalg.eigh(centred.T @ centred)
    directions = directions[:, ::-1][:, :2]
    directions *= np.sign(directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])])
    embedding = np.zeros((len(features), 2), np.float32)
    embedding[:, : directions.shape[1]] = centred @ directions
    return embedding


def summary(
    rows: dict[str, np.ndarray], *, data: str, step: int, classes: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """The content of `evaluations/NAME.json`.

    Args:
        rows: from a `Predictor`.
        data: the set's name, as it was asked for.
        step: of the checkpoint.
        classes: as they were given to the `Predictor`.

    Returns:
        Accuracies and agreement in [0, 1], `ce` in nats, `logit_msd` the mean of ‖z − v‖²; `teacher`, `agreement` and
        `logit_msd` are None where there is no teacher, `restricted_to_classes` where the choice was among all classes.
    """

    def of(who: str) -> dict[str, float]:
        correct = rows[f"{who}_prediction"] == rows["label"]
        return {
            "accuracy": int(correct.sum()) / len(correct),
            "ce": float(rows[f"{who}_nll"].mean(dtype=np.float64)),
            "ece": calibration.calibration_error(rows[f"{who}_confidence"], correct),
        }

    taught = "teacher_prediction" in rows
    agreeing = rows["student_prediction"] == rows["teacher_prediction"] if taught else None
    return {
        "data": data,
        "examples": len(rows["label"]),
        "checkpoint_step": step,
        "student": of("student"),
        "teacher": of("teacher") if taught else None,
        "agreement": int(agreeing.sum()) / len(agreeing) if taught else None,
        "logit_msd": float(np.square(rows["logit_distance"], dtype=np.float64).mean()) if taught else None,
        "restricted_to_classes": None if classes is None else len(classes),
    }


def file_name(data: str) -> str:
    """What `NAME` is in `evaluations/NAME.json`: everything but letters, digits, `.`, `_` and `-` becomes `_`."""
    return re.sub(r"[^\w.-]+", "_", data).strip("_")


def write(folder: epath.Path, values: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
    """Both files of an evaluation; on the first process only."""
    if jax.process_index() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **rows)
    name = file_name(values["data"])
    (folder / f"{name}.json").unlink(missing_ok=True)  # it must not stand beside another evaluation's arrays
    for suffix, content in (("npz", buffer.getvalue()), ("json", json.dumps(values, indent=2).encode() + b"\n")):
        unfinished = folder / f"{name}.{suffix}.unfinished"
        unfinished.write_bytes(content)
        unfinished.replace(folder / f"{name}.{suffix}")


def leave_clean(
    folder: epath.Path,
    *,
    student: Network,
    teacher: Network | None,
    source: Source,
    mesh: Mesh,
    eval_batch_size: int,
    step: int,
) -> None:
    """`clean.json` and `clean.npz` of a finished run, unless they are there for this step already.

    Args:
        folder: `evaluations` in the work directory.
        student: as it is evaluated.
        teacher: None where the run has none.
        source: of the run.
        mesh: all devices.
        eval_batch_size: of the run.
        step: of the student's last checkpoint.
    """
    if _is_there(folder, step=step, taught=teacher is not None):
        return
    predict = Predictor(student, teacher, mesh=mesh)
    batch_size = predict.batch_size(eval_batch_size, source.num_eval)
    batches = source.eval_batches(
        batch_size=batch_size, process_index=jax.process_index(), process_count=jax.process_count()
    )
    rows = predict(batches, num_examples=source.num_eval, batch_size=batch_size)
    write(folder, summary(rows, data="clean", step=step), rows)


def _is_there(folder: epath.Path, *, step: int, taught: bool) -> bool:
    try:
        values = json.loads((folder / "clean.json").read_text())
        return values["checkpoint_step"] == step and (values["teacher"] is not None) == taught
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False  # none, or half-written
