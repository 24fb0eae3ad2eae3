"""A batch that is computed in parts trains as the whole batch, in less memory, on any number of devices."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from in_memory import InMemory, tiny
from small_runs import lines

from benchmarks import scaling, training
from configs import default
from dgkd_jax import models
from dgkd_jax.errors import BadInput, NumericFailure
from dgkd_jax.methods import CE, DGKD, DIST, DKD, GDKD, KD, NKD, RLD, WTTM, LogitMSE
from dgkd_jax.models import initial_values, layers
from dgkd_jax.models.architecture import Architecture
from dgkd_jax.models.network import Network
from dgkd_jax.runs import sharding
from dgkd_jax.training import checks, loop, parts, state
from dgkd_jax.training.decoupled_momentum import deepkd, dot
from dgkd_jax.training.given import Given
from dgkd_jax.training.optimizer import make_optimizer
from dgkd_jax.training.step import finite_rows, metric_names, train_step

CLASSES, BATCH, SHAPE = 5, 16, (6, 6, 1)


class Plain(nn.Module):
    """Two linear layers: no BatchNorm, so no row of a batch has to do with another."""

    num_classes: int = CLASSES
    dtype: Any = jnp.float64

    initial_values: ClassVar = ((r"kernel", initial_values.uniform_fan_in), (r"bias", initial_values.zeros))

    @nn.compact
    def __call__(self, images, *, train=False, features=False):
        x = images.astype(self.dtype).reshape(len(images), -1)
        x = jnp.tanh(layers.Linear(12, dtype=self.dtype, name="first")(x))
        logits = layers.Linear(self.num_classes, dtype=self.dtype, name="fc")(x)
        return (logits, x) if features else logits


def sgd(**changes):
    section = default.get_config().optimizer
    section.update(changes)
    return make_optimizer(section, lambda step: 0.1)


def batch_of(seed):
    random = np.random.default_rng(seed)
    return {
        "image": random.normal(size=(BATCH, *SHAPE)),
        "label": random.integers(0, CLASSES, BATCH).astype(np.int32),
    }


def two_devices():
    return jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("data", "fsdp"))


def float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def network(model, seed):
    return Network(model.apply, float64(models.initialise(model, SHAPE, seed)), (0.5,), (0.25,))


def run(method, *, batches, accumulate, model=None, optimizer=None, mesh=None, ema_decay=0.9, jit=jax.jit, **options):
    """The state after a step for each batch; call it inside `jax.enable_x64(True)`."""
    model, optimizer = model or Plain(), optimizer or sgd()
    mesh = mesh or jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    student, teacher = network(model, 0), network(Plain(), 1)
    start = state.create(student.variables, optimizer, ema=True, metric_names=metric_names(method))
    start = start.replace(step=jnp.asarray(40, jnp.int32))  # the end of the warm-up: distillation at full weight
    step = jit(
        functools.partial(
            train_step,
            student=student.with_variables(None),
            method=method,
            optimizer=optimizer,
            steps_per_epoch=2,
            total_steps=80,
            ema_decay=ema_decay,
            accumulate=accumulate,
            **options,
        )
    )
    current, taught = jax.device_put((start, teacher.variables), sharding.replicated(mesh))
    for batch in batches:
        current = step(current, teacher.with_variables(taught), jax.device_put(batch, sharding.batch_sharding(mesh)))
    return current


def operation_by_operation(step):
    """Not compiled as a whole, which takes ten times as long as a few steps of this size."""
    return step


def assert_same(found, expected, tolerance=1e-14):
    """Sums of float64 in another order."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


