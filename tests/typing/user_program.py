"""What a user's own program sees of the types; `make lint` checks it, nothing runs it."""

from typing import Any, assert_type

import jax
import numpy as np

import dgkd_jax
from dgkd_jax import losses, methods, models, torch_port


def teacher(images: np.ndarray) -> np.ndarray:
    return images.mean((1, 2))


def train(student: Any, images: np.ndarray, labels: np.ndarray) -> float:
    result = dgkd_jax.distill(student, teacher, train=(images, labels), method="dkd", epochs=2, batch_size=16)
    assert_type(result, dgkd_jax.Distilled)
    assert_type(result.workdir, str)
    return result.accuracy


def loss(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> jax.Array:
    per_sample = losses.dkd(student_logits, teacher_logits, labels, alpha=1.0, beta=8.0, temperature=4.0)
    assert_type(per_sample, jax.Array)
    scalar = losses.dist(student_logits, teacher_logits, temperature=4.0, beta=1.0, gamma=1.0)
    return per_sample.mean() + scalar


def names() -> tuple[str, ...]:
    assert_type(models.NAMES, tuple[str, ...])
    return (*models.NAMES, *methods.METHODS)


def weights(path: str) -> dict[str, np.ndarray]:
    return dict(torch_port.load(path))


def misuse(images: np.ndarray) -> None:
    dgkd_jax.distill(images, train=images)  # type: ignore[call-arg]  # no epochs
    losses.kd(jax.numpy.asarray(images), jax.numpy.asarray(images))  # type: ignore[call-arg]  # no temperature
