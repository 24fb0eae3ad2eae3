"""Work directories written by hand, as `main` and `evaluate` leave them: for tests of what reads them. No training."""

import json
from pathlib import Path

import numpy as np

CLASSES = 10
STEPS = (50, 100, 150, 200)
_TRAIN = (
    "loss", "ce", "kd", "tckd", "nckd", "logit_mse", "coupling", "grad_norm", "grad_similarity", "target_gradmag",
    "nontarget_gradmag", "target_norm", "nontarget_norm", "covariance", "logit_msd", "learning_rate",
)  # fmt: skip
_COLLAPSE = ("nc1", "nc2_norms", "nc2_angles", "nc3", "nc4")


def config(method: str, seed: int, *, data: str = "mnist5k", epsilon: float = 0.1, epochs: int = 4) -> dict:
    """The content of a config.json, shortened."""
    return {
        "name": "example", "method": method, "seed": seed, "student": {"model": "small_cnn_w8"},
        "teacher": {"model": "small_cnn_w24", "cache": f"/logits/{seed}"}, "eval_every": 1.0 + seed,
        "data": {"name": data, "mock": False, "dir": f"/data/{seed}"},
        "dkd": {"alpha": 1.0, "beta": 2.0}, "dgkd": {"epsilon": epsilon, "convention": "per_sample"}, "epochs": epochs,
    }  # fmt: skip


def write_run(
    folder: Path, method: str, seed: int, *, accuracy: float, diagnosed: bool = True, finished: bool = True, **settings
) -> Path:
    """A work directory whose last accuracy is `accuracy` and whose best is 0.01 above, at step 150."""
    path = folder / f"{method}-seed{seed}"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config(method, seed, **settings)))
    random = np.random.default_rng([seed, *method.encode()])
    lines = []
    for step, there in zip(STEPS, (-0.3, -0.1, 0.01, 0.0), strict=True):
        train = (
            {name: float(np.exp(random.normal(0, 0.1)) * 50 / step) for name in _TRAIN} if diagnosed else {"loss": 1.0}
        )
        lines.append({"step": step, "kind": "train", "accuracy": accuracy + there - 0.02, "agreement": 0.9, **train})
        evaluated = {"accuracy": accuracy + there, "ce": 20 / step}
        if diagnosed:
            evaluated |= {name: float(random.uniform(0.2, 0.9)) for name in (*_COLLAPSE, "ece", "kl", "logit_msd")}
            evaluated |= {"agreement": 0.9, "class_accuracy": random.uniform(0.8, 1, CLASSES).tolist()}
        lines.append({"step": step, "kind": "eval", **evaluated})
    parts = {"init": 2.0, "compile": 3.0, "data": 1.0, "training": 10.0, "save": 0.5, "evaluation": 1.5}
    if diagnosed:
        lines.append({"step": STEPS[-1], "kind": "goodput", **parts})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (path / "result.json").write_text(json.dumps(result(accuracy)))
    return path


def result(accuracy: float) -> dict:
    """The content of a result.json, shortened."""
    student = {"model": "small_cnn_w8", "parameters": 5026, "last_accuracy": accuracy, "best_accuracy": accuracy + 0.01}
    return {
        "evaluation": {"split": "test", "examples": 1000},
        "teacher": {"last_accuracy": 0.98},
        "student": student | {"best_epoch": 3.0, "epochs": 4, "seconds": 12.0},
    }


def write_evaluation(path: Path, data: str, *, accuracy: float, examples: int = 400) -> None:
    """`evaluations/NAME.json` and `.npz` of a work directory."""
    random = np.random.default_rng([*str(path).encode(), *data.encode()])
    folder = path / "evaluations"
    folder.mkdir(exist_ok=True)
    label = random.integers(0, CLASSES, examples)
    rows = {"label": label, "logit_distance": random.exponential(3, examples)}
    for who, right in (("student", accuracy), ("teacher", 0.97)):
        wrong = random.permutation(examples) >= round(right * examples)
        rows[f"{who}_prediction"] = (label + wrong * random.integers(1, CLASSES, examples)) % CLASSES
        rows[f"{who}_confidence"] = np.where(
            wrong, random.uniform(0.2, 0.9, examples), random.uniform(0.6, 1, examples)
        )
        rows[f"{who}_nll"] = random.exponential(0.2, examples)
    angle = 2 * np.pi * label / CLASSES
    rows["embedding"] = 5 * np.stack([np.cos(angle), np.sin(angle)], -1) + random.normal(0, 0.8, (examples, 2))
    rows["embedding_label"] = label
    np.savez(folder / f"{data}.npz", **rows)
    summary = {
        "data": data, "examples": examples, "checkpoint_step": STEPS[-1], "agreement": 0.9, "logit_msd": 12.0,
        "student": {"accuracy": accuracy, "ce": 0.2, "ece": 0.03},
        "teacher": {"accuracy": 0.97, "ce": 0.1, "ece": 0.01},
        "restricted_to_classes": None,
    }  # fmt: skip
    (folder / f"{data}.json").write_text(json.dumps(summary))
