"""The deviations that show in a network: short trainings of a small one on generated images.

The images are a pattern of their class under noise; ten epochs of 16 batches. Such a training says which way an effect
goes and whether it is large, not how many points it costs on a real set.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dgkd_jax import models
from dgkd_jax.methods import CE
from dgkd_jax.models import layers
from dgkd_jax.models.network import Network
from dgkd_jax.parity.bare_step import Step, bare_step
from dgkd_jax.parity.findings import Row, effect
from dgkd_jax.training import state
from dgkd_jax.training.optimizer import learning_rate_schedule, make_optimizer

CLASSES, SHAPE, BATCH = 10, (28, 28, 1), 64
EPOCHS, STEPS_PER_EPOCH = 10, 16

Variables = dict[str, Any]


def rows() -> list[Row]:
    """Every row that needs a network."""
    images, labels = generated(key=0)
    unseen = generated(key=1)
    normal = train(images, labels)
    found = [*frozen_statistics(images, labels, unseen, normal), *weight_decay(images, labels, unseen, normal)]
    found += [*adamw(images, labels, unseen), *running_variance(unseen, normal)]
    return [*found, *twice_per_step(), *dropout()]


def generated(*, key: int) -> tuple[np.ndarray, np.ndarray]:
    """One epoch's images [steps, batch, 28, 28, 1], normalised, and labels; the patterns are the same for every key."""
    patterns = np.random.Generator(np.random.Philox(key=99)).standard_normal((CLASSES, 7, 7, 1))
    rng = np.random.Generator(np.random.Philox(key=key))
    labels = rng.integers(0, CLASSES, (STEPS_PER_EPOCH, BATCH))
    images = patterns.repeat(4, 1).repeat(4, 2)[labels] + 3.0 * rng.standard_normal((*labels.shape, *SHAPE))
    return images.astype(np.float32), labels.astype(np.int32)


