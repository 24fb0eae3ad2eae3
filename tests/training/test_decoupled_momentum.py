"""DOT and DeepKD: their authors' figures, what they come down to in closed form, and what they refuse."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dgkd_jax.training.decoupled_momentum import deepkd, dot

GOLDEN = Path(__file__).parents[1] / "golden" / "peers" / "optimizers.npz"
DEEPKD = {"momentum_task": 0.975, "momentum_tckd": 0.825, "momentum_nckd": 0.95}


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def trajectory(optimizer, params, gradients, *, steps):
    """The parameters after each step, the gradients being a function of the step."""
    step = jax.jit(optimizer.update)
    opt_state, found = optimizer.init(params), []
    for index in range(steps):
        updates, opt_state = step(gradients(index), opt_state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


@pytest.mark.parametrize(
    ("name", "make", "parts"),
    [
        ("dot", dot, ("task", "kd")),
        ("deepkd_released", lambda *rate, **more: deepkd(*rate, form="released", **more), ("task", "tckd", "nckd")),
    ],
)
def test_parameters_are_those_of_the_authors_code(name, make, parts):
    golden = dict(np.load(GOLDEN))
    settings = {f"momentum_{part}": float(golden[f"{name}/momentum_{part}"]) for part in parts}
    settings["weight_decay"] = float(golden[f"{name}/weight_decay"])
    optimizer = make(float(golden[f"{name}/learning_rate"]), **settings)

    def gradients(step):
        return {part: [jnp.asarray(golden[f"gradients/{part}/{i}"][step]) for i in range(2)] for part in parts}

    found = trajectory(optimizer, [jnp.asarray(golden[f"params0/{i}"]) for i in range(2)], gradients, steps=10)
    for i in range(2):
        np.testing.assert_allclose([step[i] for step in found], golden[f"{name}/{i}"], rtol=0, atol=1e-12)


def random_problem(*names):
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=(3, 2)), "bias": random.normal(size=2)}
    steps = [{n: {key: random.normal(size=p.shape) for key, p in params.items()} for n in names} for _ in range(5)]
    return jax.tree.map(jnp.asarray, params), steps


@pytest.mark.parametrize("form", ["paper", "released"])
def test_equal_momenta_are_sgd_on_the_sum_of_the_gradients(form):
    """Without weight decay, which `released` takes of other parameters."""
    params, steps = random_problem("task", "tckd", "nckd")
    rate = optax.exponential_decay(0.1, 1, 0.5)
    momenta = dict.fromkeys(DEEPKD, 0.9)
    found = trajectory(deepkd(rate, weight_decay=0.0, form=form, **momenta), params, steps.__getitem__, steps=5)
    sums = [jax.tree.map(lambda *parts: sum(parts), *step.values()) for step in steps]
    expected = trajectory(optax.sgd(rate, momentum=0.9), params, sums.__getitem__, steps=5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13), found, expected)


def test_a_constant_gradient_gains_one_over_one_minus_the_momentum():
    """So in the steady state DeepKD is SGD with the parts of the loss weighted by (1 − 0.9)/(1 − μ)."""
    gradient = {"task": jnp.array([1.0, 0.0, 0.0]), "tckd": jnp.array([0.0, 1.0, 0.0]), "nckd": jnp.array([0, 0, 1.0])}
    optimizer = deepkd(0.1, weight_decay=0.0, **DEEPKD)
    *_, before, last = trajectory(optimizer, jnp.zeros(3), lambda _: gradient, steps=1500)
    momenta = np.array(list(DEEPKD.values()))
    np.testing.assert_allclose(last - before, -0.1 / (1 - momenta), rtol=1e-9)

    weighted = jnp.asarray((1 - 0.9) / (1 - momenta))
    *_, before, last = trajectory(optax.sgd(0.1, 0.9), jnp.zeros(3), lambda _: weighted, steps=1500)
    np.testing.assert_allclose(last - before, -0.1 / (1 - momenta), rtol=1e-9)


def test_released_never_uses_the_tasks_momentum_and_the_papers_form_does():
    params, steps = random_problem("task", "tckd", "nckd")

    def last(form, momentum_task):
        settings = DEEPKD | {"momentum_task": momentum_task, "weight_decay": 5e-4, "form": form}
        return trajectory(deepkd(0.1, **settings), params, steps.__getitem__, steps=5)[-1]["kernel"]

    np.testing.assert_array_equal(last("released", 0.975), last("released", 0.5))
    assert np.abs(last("paper", 0.975) - last("paper", 0.5)).max() > 0.1


def test_weight_decay_decays_with_the_momentum_of_its_gradient_and_only_where_the_mask_is_true():
    """No gradients: θ₁ = θ₀ − ηλθ₀, and then m₂ = μ·λθ₀ + λθ₁ with the μ of the task."""
    params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
    zeros = {name: jax.tree.map(jnp.zeros_like, params) for name in ("task", "kd")}

    def kernels(tree):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    optimizer = dot(0.1, momentum_task=0.5, momentum_kd=0.9, weight_decay=0.2, mask=kernels)
    _, second = trajectory(optimizer, params, lambda _: zeros, steps=2)
    np.testing.assert_array_equal(second["bias"], 1.0)
    np.testing.assert_allclose(second["kernel"], 0.98 - 0.1 * (0.5 * 0.2 + 0.2 * 0.98), rtol=1e-15)


def test_updates_keep_the_dtype_of_the_parameters():
    params = jnp.ones(2, jnp.float32)
    gradients = {"task": params, "tckd": params, "nckd": params}
    for form in ("paper", "released"):
        optimizer = deepkd(lambda step: jnp.asarray(0.1), weight_decay=5e-4, form=form, **DEEPKD)  # float64 rate
        updates, after = optimizer.update(gradients, optimizer.init(params), params)
        assert {leaf.dtype for leaf in jax.tree.leaves((updates, after.momenta))} == {jnp.dtype("float32")}


def test_other_names_other_forms_and_no_parameters_are_refused():
    optimizer = dot(0.1, momentum_task=0.8, momentum_kd=0.9, weight_decay=0.0)
    ones = jnp.ones(2)
    with pytest.raises(ValueError, match="gradients named task, tckd: have to be task, kd"):
        optimizer.update({"task": ones, "tckd": ones}, optimizer.init(ones), ones)
    with pytest.raises(ValueError, match="give them to `update`"):
        optimizer.update({"task": ones, "kd": ones}, optimizer.init(ones))
    with pytest.raises(ValueError, match="form='release': 'paper' or 'released'"):
        deepkd(0.1, weight_decay=0.0, form="release", **DEEPKD)
