"""Cached logits are the teacher's, of the same batches; a cache that is not is refused; the step runs no teacher."""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cached_logits import (
    BATCH,
    CLASSES,
    EPOCH,
    live_logits,
    make,
    open_cache,
    plain_top_k,
    rounding,
    taught_by,
    tiny,
    use_small_blocks,
)
from etils import epath
from in_memory import InMemory
from in_memory import tiny as tiny_in_memory

from dgkd_jax.data import on_device
from dgkd_jax.errors import BadInput
from dgkd_jax.runs import sharding
from dgkd_jax.runs.student import read
from dgkd_jax.training import loop
from dgkd_jax.training import run as running
from dgkd_jax.training.build import build
from dgkd_jax.training.cached_logits import source as cached_logits
from dgkd_jax.training.cached_logits.teacher import CachedTeacher
from dgkd_jax.training.run import run

OPEN_SOURCE = running.open_source


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    use_small_blocks(monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"teacher.mean": (0.9,), "teacher.std": (0.1,), "seed": 3}])
def test_cached_logits_are_the_teachers_of_the_same_batches_to_float16(tmp_path, changes):
    config = tiny(**changes)
    made = make(tmp_path / "c", config)
    assert (made.epochs, made.written) == (2, 4)
    cache, source, _ = open_cache(tmp_path / "c", config)
    batches, live = live_logits(config)
    found = list(
        cached_logits.WithTeacher(source, cache).train_batches(seed=config.seed, batch_size=BATCH, start_step=0)
    )
    assert len(found) == 2 * EPOCH
    for batch, expected, logits in zip(found, batches, live, strict=True):
        assert batch["teacher_logits"].dtype == np.float16
        assert (np.abs(batch["teacher_logits"] - logits) <= rounding(logits)).all()
        np.testing.assert_array_equal(batch["image"], expected["image"])
        np.testing.assert_array_equal(batch["label"], expected["label"])
    for epoch in (0, 1):
        assert (
            cache.epoch(epoch)[0].tobytes()
            == np.stack([batch["teacher_logits"] for batch in found[epoch * EPOCH : (epoch + 1) * EPOCH]]).tobytes()
        )


@pytest.mark.parametrize("start", [0, 1, 3, 4, 6, 8])
def test_batches_begin_at_any_step(tmp_path, start):
    make(tmp_path / "c")
    cache, source, _ = open_cache(tmp_path / "c")
    whole = np.concatenate([cache.epoch(0)[0], cache.epoch(1)[0]])
    arguments = {"seed": 0, "batch_size": BATCH, "start_step": start}
    found = [batch["teacher_logits"] for batch in cached_logits.WithTeacher(source, cache).train_batches(**arguments)]
    np.testing.assert_array_equal(np.array(found).reshape(-1, BATCH, CLASSES), whole[start:])


