"""Work directories that hold a student with random weights, as a run leaves them. No training, no compilation."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_runs import small

from dgkd_jax import models
from dgkd_jax.models.network import Network
from dgkd_jax.runs import checkpoint
from dgkd_jax.runs.record import History, Record
from dgkd_jax.training import state

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
STEP, LAST, BEST = 200, 0.625, 0.75


def variables_of(name: str, image_shape: tuple[int, int, int], *, classes: int = 10) -> dict:
    """Random variables, BatchNorm's running statistics included."""
    variables = models.initialise(models.create(name, num_classes=classes), image_shape, 0)
    random = np.random.default_rng(0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get("batch_stats", {})):
        low, high = (-0.2, 0.2) if path[-1].key == "mean" else (0.5, 1.5)
        leaf[:] = random.uniform(low, high, leaf.shape)
    return variables


def network_of(name: str, variables: dict, *, channels: int = 3, classes: int = 10) -> Network:
    """The network with the pixel statistics that are written into the work directory."""
    model = models.create(name, num_classes=classes)
    return Network(model.apply, variables, MEAN[:channels], STD[:channels])


def write(
    folder: Path, name: str, image_shape: tuple[int, int, int], *, variables: dict | None = None, finished: bool = True,
    **changes,
) -> dict:  # fmt: skip
    """Write the work directory of `name` distilled from resnet56; returns the student's variables."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = variables or variables_of(name, image_shape)
    config = small(**{"student.model": name, "teacher.model": "resnet56", "method": "dkd", "epochs": 2} | changes)
    (folder / "config.json").write_text(config.to_json())
    channels = image_shape[-1]
    about = {
        "name": config.data.name, "num_classes": 10, "image_shape": image_shape, "mean": MEAN[:channels],
        "std": STD[:channels], "enable_x64": False,
    }  # fmt: skip
    (folder / "student.json").write_text(json.dumps(about))
    lines = [{"step": STEP // 2, "kind": "eval", "accuracy": BEST}, {"step": STEP, "kind": "eval", "accuracy": LAST}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "result.json").write_text(json.dumps(_result(name)))
    history = History(last_accuracy=LAST, best_accuracy=BEST, best_score=BEST, best_step=STEP // 2)
    record = Record({}, {}, None, history, {}, LAST, evaluation_due=False)
    created = state.create({"batch_stats": {}} | variables, optax.sgd(0.1), ema=False, metric_names=("loss",))
    created = jax.tree.map(jnp.asarray, created.replace(step=np.int32(STEP)))
    with checkpoint.Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(created, record=record.to_json(), score=LAST)
    return variables


def _result(name: str) -> dict:
    student = {"model": name, "parameters": 5026, "last_accuracy": LAST, "best_accuracy": BEST, "best_epoch": 1.0}
    return {
        "evaluation": {"split": "test", "examples": 1000},
        "teacher": {"model": "resnet56", "last_accuracy": 0.8125},
        "student": student | {"epochs": 2, "seconds": 12.0},
    }


def images(count: int, image_shape: tuple[int, int, int]) -> np.ndarray:
    """Random uint8 images."""
    return np.random.default_rng(1).integers(0, 256, (count, *image_shape), np.uint8)
