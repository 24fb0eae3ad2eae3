"""Optimizers against PyTorch's update rules written in numpy, schedules against their published values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from dgkd_jax.training.optimizer import learning_rate_schedule, make_optimizer

RATE, DECAY, MOMENTUM = 0.05, 5e-4, 0.9


def optimizer_section(**overrides) -> ConfigDict:
    section = {
        "name": "sgd",
        "learning_rate": RATE,
        "momentum": MOMENTUM,
        "nesterov": False,
        "weight_decay": DECAY,
        "decay_on": "all",
        "clip_norm": 0.0,
        "ema_decay": 0.0,
    }
    return ConfigDict(section | overrides)


def run(section: ConfigDict, weights: dict, gradients: list[dict]) -> dict:
    with jax.enable_x64(True):
        optimizer = make_optimizer(section, lambda step: RATE / (1 + step))
        weights = jax.tree.map(jnp.asarray, weights)
        opt_state = optimizer.init(weights)
        for gradient in gradients:
            updates, opt_state = optimizer.update(jax.tree.map(jnp.asarray, gradient), opt_state, weights)
            weights = optax.apply_updates(weights, updates)
        return jax.tree.map(np.asarray, weights)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    weights = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    gradients = [{name: rng.normal(size=w.shape) for name, w in weights.items()} for _ in range(4)]
    return weights, gradients


def pytorch_sgd(weights, gradients, *, nesterov=False, decayed=("kernel", "bias"), clip_norm=0.0):
    """torch.optim.SGD's rule from its documentation, with clip_grad_norm_ before it."""
    weights, buffers = dict(weights), dict.fromkeys(weights)
    for step, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for name, w in weights.items():
            g = gradient[name] * scale + (DECAY * w if name in decayed else 0.0)
            buffers[name] = g if buffers[name] is None else MOMENTUM * buffers[name] + g
            g = g + MOMENTUM * buffers[name] if nesterov else buffers[name]
            weights[name] = w - RATE / (1 + step) * g
    return weights


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        ({}, {}),
        ({"nesterov": True}, {"nesterov": True}),
        ({"decay_on": "kernels"}, {"decayed": ("kernel",)}),
        ({"clip_norm": 0.5}, {"clip_norm": 0.5}),
    ],
)
def test_sgd_follows_pytorchs_update_rule(problem, overrides, rule):
    weights, gradients = problem
    expected = pytorch_sgd(weights, gradients, **rule)
    found = run(optimizer_section(**overrides), weights, gradients)
    for name in weights:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-13)  # a few roundings of float64


def test_adamw_follows_pytorchs_update_rule(problem):
    weights, gradients = problem
    expected, first, second = dict(weights), dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for step, gradient in enumerate(gradients, start=1):
        rate = RATE / step
        for name, g in gradient.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            adam = (first[name] / (1 - 0.9**step)) / (np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8)
            expected[name] = expected[name] * (1 - rate * DECAY) - rate * adam
    found = run(optimizer_section(name="adamw"), weights, gradients)
    for name in weights:
        # optax takes the powers of the betas in float32, 1e-7 relative on an update of at most 0.05.
        np.testing.assert_allclose(found[name], expected[name], atol=1e-7)


def schedule_section(**overrides) -> ConfigDict:
    return ConfigDict({"name": "step", "milestones": (150, 180, 210), "factor": 0.1, "warmup_epochs": 0.0} | overrides)


def test_step_schedule_drops_at_the_start_of_each_milestone_epoch():
    rate = learning_rate_schedule(schedule_section(), peak=0.05, steps_per_epoch=781, total_steps=240 * 781)
    expected = {0: 0.05, 150 * 781 - 1: 0.05, 150 * 781: 5e-3, 180 * 781: 5e-4, 210 * 781: 5e-5, 240 * 781 - 1: 5e-5}
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-6)


def test_two_milestones_in_one_step_both_count():
    """As where a schedule is scaled to a few short epochs."""
    section = schedule_section(milestones=(1.0, 1.1, 2.0))
    rate = learning_rate_schedule(section, peak=0.05, steps_per_epoch=4, total_steps=20)
    np.testing.assert_allclose([rate(step) for step in (3, 4, 8)], [0.05, 5e-4, 5e-5], rtol=1e-6)


def test_cosine_schedule_goes_from_the_peak_through_half_of_it_to_zero():
    rate = learning_rate_schedule(schedule_section(name="cosine"), peak=0.2, steps_per_epoch=10, total_steps=100)
    np.testing.assert_allclose([rate(0), rate(50), rate(100)], [0.2, 0.1, 0.0], atol=1e-8)


def test_learning_rate_warmup_is_linear_and_ends_at_the_peak():
    section = schedule_section(name="constant", warmup_epochs=2.0)
    rate = learning_rate_schedule(section, peak=0.4, steps_per_epoch=5, total_steps=100)
    np.testing.assert_allclose([rate(s) for s in range(12)], [0.04 * min(s + 1, 10) for s in range(12)], rtol=1e-6)