CASES = {
    "ce": (CE(), {}),
    "clipping": (CE(), {"optimizer": sgd(clip_norm=0.05)}),
    "kd": (KD(), {}),
    "dkd": (DKD(), {}),
    "dgkd": (DGKD(epsilon=0.5), {}),
    "dgkd literal": (DGKD(epsilon=0.5, convention="literal", parity_batch=BATCH), {}),
    "logit_mse": (LogitMSE(), {}),
    "nkd": (NKD(), {}),
    "wttm": (WTTM(), {}),
    "rld": (RLD(), {}),
    "gdkd": (GDKD(k=2), {}),
    "dot": (
        KD(),
        {
            "optimizer": dot(0.1, momentum_task=0.8, momentum_kd=0.9, weight_decay=5e-4),
            "gradient_names": ("task", "kd"),
        },
    ),
    "deepkd": (
        DKD(),
        {
            "optimizer": deepkd(0.1, momentum_task=0.9, momentum_tckd=0.8, momentum_nckd=0.7, weight_decay=5e-4),
            "gradient_names": ("task", "tckd", "nckd"),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_parts_train_as_the_whole_batch(case):
    """Parameters, momenta, averages and all metrics after three steps, those that compare whole batches included."""
    method, options = CASES[case]
    assert not method.needs_whole_batch
    with jax.enable_x64(True):
        batches = [batch_of(seed) for seed in range(3)]
        whole, found = (
            run(method, batches=batches, accumulate=count, jit=operation_by_operation, **options) for count in (1, 4)
        )
        assert_same(found.replace(totals=None, epoch_totals=None), whole.replace(totals=None, epoch_totals=None))
        assert_same(found.totals, whole.totals, 1e-12)  # norms and quotients of sums
        assert_same(found.epoch_totals, whole.epoch_totals, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        DIST(),
        DGKD(epsilon=0.5, convention="literal"),
        DGKD(epsilon=0.5, convention="normalized", parity_batch=BATCH),
        DGKD(epsilon=0.5, convention="self_normalized"),
        DGKD(epsilon=0.5, wrt="params"),
    ],
)
def test_a_method_that_needs_the_whole_batch_says_so_and_would_differ(method):
    assert method.needs_whole_batch
    with jax.enable_x64(True):
        whole, found = (
            run(method, batches=[batch_of(0)], accumulate=count, jit=operation_by_operation) for count in (1, 4)
        )
        assert optax.tree.norm(optax.tree.sub(found.params, whole.params)) > 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("method", [CE(), KD()])
def test_a_loop_over_the_parts_gives_what_parts_written_out_give(monkeypatch, method):
    with jax.enable_x64(True):
        batches = [batch_of(seed) for seed in range(2)]
        model = models.create("small_cnn_w4", num_classes=CLASSES, dtype=jnp.float64)
        written_out = run(method, batches=batches, accumulate=2, model=model)
        monkeypatch.setattr(parts, "is_loop", lambda count, on: count > 1)
        assert_same(run(method, batches=batches, accumulate=2, model=model), written_out, 1e-12)


@pytest.mark.slow
def test_batch_norm_sees_one_part_at_a_time():
    """Rows 0, 2, 4, … first, then 1, 3, 5, …; the running statistics move twice."""
    with jax.enable_x64(True):
        model = models.create("small_cnn_w4", num_classes=CLASSES, dtype=jnp.float64)
        batch, start = batch_of(0), network(model, 0).variables
        found = run(CE(), batches=[batch], accumulate=2, model=model)
        expected, losses = start, []
        for first in (0, 1):
            images, labels = batch["image"][first::2], batch["label"][first::2]
            logits, updated = model.apply(expected, images, train=True, mutable=["batch_stats"])
            expected = {"params": start["params"], **updated}
            losses.append(-jax.nn.log_softmax(logits)[np.arange(BATCH // 2), labels].mean())
        assert_same(found.batch_stats, expected["batch_stats"], 1e-12)
        np.testing.assert_allclose(found.totals["loss"][0], np.mean(losses), rtol=1e-12)


@pytest.mark.slow
def test_the_parts_are_the_same_on_any_number_of_devices():
    """With BatchNorm, whose statistics depend on which rows are in a part."""
    with jax.enable_x64(True):
        model = models.create("small_cnn_w4", num_classes=CLASSES, dtype=jnp.float64)
        batches = [batch_of(seed) for seed in range(2)]
        one, two, eight = (
            run(CE(), batches=batches, accumulate=2, model=model, mesh=mesh)
            for mesh in (None, two_devices(), sharding.make_mesh())
        )
        for other in (two, eight):
            assert_same(
                (other.params, other.batch_stats, other.totals), (one.params, one.batch_stats, one.totals), 1e-9
            )


@pytest.mark.slow
@pytest.mark.parametrize("loop", [False, True])
def test_no_row_moves_between_devices(monkeypatch, loop):
    """All that the devices exchange are sums, never images or logits."""
    monkeypatch.setattr(parts, "is_loop", lambda count, on: loop)
    mesh = two_devices()
    step, inputs = training.build(
        mesh, student="small_cnn_w4", teacher="small_cnn_w4", batch=16, method=KD(), accumulate=2
    )
    program = step.lower(*inputs).compile({"xla_backend_optimization_level": 0}).as_text()
    assert {each.kind for each in scaling.collectives(program)} == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("loop", [False, True])
def test_parts_need_less_memory(monkeypatch, one_device, loop):
    """As planned by XLA, so the same each time: a quarter of the batch at a time, in less than half of the memory."""
    monkeypatch.setattr(parts, "is_loop", lambda count, on: loop and count > 1)
    planned = {}
    for count in (1, 4):
        step, inputs = training.build(
            one_device, student="small_cnn_w8", teacher="small_cnn_w8", batch=64, method=CE(), accumulate=count
        )
        planned[count] = step.lower(*inputs).compile().memory_analysis().temp_size_in_bytes
    assert planned[4] < 0.5 * planned[1]


@pytest.mark.slow
def test_a_step_with_one_bad_part_is_skipped_and_its_example_is_named():
    bad = batch_of(1)
    bad["image"][7] = np.nan
    with jax.enable_x64(True):
        before = run(KD(), batches=[batch_of(0)], accumulate=2)
        after = run(KD(), batches=[batch_of(0), bad], accumulate=2)
        assert int(after.skipped) == 1
        jax.tree.map(np.testing.assert_array_equal, (after.params, after.totals), (before.params, before.totals))
        look = functools.partial(finite_rows, student=network(Plain(), 0), method=KD(), accumulate=2)
        rows = jax.jit(look)(after, network(Plain(), 1), bad)
        for part in ("student logits", "CE", "KD"):
            np.testing.assert_array_equal(np.flatnonzero(~np.asarray(rows[part])), [7], err_msg=part)


def without_batch_norm(source):
    """A run's student is `Plain`."""
    model = Plain(source.num_classes, jnp.float32)
    shapes, initialise = (functools.partial(function, model) for function in (models.shapes, models.initialise))
    return Given(student=Architecture("plain", model.apply, shapes, initialise))


@pytest.mark.slow
@pytest.mark.parametrize("on_device", [False, True])
def test_a_run_in_parts_is_the_run_of_whole_batches(tmp_path, one_device, on_device):
    """Mixed images, an average of the weights, several steps in a call; from the host and from the device's memory."""
    found = {}
    for count in (1, 4):
        config = tiny(
            **{
                "method": "ce",
                "diagnose": False,
                "data.mixup": 0.4,
                "data.cutmix": 1.0,
                "steps_per_call": 3,
                "optimizer.learning_rate": 0.01,
                "accumulate": count,
            }
        )
        source = InMemory(config, on_device=on_device)
        folder = tmp_path / str(count)
        given = without_batch_norm(source)
        trained = loop.fit(config, workdir=folder, source=source, mesh=one_device, given=given)
        found[count] = trained.variables, [line for line in lines(folder) if line.pop("kind") == "train"]
    assert_same(found[4][0], found[1][0], 1e-5)  # float32
    for ours, theirs in zip(found[4][1], found[1][1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_a_run_in_parts_that_diverges_names_the_examples(tmp_path, one_device):
    config = tiny(**{"method": "ce", "optimizer.learning_rate": 1e30, "accumulate": 4, "nonfinite_limit": 2})
    source = InMemory(config, on_device=False)
    with pytest.raises(NumericFailure, match="2 steps in a row"):
        loop.fit(config, workdir=tmp_path, source=source, mesh=one_device, given=without_batch_norm(source))


@pytest.mark.wrong_input
def test_a_part_that_the_devices_cannot_share_is_refused():
    config = tiny(accumulate=4)
    mesh = jax.make_mesh((8, 1), ("data", "fsdp"))
    with pytest.raises(
        BadInput,
        match="batch_size=16 .* the number of devices, 8, times config.accumulate=4: try --config.batch_size=32",
    ):
        checks.check_batch(config, mesh)