def optimizer_config(name: str, *, decay_on: str = "all") -> ConfigDict:
    """Section `optimizer` of a configuration: CIFAR-100's recipe."""
    settings = {"momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "decay_on": decay_on, "clip_norm": 0.0}
    return ConfigDict({"name": name, **settings})


def train(
    images: np.ndarray, labels: np.ndarray, *, frozen_after: int = EPOCHS, optimizer: str = "sgd", decay_on: str = "all"
) -> list[Variables]:
    """The student's variables after each epoch, by cross-entropy at rate 0.05.

    Args:
        frozen_after: from this epoch on the student trains in evaluation mode, as in the DGKD repository.
        optimizer, decay_on: as `optimizer_config`.
    """
    usual, current = _step(False, optimizer, decay_on)
    in_evaluation, _ = _step(True, optimizer, decay_on)
    after = []
    for epoch in range(EPOCHS):
        for x, y in zip(images, labels, strict=True):
            step = in_evaluation if epoch >= frozen_after else usual
            current = step(current, None, {"image": x, "label": y})
        after.append(current.variables)
    return after


@functools.cache
def _step(frozen: bool, optimizer: str, decay_on: str) -> tuple[Step, state.TrainState]:
    """The compiled step of `train`, and the state that it begins with."""
    model = models.create("small_cnn_w8", num_classes=CLASSES)
    variables = jax.tree.map(jnp.asarray, models.initialise(model, SHAPE, 0))

    def in_evaluation(variables, images, *, train, mutable):
        del train, mutable
        return model.apply(variables, images), {"batch_stats": variables["batch_stats"]}

    student = Network(in_evaluation if frozen else model.apply, variables, (), ())
    chosen = make_optimizer(optimizer_config(optimizer, decay_on=decay_on), lambda step: 0.05)
    step, start = bare_step(student, method=CE(), optimizer=chosen)
    return jax.jit(step), start


@jax.jit
def logits_of(variables: Variables, images: np.ndarray) -> jax.Array:
    """Logits [images, classes] in evaluation mode."""
    model = models.create("small_cnn_w8", num_classes=CLASSES)
    return model.apply(variables, images.reshape(-1, *SHAPE))


def accuracy(variables: Variables, unseen: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of right answers, in evaluation mode."""
    return float(np.mean(np.argmax(logits_of(variables, unseen[0]), -1) == unseen[1].ravel()))


def frozen_statistics(images, labels, unseen, normal: list[Variables]) -> list[Row]:
    """BatchNorm frozen from the second epoch on."""
    frozen = train(images, labels, frozen_after=1)
    drift = statistics_drift(normal[0]["batch_stats"], normal[-1]["batch_stats"])
    stale = {"params": normal[-1]["params"], "batch_stats": normal[0]["batch_stats"]}
    change = relative(logits_of(stale, unseen[0]), logits_of(normal[-1], unseen[0]))
    setting = f"small_cnn_w8, {EPOCHS} epochs of {STEPS_PER_EPOCH} steps"
    name = "BatchNorm frozen"
    return [
        effect(name, setting, "drift of the running mean after the 1st epoch, in standard deviations", drift[0]),
        effect(name, setting, "drift of the running variance, mean |log ratio|", drift[1]),
        effect(name, setting, "change of the logits by the 1st epoch's statistics, relative", change),
        effect(name, setting, "accuracy on unseen images, trained as usual", accuracy(normal[-1], unseen)),
        effect(name, setting, "accuracy on unseen images, trained frozen", accuracy(frozen[-1], unseen)),
    ]


def statistics_drift(before: Any, after: Any) -> tuple[float, float]:
    """Mean over channels of |Δmean|/standard deviation and of |log(var ratio)|."""
    means, variances = [], []
    for name in before:
        old, new = before[name], after[name]
        means.append(jnp.abs(new["mean"] - old["mean"]) / jnp.sqrt(new["var"]))
        variances.append(jnp.abs(jnp.log(new["var"] / old["var"])))
    return float(jnp.mean(jnp.concatenate(means))), float(jnp.mean(jnp.concatenate(variances)))


def weight_decay(images, labels, unseen, normal: list[Variables]) -> list[Row]:
    """Decay of BatchNorm and biases, as PyTorch's SGD does, or of kernels only."""
    kernels = train(images, labels, decay_on="kernels")
    found = []
    for name, trained in (("all (PyTorch's)", normal), ("kernels", kernels)):
        scales = [leaf["scale"] for leaf in trained[-1]["params"].values() if "scale" in leaf]
        found.append(("mean |BatchNorm scale| at the end", name, float(jnp.mean(jnp.abs(jnp.concatenate(scales))))))
        found.append(("accuracy on unseen images", name, accuracy(trained[-1], unseen)))
    found.append(("what is left of a parameter without gradient, CIFAR-100 recipe", "all (PyTorch's)", decayed_to()))
    return [effect("weight decay", f"decay_on={name}", quantity, value) for quantity, name, value in found]


def decayed_to(*, epochs: int = 240, steps_per_epoch: int = 781) -> float:
    """What weight decay alone makes of a 1 over the CIFAR-100 recipe."""
    schedule = ConfigDict({"name": "step", "warmup_epochs": 0.0, "milestones": (150, 180, 210), "factor": 0.1})
    total = epochs * steps_per_epoch
    rate = learning_rate_schedule(schedule, peak=0.05, steps_per_epoch=steps_per_epoch, total_steps=total)
    config = optimizer_config("sgd")

    def body(carry, step):
        w, trace = carry
        # The rate is the step's own, so the optimizer is made for it; its state is the momentum alone.
        optimizer = make_optimizer(config, lambda _: rate(step))
        updates, trace = optimizer.update(jnp.zeros(()), trace, w)
        return (w + updates, trace), None

    start = jnp.ones(()), make_optimizer(config, lambda _: 0.0).init(jnp.ones(()))
    (left, _), _ = jax.lax.scan(body, start, jnp.arange(total))
    return float(left)


def adamw(images, labels, unseen) -> list[Row]:
    """AdamW at the learning rate of SGD."""
    trained = train(images, labels, optimizer="adamw")
    value = accuracy(trained[-1], unseen)
    return [effect("AdamW at 0.05", f"small_cnn_w8, {EPOCHS} epochs", "accuracy on unseen images", value)]


def running_variance(unseen, normal: list[Variables]) -> list[Row]:
    """Unbiased running variance (PyTorch's and ours) against Flax's biased one."""
    counts = {"bn1": BATCH * 14 * 14, "bn2": BATCH * 7 * 7, "bn3": BATCH * 4 * 4}
    unbiased = normal[-1]
    biased = {
        name: leaf | {"var": leaf["var"] * (1 - 1 / counts[name])} for name, leaf in unbiased["batch_stats"].items()
    }
    change = relative(
        logits_of({"params": unbiased["params"], "batch_stats": biased}, unseen[0]), logits_of(unbiased, unseen[0])
    )
    return [
        effect(
            "running variance", f"small_cnn_w8, batch {BATCH}", "change of the logits by a biased one, relative", change
        )
    ]


def twice_per_step() -> list[Row]:
    """mdistiller's WRN runs three BatchNorms twice per step."""
    norm = layers.BatchNorm()
    x = jnp.asarray(np.random.Generator(np.random.Philox(key=0)).standard_normal((64, 8, 8, 16)) + 1.0, jnp.float32)
    variables = {
        "params": {"scale": jnp.ones(16), "bias": jnp.zeros(16)},
        "batch_stats": {"mean": jnp.zeros(16), "var": jnp.ones(16)},
    }
    found = []
    for times in (1, 2):
        current = variables
        for _ in range(times):
            _, updated = norm.apply(current, x, train=True, mutable=["batch_stats"])
            current = current | updated
        share = float(jnp.mean(current["batch_stats"]["mean"] / jnp.mean(x, (0, 1, 2))))
        setting = f"run {'twice (mdistiller)' if times == 2 else 'once (ours)'}"
        found.append(
            effect("WRN's BatchNorm", setting, "move of the running mean towards the batch's, per step", share)
        )
    return found


def dropout() -> list[Row]:
    """torchvision's mobilenet_v2 drops 20 % of the features before the head in training; ours none."""
    model = models.create("mobilenet_v2", num_classes=100)
    variables = models.initialise(model, (64, 64, 3), 0)
    rng = np.random.Generator(np.random.Philox(key=0))
    images = rng.standard_normal((8, 64, 64, 3)).astype(np.float32)
    options = {"xla_backend_optimization_level": 0}  # it runs once
    forward = jax.jit(lambda v, x: model.apply(v, x, features=True), compiler_options=options)
    logits, features = (np.asarray(part) for part in forward(variables, images))
    kernel = np.linalg.lstsq(features, logits, rcond=None)[0]
    kept = rng.random(features.shape) >= 0.2
    change = relative((features * kept / 0.8) @ kernel, features @ kernel)
    return [
        effect(
            "dropout", "mobilenet_v2, random weights, 64 pixels", "change of training logits by it, relative", change
        )
    ]


def relative(found, expected) -> float:
    """‖found − expected‖ / ‖expected‖, each row of logits without its mean, which no loss sees."""
    found, expected = (x - np.mean(x, -1, keepdims=True) for x in (np.asarray(found), np.asarray(expected)))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