def test_each_process_gets_its_rows(tmp_path):
    make(tmp_path / "c")
    cache, source, _ = open_cache(tmp_path / "c")
    with_teacher = cached_logits.WithTeacher(source, cache)
    shares = [
        list(with_teacher.train_batches(seed=0, batch_size=BATCH, start_step=2, process_index=p, process_count=4))
        for p in range(4)
    ]
    for step, parts in enumerate(zip(*shares, strict=True), 2):
        rows = np.concatenate([part["teacher_logits"] for part in parts])
        np.testing.assert_array_equal(rows, cache.epoch(step // EPOCH)[0][step % EPOCH])


# ------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------


def fit(config, workdir, mesh, cache=None):
    source, _, taught = taught_by(config)
    variables = sharding.place(jax.tree.map(np.asarray, taught.network.variables), mesh)
    teacher = taught.network.with_variables(variables)
    if cache:
        source, teacher = cached_logits.WithTeacher(source, cache), CachedTeacher(teacher, cache.about.description)
    return loop.fit(config, workdir=epath.Path(workdir), source=source, mesh=mesh, teacher=teacher)


def training_lines(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


@pytest.fixture
def exact_teacher(monkeypatch):
    """Every teacher's logits are rounded to sixteenths, which float16 holds exactly."""
    teach = running.teach

    def taught_in_sixteenths(*arguments):
        taught = teach(*arguments)
        apply = taught.network.apply
        return taught._replace(
            network=taught.network.replace(apply=lambda v, x, **more: jnp.round(16 * apply(v, x, **more)) / 16)
        )

    monkeypatch.setattr(running, "teach", taught_in_sixteenths)


@pytest.mark.slow
def test_where_float16_holds_the_logits_training_is_the_same(tmp_path, one_device, exact_teacher):
    config = tiny(method="dgkd")
    make(tmp_path / "c", config)
    live = fit(config, tmp_path / "live", one_device)
    cached = fit(config, tmp_path / "cached", one_device, open_cache(tmp_path / "c", config)[0])
    for a, b in zip(jax.tree.leaves(live.variables), jax.tree.leaves(cached.variables), strict=True):
        # Two programs, with and without a teacher: float32's sums in another order over eight steps.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(training_lines(tmp_path / "live"), training_lines(tmp_path / "cached"), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


@pytest.mark.slow
def test_the_loss_from_the_cache_differs_by_what_rounding_the_teacher_makes(tmp_path):
    """T²·KL(q ‖ p) changes with the teacher's v_j by T·q_j·(log(q_j/p_j) − KL), and v_j by at most `rounding`."""
    config = tiny(method="kd")
    make(tmp_path / "c", config)
    cache, source, teacher = open_cache(tmp_path / "c", config)
    built, first = build(config, source, sharding.make_mesh(), teacher)
    (batch, *_), (v, *_) = live_logits(config, count=1)
    brought = batch | {"teacher_logits": cache.epoch(0)[0][0]}
    # Copies, since the step's own is donated.
    live, cached = (
        float(built.train_step(jax.tree.map(jnp.copy, first), each, given).totals["kd"][0])
        for each, given in ((teacher, batch), (CachedTeacher(teacher, cache.about.description), brought))
    )
    student = built.student.with_variables(first.variables)
    z, _ = student(jnp.asarray(batch["image"]), train=True, mutable=["batch_stats"])
    z, v, t = np.asarray(z, np.float64), np.asarray(v, np.float64), config.kd.temperature
    q, p = (np.exp(x / t) / np.exp(x / t).sum(1, keepdims=True) for x in (v, z))
    kl = (q * np.log(q / p)).sum(1, keepdims=True)
    bound = (t * q * np.abs(np.log(q / p) - kl) * rounding(v)).sum(1).mean()
    np.testing.assert_allclose(live, t**2 * kl.mean(), rtol=1e-5)
    assert 0 < abs(live - cached) <= 1.1 * bound + 1e-6 * live  # 1.1: the second order
    assert bound < 1e-3 * live


@pytest.mark.slow
def test_the_compiled_step_holds_no_teacher(tmp_path):
    config = tiny(**{"teacher.model": "small_cnn_w24"})
    make(tmp_path / "c", config)
    cache, source, teacher = open_cache(tmp_path / "c", config)
    mesh = sharding.make_mesh()
    built, current = build(config, source, mesh, teacher)

    def compiled(asked, batches):
        batch = sharding.to_global(next(batches.train_batches(seed=0, batch_size=BATCH, start_step=0)), mesh)
        return built.train_step.lower(current, asked, batch).compile()

    live = compiled(teacher, source)
    cached = compiled(CachedTeacher(teacher, "cached"), cached_logits.WithTeacher(source, cache))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(teacher.variables))
    arguments = [each.memory_analysis().argument_size_in_bytes for each in (live, cached)]
    more = BATCH // mesh.size * CLASSES * 2  # the logits
    assert arguments[0] - arguments[1] == pytest.approx(weights - more, abs=64 * 100)  # each array is padded to 64 B
    alone = jax.jit(teacher.apply).lower(teacher.variables, jnp.zeros((BATCH // mesh.size, 16, 16, 1))).compile()
    saved = live.cost_analysis()["flops"] - cached.cost_analysis()["flops"]
    assert saved == pytest.approx(alone.cost_analysis()["flops"], rel=0.02)


def test_rows_of_the_cache_that_are_not_finite_are_found(tmp_path):
    config = tiny(method="dgkd")
    source, mesh, taught = taught_by(config)
    teacher = CachedTeacher(taught.network, "cached")
    built, current = build(config, source, mesh, teacher)
    batch = next(source.train_batches(seed=0, batch_size=BATCH, start_step=0))
    logits = np.ones((BATCH, CLASSES), np.float16)
    logits[5, 2] = np.nan
    finite = built.finite_rows(current, teacher, sharding.to_global(batch | {"teacher_logits": logits}, mesh))
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(finite["teacher logits"])), [5])


@pytest.mark.slow
def test_a_run_does_not_change_over_to_a_cache_but_the_cache_may_move(tmp_path, capsys):
    config = tiny()
    run(config, str(tmp_path / "live"))
    make(tmp_path / "c")
    config.teacher.cache = str(tmp_path / "c")
    with pytest.raises(BadInput, match=r"another teacher \(weights (\w+), now \1, cached in float16\)"):
        run(config, str(tmp_path / "live"))
    (result,) = run(config, str(tmp_path / "cached"))
    assert "teacher's logits in training: cached in float16" in capsys.readouterr().err
    # As without a cache, so that `evaluate` finds the teacher.
    assert read(tmp_path / "cached").taught_by == result["teacher"]["fingerprint"]
    shutil.move(tmp_path / "c", tmp_path / "d")
    config.teacher.cache = str(tmp_path / "d")
    run(config, str(tmp_path / "cached"))
    config.teacher.cache = ""
    with pytest.raises(BadInput, match=r"another teacher \(weights (\w+), cached in float16, now \1\)"):
        run(config, str(tmp_path / "cached"))


# ------------------------------------------------------------------------------------------------------------
# Mistakes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "config.seed=0 there, 1 here"),
        ({"batch_size": 8}, r"config.batch_size=16 there, 8 here, steps_per_epoch 4 there, 8 here"),
        ({"data.mock_train_examples": 80}, "config.data.mock_train_examples=70 there, 80 here"),
        ({"data.augment": "none"}, "config.data.augment='pad_crop' there, 'none' here"),
        ({"teacher.seed": 9}, r"weights of the teacher \w{8} there, \w{8} here"),
        ({"teacher.model": "small_cnn_w4"}, "config.teacher.model='small_cnn_w8' there, 'small_cnn_w4' here"),
        ({"teacher.mean": (0.5,), "teacher.std": (0.5,)}, r"config.teacher.mean=\[\] there, \[0.5\] here"),
        ({"epochs": 3}, "holds less than config.epochs=3: .* --epochs=3, with its other arguments"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(tmp_path, changes, message):
    make(tmp_path / "c")
    with pytest.raises(BadInput, match=f"config.teacher.cache={tmp_path / 'c'} .*{message}") as refused:
        open_cache(tmp_path / "c", tiny(**changes))
    assert "python -m dgkd_jax.cache_teacher" in str(refused.value)
    if "epochs" not in changes:
        with pytest.raises(BadInput, match=f"holds other logits of a teacher .*{message}.*Give another --output"):
            make(tmp_path / "c", tiny(**changes))


def test_what_does_not_matter_to_the_batches_does_not_matter(tmp_path):
    make(tmp_path / "c")
    open_cache(
        tmp_path / "c", tiny(**{"method": "dgkd", "optimizer.learning_rate": 0.3, "student.model": "small_cnn_w8"})
    )


def test_no_cache_is_said_before_anything_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "open_source", lambda *_: pytest.fail("the data were opened"))
    with pytest.raises(
        BadInput, match=r"config.teacher.cache=nowhere: no cache .* Make one with python -m dgkd_jax.cache"
    ):
        run(tiny(**{"teacher.cache": "nowhere"}))


def test_data_that_changed_since_are_an_error(tmp_path):
    """The keys are the same, the images are not: what a changed folder or another TensorFlow would do."""
    make(tmp_path / "c")
    cache, source, _ = open_cache(tmp_path / "c")
    moved = dataclasses.replace(source, num_classes=9)  # draws other labels
    batches = cached_logits.WithTeacher(moved, cache).train_batches(seed=0, batch_size=BATCH, start_step=2)
    with pytest.raises(BadInput, match="row 2 of step 3 is not the image that the teacher saw"):
        next(batches)


def in_memory(monkeypatch, *, changed=False):
    """A configuration whose images can lie on the device, and its data set where it is opened from now on."""
    config = tiny_in_memory(**{"teacher.weights": "nowhere.npz", "epochs": 2, "diagnose": False})
    monkeypatch.setattr(running, "open_source", OPEN_SOURCE)
    source = InMemory(config, on_device=True)
    if changed:
        source.train_set()["image"][:] ^= 1
    monkeypatch.setattr(running, "open_source", lambda data: source)
    return config


@pytest.mark.slow
def test_on_the_device_the_batches_bring_the_same_logits(tmp_path, monkeypatch):
    config = in_memory(monkeypatch)
    make(tmp_path / "c", config)
    cache, source, _ = open_cache(tmp_path / "c", config)
    taught = cached_logits.WithTeacher(source, cache)
    examples = {name: jnp.asarray(values) for name, values in taught.train_set().items()}
    arguments = {"seed": config.seed, "batch_size": BATCH}
    for step, streamed in enumerate(taught.train_batches(start_step=0, **arguments)):
        epoch = taught.epoch_rows(epoch=step // EPOCH, **arguments)
        found = on_device.batch(examples, {name: values[step % EPOCH] for name, values in epoch.items()})
        assert found.keys() == streamed.keys() == {"image", "label", "teacher_logits"}
        for name, expected in streamed.items():
            assert found[name].dtype == expected.dtype
            np.testing.assert_array_equal(found[name], expected)
    assert step == 2 * EPOCH - 1


def test_on_the_device_too_data_that_changed_since_are_an_error(tmp_path, monkeypatch):
    make(tmp_path / "c", in_memory(monkeypatch))
    config = in_memory(monkeypatch, changed=True)
    config.teacher.cache = str(tmp_path / "c")
    with pytest.raises(BadInput, match="row 0 of step 1 of epoch 1 is not the image that the teacher saw"):
        run(config, str(tmp_path / "run"))


def test_every_row_is_compared_in_its_turn(tmp_path):
    """A change of one row only is found when the turn comes to it."""
    make(tmp_path / "c")
    cache, source, _ = open_cache(tmp_path / "c")

    class Changed:
        def train_batches(self, *, start_step, **arguments):
            for batch in source.train_batches(start_step=start_step, **arguments):
                batch["image"][5, 0, 0, 0] ^= 1
                yield batch

    batches = cached_logits.WithTeacher(Changed(), cache).train_batches(seed=0, batch_size=BATCH, start_step=0)
    assert len(list(itertools.islice(batches, 5))) == 5
    with pytest.raises(BadInput, match="row 5 of step 6"):
        next(batches)


def test_a_top_k_cache_is_the_formula_of_the_live_logits(tmp_path):
    config = tiny()
    make(tmp_path / "c", config, top_k=3)
    cache, source, _ = open_cache(tmp_path / "c", config)
    batches, live = live_logits(config)
    arguments = {"seed": 0, "batch_size": BATCH, "start_step": 0}
    for batch, expected, v in zip(
        cached_logits.WithTeacher(source, cache).train_batches(**arguments), batches, live, strict=True
    ):
        dense = np.array([plain_top_k(row, y, 3, 4.0) for row, y in zip(v, expected["label"], strict=True)])
        assert (np.abs(batch["teacher_logits"] - dense) <= rounding(dense)).all()


def test_a_top_k_cache_serves_one_temperature_and_no_squared_error(tmp_path):
    make(tmp_path / "c", top_k=3)
    with pytest.raises(BadInput, match=r"config.dkd.temperature=2, and .* right at 4 only"):
        run(tiny(**{"teacher.cache": str(tmp_path / "c"), "dkd.temperature": 2.0}))
    with pytest.raises(BadInput, match=r"config.method=logit_mse needs every logit, .* top 3 of 10: make"):
        run(tiny(**{"teacher.cache": str(tmp_path / "c"), "method": "all"}))
    with pytest.raises(BadInput, match="holds other logits of a teacher .top_k 3 there, 0 here"):
        make(tmp_path / "c")
