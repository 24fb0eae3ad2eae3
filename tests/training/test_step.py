"""The training step: what it computes, that it computes the same on any mesh, and what it leaves alone."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from configs import default
from dgkd_jax import losses, models
from dgkd_jax.evaluate.step import plain_step
from dgkd_jax.methods import DGKD, DKD, KD, METHODS
from dgkd_jax.models.network import Network
from dgkd_jax.runs import sharding
from dgkd_jax.training import state
from dgkd_jax.training.decoupled_momentum import deepkd, dot
from dgkd_jax.training.optimizer import make_optimizer
from dgkd_jax.training.step import finite_rows, metric_names, train_step

MEAN, STD = (0.5,), (0.25,)
CLASSES, BATCH, SHAPE = 5, 16, (16, 16, 1)


def sgd(**overrides):
    section = default.get_config().optimizer
    section.update(overrides)
    return make_optimizer(section, lambda step: 0.1)


# The distillation terms of the steps after START are weighted by 0.75 where each epoch is this many steps: one that no
# test gets to the end of, and of which the whole ones are counted.
START, STEPS_PER_EPOCH, TOTAL_STEPS = 3000, 1000, 100_000
RAMP = {"warmup_epochs": 4.0, "warmup_form": "epoch_from_0"}


def method_of(name, **overrides):
    """A method with ε = 0.5 and β = 2."""
    weighted = DKD(beta=2.0, **RAMP)
    if name == "dgkd":
        return DGKD(dkd=weighted, **{"epsilon": 0.5} | overrides)
    assert not overrides
    return weighted if name == "dkd" else METHODS[name]()


@pytest.fixture(scope="module")
def networks():
    student = models.create("small_cnn_w8", num_classes=CLASSES, dtype=jnp.float64)
    teacher = models.create("small_cnn_w8", num_classes=CLASSES, dtype=jnp.float64)
    return student, teacher


def float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def batch_of(seed: int, size: int = BATCH) -> dict[str, np.ndarray]:
    """Float images: normalised already, so that everything is float64."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(size, *SHAPE)),
        "label": rng.integers(0, CLASSES, size).astype(np.int32),
    }


def run(
    networks,
    method,
    *,
    batches,
    mesh=None,
    ema_decay=0.0,
    optimizer=None,
    teacher_mean=MEAN,
    teacher_std=STD,
    **options,
):
    """The state after one step per batch, and the teacher; call it inside `jax.enable_x64(True)`."""
    student, teacher = networks
    optimizer = optimizer or sgd()
    initial = state.create(
        float64(models.initialise(student, SHAPE, 0)),
        optimizer,
        ema=ema_decay > 0,
        metric_names=metric_names(method),
    ).replace(step=jnp.asarray(START, jnp.int32))
    mesh = mesh or jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    current = jax.device_put(initial, sharding.replicated(mesh))
    teacher_variables = jax.device_put(float64(models.initialise(teacher, SHAPE, 1)), sharding.replicated(mesh))
    taught_by = Network(teacher.apply, teacher_variables, teacher_mean, teacher_std)
    step = jax.jit(
        functools.partial(
            train_step,
            student=Network(student.apply, None, MEAN, STD),
            method=method,
            optimizer=optimizer,
            steps_per_epoch=STEPS_PER_EPOCH,
            total_steps=TOTAL_STEPS,
            ema_decay=ema_decay,
            **options,
        ),
        donate_argnums=0,
    )
    for batch in batches:
        current = step(current, taught_by, jax.device_put(batch, sharding.batch_sharding(mesh)))
    return current, teacher_variables


