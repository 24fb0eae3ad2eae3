"""The model card: what a student is, how it was trained, how good it is, and the command that trains it again."""

import shlex
from typing import Any

from ml_collections import ConfigDict

from dgkd_jax.methods import needs_teacher
from dgkd_jax.report.work_directories import Run
from dgkd_jax.runs import config as rules
from dgkd_jax.runs.default import KEYS, READ_BY_OPTIMIZERS, TEACHERS_OWN
from dgkd_jax.runs.student import Student

_FOLDER_OF_IMAGES = "FOLDER"  # where the images lie is nobody else's business


def front_matter(student: Student, run: Run, *, library: str) -> str:
    """The YAML that huggingface.co reads, without its `---` lines.

    Args:
        library: that loads the weights, as huggingface.co calls it: timm or dgkd_jax.
    """
    from huggingface_hub import EvalResult, ModelCardData  # an extra

    accuracy = [] if student.accuracy is None or run.config["data.mock"] else [student.accuracy]
    return ModelCardData(
        library_name=library,
        pipeline_tag="image-classification",
        tags=["knowledge-distillation", "jax", "dgkd_jax"],
        model_name=_title(student),
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=student.about["name"],
                dataset_name=student.about["name"],
                metric_type="accuracy",
                metric_value=round(value, 6),
            )
            for value in accuracy
        ]
        or None,
    ).to_yaml()


def body(student: Student, run: Run, *, usage: str) -> str:
    """The card's text: Markdown, with the figures of the run.

    Args:
        usage: a section that says how to load the weights.
    """
    mean, std = (", ".join(f"{value:.6g}" for value in student.about[key]) for key in ("mean", "std"))
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(student, run).items())
    notes = ["The best accuracy was chosen on the evaluation split itself, so it is optimistic: quote the last."]
    if run.config["data.mock"]:
        notes = ["Trained on generated images: the accuracies mean nothing."]
    elif examples := (run.result or {}).get("evaluation", {}).get("examples"):
        notes.append(f"Evaluated on {examples:,} images.")
    return f"""# {_title(student)}

| | |
|---|---|
{rows}

{" ".join(notes)}

Pixels are divided by 255, less the mean ({mean}), divided by the standard deviation ({std}), per channel.

{usage}
## Train it again

In a clone of dgkd_jax:

    {command(student.config)}
"""


def _title(student: Student) -> str:
    return f"{student.config.student.model} by {student.config.method} on {student.about['name']}"


def _rows(student: Student, run: Run) -> dict[str, str]:
    height, width, channels = student.about["image_shape"]
    last, best = _accuracies(run)
    teacher = (run.result or {}).get("teacher") or {}
    return {
        "data set": f"{student.about['name']}, {student.about['num_classes']} classes, {height}x{width}x{channels}",
        "method": student.config.method,
        "teacher": _with_accuracy(student.config.teacher.model, teacher.get("last_accuracy"))
        if needs_teacher(student.config.method)
        else "none",
        "accuracy of these weights": f"{_percent(student.accuracy)}, step {student.step}",
        "last accuracy": _percent(last),
        "best accuracy": _percent(best),
        "epochs": f"{student.config.epochs}" + ("" if run.finished else ", not finished"),
    }


def _accuracies(run: Run) -> tuple[float | None, float | None]:
    """Of the last and the best evaluation so far."""
    if run.result:
        return run.result["student"].get("last_accuracy"), run.result["student"].get("best_accuracy")
    found = [line["accuracy"] for line in run.evals if "accuracy" in line]
    return (found[-1], max(found)) if found else (None, None)


def _percent(accuracy: float | None) -> str:
    return "not evaluated" if accuracy is None else f"{100 * accuracy:.2f} %"


def _with_accuracy(name: str, accuracy: float | None) -> str:
    return name if accuracy is None else f"{name}, {_percent(accuracy)}"


def command(config: ConfigDict) -> str:
    """The command that starts the run again, with each key that decides the run and is not at its default."""
    whole = config.copy_and_resolve_references()
    rules.fill_in_teacher(whole, whole)
    flat = {key: _as_given(value) for key, value in rules.flatten(whole).items()}
    # The teacher's settings that are not given are those of the file, which has every key at its default.
    defaults = {f"teacher.{name}": KEYS[name].default for name in TEACHERS_OWN}
    chosen = {
        key: value
        for key, value in rules.deciding(flat, "run", "teacher").items()
        if key not in KEYS or value != defaults.get(key, KEYS[key].default)
    }
    for key, optimizers in READ_BY_OPTIMIZERS.items():
        if config.optimizer.name not in optimizers:
            chosen.pop(key, None)
    if config.data.manual_dir:
        chosen["data.manual_dir"] = _FOLDER_OF_IMAGES
    overrides = [f"--config.{key}={value}" for key, value in {"name": config.name, **chosen}.items()]
    return shlex.join(["python", "-m", "dgkd_jax.main", "--config=dgkd_jax/runs/default.py", *overrides])


def _as_given(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
