"""Runs with augmentation on the device: teacher and student see the same, live or cached, streamed or resident."""

from types import SimpleNamespace

import cached_logits as caches
import jax
import numpy as np
import pytest
from etils import epath
from in_memory import InMemory
from in_memory import tiny as tiny_in_memory
from small_runs import Asked, a_teacher, assert_bit_equal, lines

from dgkd_jax.data import device_augment
from dgkd_jax.data.open import open_source
from dgkd_jax.errors import BadInput, NumericFailure, Preempted
from dgkd_jax.models.network import normalize
from dgkd_jax.runs import sharding
from dgkd_jax.training import build as building
from dgkd_jax.training import loop, nonfinite
from dgkd_jax.training.cached_logits import source as cached_logits
from dgkd_jax.training.cached_logits.teacher import CachedTeacher
from dgkd_jax.training.given import Given

ALL = {"data.trivial_augment": True, "data.random_erasing": 0.5, "data.mixup": 0.4, "data.cutmix": 1.0}
# What compiles quickly; tests/data/test_device_augment.py has the rest.
QUICK = ALL | {"data.trivial_augment": False}


def tiny(**changes):
    return tiny_in_memory(**{"method": "ce", "epochs": 2, "log_every": 4, "diagnose": False} | QUICK | changes)


def fit(config, workdir, mesh, *, on_device=False, **more):
    source = InMemory(config, on_device=on_device)
    return loop.fit(config, workdir=workdir, source=source, mesh=mesh, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("whole")
    return fit(tiny(), workdir, one_device), workdir


@pytest.mark.slow
@pytest.mark.parametrize("question", [1, 2])
def test_a_run_that_is_stopped_goes_on_bit_equal(tmp_path, one_device, whole, question):
    with pytest.raises(Preempted):
        fit(tiny(), tmp_path, one_device, stop=Asked(question))
    found = fit(tiny(), tmp_path, one_device)
    assert_bit_equal(found.variables, whole[0].variables)
    assert lines(tmp_path) == lines(whole[1])


@pytest.mark.slow
def test_from_the_devices_memory_it_follows_the_streamed_run(tmp_path, one_device, whole):
    found = fit(tiny(), tmp_path, one_device, on_device=True)
    for a, b in zip(jax.tree.leaves(found.variables), jax.tree.leaves(whole[0].variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)  # sums in another order, as in test_feed


@pytest.mark.slow
def test_eight_devices_follow_one(tmp_path, whole):
    found = fit(tiny(), tmp_path, sharding.make_mesh())
    for a, b in zip(jax.tree.leaves(found.variables), jax.tree.leaves(whole[0].variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_the_teacher_sees_the_pixels_that_the_student_sees_and_not_those_of_the_set(one_device):
    config, seen = tiny(method="kd"), {"teacher": [], "student": []}
    source = InMemory(config, on_device=False)
    teacher, student = a_teacher(source, one_device), Given().student_of(config, source)

    def watched(who, network):
        def apply(variables, images, **options):
            jax.debug.callback(lambda images: seen[who].append(np.asarray(images)), images)
            return network.apply(variables, images, **options)

        return apply

    teacher = teacher.replace(apply=watched("teacher", teacher))
    given = Given(student=student._replace(apply=watched("student", student)))
    program, current = building.build(config, source, one_device, teacher, given=given)
    batches = source.train_batches(seed=config.seed, batch_size=config.batch_size, start_step=0)
    augment = device_augment.from_config(config.data, source, seed=config.seed)
    for step in range(2):
        batch = next(batches)
        current = program.train_step(current, teacher, batch)
        jax.effects_barrier()
        np.testing.assert_array_equal(seen["teacher"][step], seen["student"][step])
        expected = normalize(jax.jit(augment)(batch, step)["image"], mean=source.mean, std=source.std)
        np.testing.assert_allclose(seen["student"][step], expected, rtol=1e-6, atol=1e-6)
        assert (np.abs(expected - normalize(batch["image"], mean=source.mean, std=source.std)) > 0.1).mean() > 0.02


# ------------------------------------------------------------------------------------------------------------
# The teacher's logits from a cache
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch, tmp_path):
    caches.use_small_blocks(monkeypatch, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_a_cache_holds_the_logits_of_the_mixed_images_and_training_from_it_is_training_live(tmp_path, one_device):
    config = caches.tiny(method="kd", **QUICK)
    caches.make(tmp_path / "c", config)
    cache, source, teacher = caches.open_cache(tmp_path / "c", config)
    augment = jax.jit(device_augment.from_config(config.data, source, seed=config.seed))
    batches, plain = caches.live_logits(config)
    stored = np.concatenate([cache.epoch(0)[0], cache.epoch(1)[0]])
    for step, batch in enumerate(batches):
        live = np.asarray(teacher.logits(augment(batch, step)))
        assert (np.abs(stored[step] - live) <= caches.rounding(live)).all()
    assert np.abs(stored - np.stack(plain)).max() > 0.02  # rounding is below 0.001 here

    variables = sharding.place(jax.tree.map(np.asarray, teacher.variables), one_device)
    of = {
        "live": (source, teacher.with_variables(variables)),
        "cached": (
            cached_logits.WithTeacher(source, cache),
            CachedTeacher(teacher.with_variables(variables), cache.about.description),
        ),
    }
    live, cached = (
        loop.fit(config, workdir=epath.Path(tmp_path / name), source=batches, mesh=one_device, teacher=taught)
        for name, (batches, taught) in of.items()
    )
    for a, b in zip(jax.tree.leaves(live.variables), jax.tree.leaves(cached.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-3)  # the teacher in float16, over eight steps at rate 0.1


@pytest.mark.wrong_input
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("key", ALL)
def test_a_cache_of_other_augmentation_is_refused(tmp_path, key):
    caches.make(tmp_path / "c", caches.tiny(), epochs=1)
    with pytest.raises(BadInput, match=f"does not fit this run: config.{key}=.* there, .* here. Make one with"):
        caches.open_cache(tmp_path / "c", caches.tiny(**{key: ALL[key]}))


@pytest.mark.wrong_input
@pytest.mark.usefixtures("small_blocks")
def test_the_top_classes_of_mixed_images_are_not_stored(tmp_path):
    with pytest.raises(BadInput, match="--top-k=3 stores one label's logit of each image, and config.data.mixup"):
        caches.make(tmp_path / "c", caches.tiny(**{"data.mixup": 0.2}), top_k=3)
    assert not (tmp_path / "c").exists()


def test_the_batch_of_a_bad_step_is_looked_at_as_it_was_in_that_step(one_device):
    """It is found three steps later."""
    config = tiny(nonfinite_limit=3)
    source = open_source(config.data)
    current = SimpleNamespace(step=np.int32(7), skipped_in_a_row=np.int32(3))
    current.replace = lambda step: SimpleNamespace(step=step)
    looked_at = []

    def finite_rows(state, teacher, batch):
        looked_at.append((int(state.step), np.asarray(batch["label"])))
        return {}

    with pytest.raises(NumericFailure, match="from step 5 on"):
        nonfinite.check(config, SimpleNamespace(finite_rows=finite_rows, teacher=None), current, source, one_device)
    ((step, labels),) = looked_at
    assert step == 4
    batch = next(source.train_batches(seed=config.seed, batch_size=config.batch_size, start_step=4))
    np.testing.assert_array_equal(labels, batch["label"])