def logits_of(networks, batch):
    """Train-mode student logits and evaluation-mode teacher logits at the initial weights."""
    student, teacher = networks
    images = batch["image"]
    z, _ = student.apply(float64(models.initialise(student, SHAPE, 0)), images, train=True, mutable=["batch_stats"])
    return z, teacher.apply(float64(models.initialise(teacher, SHAPE, 1)), images), images


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ce", "kd", "dkd", "dgkd", "logit_mse", "dist"])  # every kind of term
def test_loss_of_each_method_is_its_formula(networks, name):
    batch = batch_of(0)
    with jax.enable_x64(True):
        z, v, _ = logits_of(networks, batch)
        y = batch["label"]
        ce = float(np.mean(losses.cross_entropy(z, y)))
        kd = float(np.mean(losses.kd(z, v, temperature=4.0)))
        dkd = float(np.mean(losses.dkd(z, v, y, alpha=1.0, beta=2.0, temperature=4.0)))
        coupling = float(losses.gradient_coupling(z, v, y, temperature=4.0, convention="per_sample"))
        mse = float(np.mean((np.asarray(z) - np.asarray(v)) ** 2))
        expected = {
            "ce": ce,
            "kd": 0.1 * ce + 0.9 * kd,
            "logit_mse": 0.1 * ce + 0.9 * mse,
            "dist": ce + float(losses.dist(z, v, temperature=1.0, beta=2.0, gamma=2.0)),
            "dkd": ce + 0.75 * dkd,
            "dgkd": ce + 0.75 * (dkd - 0.5 * coupling),
        }[name]
        after, _ = run(networks, method_of(name), batches=[batch])
        assert set(after.totals) == set(metric_names(method_of(name)))
        np.testing.assert_allclose(after.totals["loss"][0], expected, rtol=1e-12)
        correct = int((np.argmax(z, -1) == y).sum())
        assert tuple(map(int, after.totals["accuracy"])) == (correct, BATCH)


@pytest.mark.slow
def test_step_descends_the_gradient_of_the_loss(networks):
    """Plain SGD without momentum or decay: the change of the weights is −rate times finite differences of the loss."""
    batch = batch_of(1)
    method = method_of("dgkd")
    with jax.enable_x64(True):
        student, _ = networks
        before = float64(models.initialise(student, SHAPE, 0))
        optimizer = sgd(momentum=0.0, weight_decay=0.0)
        after, _ = run(networks, method, batches=[batch], optimizer=optimizer)
        flat, unravel = ravel_pytree(before["params"])
        _, v, images = logits_of(networks, batch)

        @jax.jit
        def loss(flat_params):
            variables = {"params": unravel(flat_params), "batch_stats": before["batch_stats"]}
            z, _ = student.apply(variables, images, train=True, mutable=["batch_stats"])
            y = batch["label"]
            distillation = losses.dgkd(
                z, v, y, alpha=1.0, beta=2.0, epsilon=0.5, temperature=4.0, convention="per_sample"
            )
            return losses.cross_entropy(z, y).mean() + 0.75 * distillation

        moved = np.asarray(ravel_pytree(after.params)[0] - flat)
        direction = np.random.default_rng(0).normal(size=flat.shape)
        h = 1e-6
        slope = (loss(flat + h * direction) - loss(flat - h * direction)) / (2 * h)
        # Central differences: truncation h² and cancellation 1e-16/h give about 1e-9.
        np.testing.assert_allclose(moved @ direction, -0.1 * slope, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kd", "dgkd"])
def test_one_and_eight_devices_compute_the_same(networks, name):
    with jax.enable_x64(True):
        batches = [batch_of(seed) for seed in range(3)]
        one, _ = run(networks, method_of(name), batches=batches)
        eight, _ = run(networks, method_of(name), batches=batches, mesh=sharding.make_mesh(fsdp=2))
        for a, b in zip(
            jax.tree.leaves((one.params, one.batch_stats)),
            jax.tree.leaves((eight.params, eight.batch_stats)),
            strict=True,
        ):
            # float64 sums in another order
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(one.totals["loss"][0], eight.totals["loss"][0], rtol=1e-10)
        assert tuple(map(int, one.totals["accuracy"])) == tuple(map(int, eight.totals["accuracy"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "names"),
    [
        (KD(), ("task", "kd")),
        (method_of("dkd"), ("task", "tckd", "nckd")),
        (method_of("dgkd"), ("task", "kd")),
        (method_of("dgkd", wrt="params"), ("task", "kd")),
    ],
)
def test_named_gradients_with_equal_momenta_train_as_the_whole_gradient(networks, method, names):
    """Also BatchNorm's statistics and the metrics, among them the norm of the gradient; DeepKD's on eight devices."""
    momenta = {f"momentum_{name}": 0.9 for name in names}
    optimizer = (dot if len(names) == 2 else deepkd)(0.1, weight_decay=5e-4, **momenta)
    mesh = None if len(names) == 2 else sharding.make_mesh(fsdp=2)
    batches = [batch_of(seed) for seed in range(2)]
    with jax.enable_x64(True):
        expected, _ = run(networks, method, batches=batches)
        found, _ = run(networks, method, batches=batches, optimizer=optimizer, gradient_names=names, mesh=mesh)
        for part in ("params", "batch_stats", "totals"):
            jax.tree.map(
                # float64 sums in another order
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12),
                getattr(found, part),
                getattr(expected, part),
            )


@pytest.mark.slow
def test_a_step_of_named_gradients_that_are_not_finite_is_skipped(networks):
    optimizer = dot(0.1, momentum_task=0.8, momentum_kd=0.9, weight_decay=5e-4)
    bad = batch_of(1)
    bad["image"][3] = np.nan
    with jax.enable_x64(True):
        before, _ = run(networks, KD(), batches=[batch_of(0)], optimizer=optimizer, gradient_names=("task", "kd"))
        after, _ = run(networks, KD(), batches=[batch_of(0), bad], optimizer=optimizer, gradient_names=("task", "kd"))
        assert int(after.skipped) == 1
        for part in ("params", "batch_stats", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))


@pytest.mark.slow
def test_a_step_with_a_label_that_no_class_has_is_skipped_and_its_example_is_named(networks):
    bad = batch_of(1)
    bad["label"][3] = CLASSES
    with jax.enable_x64(True):
        before, teacher = run(networks, DKD(), batches=[batch_of(0)])
        after, _ = run(networks, DKD(), batches=[batch_of(0), bad])
        rows = jax.jit(
            functools.partial(finite_rows, student=Network(networks[0].apply, None, MEAN, STD), method=DKD())
        )(after, Network(networks[1].apply, teacher, MEAN, STD), bad)
    assert int(after.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    for part in ("CE", "TCKD", "NCKD"):
        np.testing.assert_array_equal(np.flatnonzero(~rows[part]), [3], err_msg=part)
    assert rows["student logits"].all()


def test_teacher_is_untouched_and_not_donated(networks):
    with jax.enable_x64(True):
        before = float64(models.initialise(networks[1], SHAPE, 1))
        _, after = run(networks, method_of("dgkd"), batches=[batch_of(0), batch_of(1)])
        jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
def test_teacher_runs_in_evaluation_mode(networks):
    """A batch's other samples do not change what the teacher says of one: logit_msd of a sample alone is its own."""
    with jax.enable_x64(True):
        batch = batch_of(3)
        z, v, images = logits_of(networks, batch)
        alone = networks[1].apply(float64(models.initialise(networks[1], SHAPE, 1)), images[:1])
        np.testing.assert_allclose(v[:1], alone, rtol=1e-12)
        after, _ = run(networks, method_of("kd"), batches=[batch])
        expected = np.mean(np.sum((np.asarray(z) - np.asarray(v)) ** 2, -1))
        np.testing.assert_allclose(after.totals["logit_msd"][0], expected, rtol=1e-12)


@pytest.mark.slow
def test_teacher_sees_pixels_normalised_as_its_own(networks):
    student, teacher = networks
    images = np.random.default_rng(4).integers(0, 256, (BATCH, *SHAPE), np.uint8)
    own = {"teacher_mean": (127 / 255,), "teacher_std": (128 / 255,)}
    with jax.enable_x64(True):
        batch = batch_of(4) | {"image": images}
        after, _ = run(networks, method_of("kd"), batches=[batch], **own)
        z, _ = student.apply(
            float64(models.initialise(student, SHAPE, 0)),
            (images / 255 - MEAN[0]) / STD[0],
            train=True,
            mutable=["batch_stats"],
        )
        v = teacher.apply(float64(models.initialise(teacher, SHAPE, 1)), (images - 127.0) / 128)
        expected = np.mean(np.sum((np.asarray(z) - np.asarray(v)) ** 2, -1))
        # The images are normalised in float32.
        np.testing.assert_allclose(after.totals["logit_msd"][0], expected, rtol=1e-5)


@pytest.mark.slow
def test_average_of_the_variables_follows_its_recursion(networks):
    with jax.enable_x64(True):
        batches = [batch_of(seed) for seed in range(3)]
        expected = float64(models.initialise(networks[0], SHAPE, 0))
        for count in (1, 2, 3):
            current, _ = run(networks, method_of("ce"), batches=batches[:count], ema_decay=0.9)
            expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, expected, current.variables)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), expected, current.ema)
        assert current.evaluated is current.ema


@pytest.mark.slow
@pytest.mark.parametrize("convention", ["per_sample", "literal", "self_normalized"])
def test_coupling_with_respect_to_parameters_is_that_of_the_parameter_gradients(networks, convention):
    """Against the Jacobian of the logits, multiplied out."""
    batch = batch_of(4)
    with jax.enable_x64(True):
        student, _ = networks
        before = float64(models.initialise(student, SHAPE, 0))
        flat, unravel = ravel_pytree(before["params"])
        z, v, images = logits_of(networks, batch)

        def logits(flat_params):
            variables = {"params": unravel(flat_params), "batch_stats": before["batch_stats"]}
            return student.apply(variables, images, train=True, mutable=["batch_stats"])[0]

        jacobian = np.asarray(jax.jit(jax.jacrev(logits))(flat)).reshape(BATCH * CLASSES, -1)
        y = batch["label"]
        difference = losses.tckd_gradient(z, v, y, temperature=4.0) - losses.nckd_gradient(z, v, y, temperature=4.0)
        squared = np.sum((np.asarray(difference).ravel() / BATCH @ jacobian) ** 2)
        expected = {
            "per_sample": squared,
            "literal": squared / flat.size,
            "self_normalized": squared / (squared + 0.01),
        }[convention]
        method = method_of("dgkd", wrt="params", convention=convention, kappa=0.01)
        after, _ = run(networks, method, batches=[batch])
        np.testing.assert_allclose(after.totals["coupling"][0], expected, rtol=1e-10)


def test_average_and_plain_variables_share_no_buffer(networks):
    """Both are donated; one buffer under two names would be freed twice."""
    with jax.enable_x64(True):
        method = method_of("ce")
        created = state.create(
            float64(models.initialise(networks[0], SHAPE, 0)), sgd(), ema=True, metric_names=metric_names(method)
        )
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((created.params, created.ema["params"]))]
        assert len(set(pointers)) == len(pointers)


@pytest.mark.slow
def test_evaluation_step_counts_only_the_rows_of_the_mask():
    logits = np.random.default_rng(0).normal(size=(8, CLASSES)).astype(np.float32)
    batch = {
        "image": jnp.zeros((8, *SHAPE), jnp.uint8),
        "label": jnp.asarray(logits.argmax(-1), jnp.int32).at[0].add(1) % CLASSES,
        "mask": jnp.arange(8) < 5,
    }
    found = plain_step(Network(lambda variables, images: jnp.asarray(logits), {}, MEAN, STD), batch).means
    assert tuple(map(int, found["accuracy"])) == (4, 5)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nll = -np.log(probabilities[np.arange(8), batch["label"]])[:5].sum()
    np.testing.assert_allclose(found["ce"][0], nll, rtol=1e-6)


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.slow
@pytest.mark.parametrize("trajectory", ["dkd", "dgkd_literal", "dgkd_normalized"])
def test_training_follows_the_pytorch_repository_step_by_step(trajectory):
    """Twelve SGD steps of ResNet-8 taught by ResNet-14, float64, against losses and parameters from PyTorch."""
    from dgkd_jax import torch_port
    from dgkd_jax.parity import golden_weights

    golden = dict(np.load(GOLDEN / "trajectories" / f"resnet14_resnet8_{trajectory}.npz"))
    number = {name: float(value) for name, value in golden.items() if value.ndim == 0 and name != "method"}
    count, size = int(golden["steps"]), int(golden["batch"])
    images = np.random.Generator(np.random.Philox(key=int(golden["images_seed"]))).standard_normal(
        (count, size, 3, 32, 32)
    )
    images = images.astype(np.float32).transpose(0, 1, 3, 4, 2).astype(np.float64)
    weights = {name: number[name] for name in ("alpha", "beta", "temperature")}
    dkd = DKD(warmup_epochs=number["warmup_steps"], **weights)  # an epoch is a step here
    _, _, convention = trajectory.partition("_")
    method = DGKD(dkd=dkd, epsilon=number["epsilon"], convention=convention) if convention else dkd
    with jax.enable_x64(True):
        networks = {}
        for role, name in (("student", "resnet8"), ("teacher", "resnet14")):
            model = models.create(name, num_classes=10, dtype=jnp.float64)
            shapes = torch_port.to_torch(models.initialise(model, (32, 32, 3), 0), model, name)
            seed = int(golden[f"{role}_seed"])
            weights = {entry: golden_weights.weight(entry, w.shape, seed) for entry, w in shapes.items()}
            networks[role] = model, float64(torch_port.from_torch(weights, model, name))
        optimizer = make_optimizer(
            ConfigDict(
                {
                    "name": "sgd",
                    "momentum": number["momentum"],
                    "nesterov": False,
                    "weight_decay": number["weight_decay"],
                    "decay_on": "all",
                    "clip_norm": 0.0,
                }
            ),
            lambda step: number["lr"],
        )
        model, variables = networks["student"]
        current = state.create(variables, optimizer, ema=False, metric_names=metric_names(method))
        student = Network(model.apply, None, MEAN, STD)
        teacher = Network(networks["teacher"][0].apply, networks["teacher"][1], MEAN, STD)

        def every_loss(current, batch):
            return train_step(
                current,
                teacher,
                batch,
                student=student,
                method=method,
                optimizer=optimizer,
                steps_per_epoch=1,
                total_steps=count,
            )

        step = jax.jit(every_loss)
        found, terms = [], []
        for index in range(count):
            batch = {"image": jnp.asarray(images[index]), "label": jnp.asarray(golden["labels"][index], jnp.int32)}
            following = step(current, batch)
            found.append(float(following.totals["loss"][0] - current.totals["loss"][0]))
            change = jax.tree.map(lambda after, before: float(after - before), following.totals, current.totals)
            terms.append([change[name][0] / change[name][1] for name in ("tckd", "nckd", "grad_similarity")])
            current = following
        entries = torch_port.to_torch(jax.tree.map(np.asarray, current.variables), model, "resnet8")
        np.testing.assert_allclose(found, golden["loss"], rtol=1e-8)  # float64 through twelve chaotic steps
        np.testing.assert_allclose(terms, golden["tckd_nckd_similarity"], rtol=1e-8, atol=1e-9)
        for name in (key for key in golden if key.startswith("param/")):
            expected = golden[name]  # stored as float32: half a unit in the last place is 6e-8 relative
            np.testing.assert_allclose(entries[name.removeprefix("param/")], expected, rtol=1e-7, atol=1e-9)
        learned = [w for name, w in entries.items() if "running" not in name and "num_batches" not in name]
        norm = np.sqrt(sum(float((w.astype(np.float64) ** 2).sum()) for w in learned))
        np.testing.assert_allclose(norm, number["final_params_l2"], rtol=1e-8)
