"""Cached logits are the teacher's, of the same batches; a cache that is not is refused; the step runs no teacher."""

import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_feed
from etils import epath

from configs import mnist5k
from dgkd_jax import (
    cache_teacher,
    export,
    job,
    logit_files,
    losses,
    program,
    sharding,
    steps,
    teacher_cache,
    top_classes,
    train,
)
from dgkd_jax import config as rules
from dgkd_jax.data import resident
from dgkd_jax.errors import BadInput, NumericFailure, Preempted, StorageFailure

OPEN_SOURCE = job.data_lib.open_source
EPOCH, BATCH, CLASSES = 4, 16, 10  # steps, rows, classes of `tiny`


def tiny(**changes):
    """Two epochs of four steps on generated images; the teacher has random weights."""
    config = mnist5k.get_config()
    config.update_from_flattened_dict(
        {
            "method": "dkd",
            "student.model": "small_cnn_w4",
            "teacher.model": "small_cnn_w8",
            "teacher.weights": "nowhere.npz",
            "data.mock": True,
            "data.image_size": 16,
            "data.mock_train_examples": 70,  # 4 batches and a rest
            "data.mock_eval_examples": 16,
            "batch_size": BATCH,
            "eval_batch_size": 8,
            "epochs": 2,
            "log_every": 1,
            "diagnose": False,
        }
        | changes
    )
    rules.validate(config)
    return config


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    """Three steps a block, so that an epoch has a whole and a shorter one; runs/ is under tmp_path."""
    monkeypatch.setattr(logit_files, "_BLOCK_STEPS", 3)
    monkeypatch.chdir(tmp_path)


def make(folder, config=None, **options):
    return cache_teacher.make(config or tiny(), str(folder), **options)


def taught_by(config) -> tuple:
    return job.prepare(config, ("dkd",), stop=lambda: False)


def open_cache(folder, config=None):
    config = config or tiny()
    source, _, taught = taught_by(config)
    cache = teacher_cache.Cache(epath.Path(folder), config, teacher=taught.teacher.fingerprint, source=source)
    return cache, source, taught.teacher


def live_logits(config, *, first=0, count=2 * EPOCH) -> tuple[list[dict], list[np.ndarray]]:
    """The batches of a run, and what its teacher says of them one by one."""
    source, _, taught = taught_by(config)
    batches = list(
        itertools.islice(source.train_batches(seed=config.seed, batch_size=config.batch_size, start_step=first), count)
    )
    teacher = taught.teacher
    images = [steps.normalize(batch["image"], mean=teacher.mean, std=teacher.std) for batch in batches]
    return batches, [np.asarray(teacher.apply(teacher.variables, image)) for image in images]


def rounding(logits: np.ndarray) -> np.ndarray:
    """Half a unit in the last place of float16, 2⁻¹¹ of a number or 2⁻²⁵, and float32's sums in another order."""
    return np.abs(logits) * (2.0**-11 + 1e-5) + 2.0**-25 + 1e-6


@pytest.mark.parametrize("changes", [{}, {"teacher.mean": (0.9,), "teacher.std": (0.1,), "seed": 3}])
def test_cached_logits_are_the_teachers_of_the_same_batches_to_float16(tmp_path, changes):
    config = tiny(**changes)
    made = make(tmp_path / "c", config)
    assert (made.epochs, made.written) == (2, 4)
    cache, source, _ = open_cache(tmp_path / "c", config)
    batches, live = live_logits(config)
    found = list(
        teacher_cache.WithTeacher(source, cache).train_batches(seed=config.seed, batch_size=BATCH, start_step=0)
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
    found = [batch["teacher_logits"] for batch in teacher_cache.WithTeacher(source, cache).train_batches(**arguments)]
    np.testing.assert_array_equal(np.array(found).reshape(-1, BATCH, CLASSES), whole[start:])


def test_each_process_gets_its_rows(tmp_path):
    make(tmp_path / "c")
    cache, source, _ = open_cache(tmp_path / "c")
    with_teacher = teacher_cache.WithTeacher(source, cache)
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


def fit(config, workdir, cache=None, *, teacher=None, one_device=True):
    source, mesh, taught = taught_by(config)
    if one_device:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    teacher = teacher or taught.teacher
    teacher = teacher._replace(variables=sharding.place(jax.tree.map(np.asarray, teacher.variables), mesh))
    source = teacher_cache.WithTeacher(source, cache) if cache else source
    return train.fit(config, workdir=epath.Path(workdir), source=source, mesh=mesh, teacher=teacher)


def training_lines(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


@pytest.fixture
def exact_teacher(monkeypatch):
    """Every teacher's logits are rounded to sixteenths, which float16 holds exactly."""
    prepare = job.prepare

    def prepared(config, methods, *, stop):
        source, mesh, taught = prepare(config, methods, stop=stop)
        apply = taught.teacher.apply
        rounded = taught.teacher._replace(apply=lambda v, x, **more: jnp.round(16 * apply(v, x, **more)) / 16)
        return source, mesh, taught._replace(teacher=rounded)

    monkeypatch.setattr(job, "prepare", prepared)


def test_where_float16_holds_the_logits_training_is_the_same(tmp_path, exact_teacher):
    config = tiny(method="dgkd")
    make(tmp_path / "c", config)
    live = fit(config, tmp_path / "live")
    cached = fit(config, tmp_path / "cached", open_cache(tmp_path / "c", config)[0])
    for a, b in zip(jax.tree.leaves(live.variables), jax.tree.leaves(cached.variables), strict=True):
        # Two programs, with and without a teacher: float32's sums in another order over eight steps.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(training_lines(tmp_path / "live"), training_lines(tmp_path / "cached"), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


def test_the_loss_from_the_cache_differs_by_what_rounding_the_teacher_makes(tmp_path):
    """T²·KL(q ‖ p) changes with the teacher's v_j by T·q_j·(log(q_j/p_j) − KL), and v_j by at most `rounding`."""
    config = tiny(method="kd")
    make(tmp_path / "c", config)
    cache, source, teacher = open_cache(tmp_path / "c", config)
    built, first = program.build(config, source, sharding.make_mesh(), teacher)
    (batch, *_), (v, *_) = live_logits(config, count=1)
    brought = batch | {"teacher_logits": cache.epoch(0)[0][0]}
    # Copies, since the step's own is donated.
    live, cached = (
        float(built.train_step(jax.tree.map(jnp.copy, first), teacher.variables, each).totals["kd"][0])
        for each in (batch, brought)
    )
    model = program.network(config.student.model, "float32", source=source)
    images = steps.normalize(batch["image"], mean=source.mean, std=source.std)
    z, _ = model.apply(first.variables, images, train=True, mutable=["batch_stats"])
    z, v, t = np.asarray(z, np.float64), np.asarray(v, np.float64), config.kd.temperature
    q, p = (np.exp(x / t) / np.exp(x / t).sum(1, keepdims=True) for x in (v, z))
    kl = (q * np.log(q / p)).sum(1, keepdims=True)
    bound = (t * q * np.abs(np.log(q / p) - kl) * rounding(v)).sum(1).mean()
    np.testing.assert_allclose(live, t**2 * kl.mean(), rtol=1e-5)
    assert 0 < abs(live - cached) <= 1.1 * bound + 1e-6 * live  # 1.1: the second order
    assert bound < 1e-3 * live


def test_the_compiled_step_holds_no_teacher(tmp_path):
    config = tiny(**{"teacher.model": "small_cnn_w24"})
    make(tmp_path / "c", config)
    cache, source, teacher = open_cache(tmp_path / "c", config)
    mesh = sharding.make_mesh()
    built, current = program.build(config, source, mesh, teacher)

    def compiled(batches):
        batch = sharding.to_global(next(batches.train_batches(seed=0, batch_size=BATCH, start_step=0)), mesh)
        return built.train_step.lower(current, teacher.variables, batch).compile()

    live, cached = compiled(source), compiled(teacher_cache.WithTeacher(source, cache))
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
    built, current = program.build(config, source, mesh, taught.teacher)
    batch = next(source.train_batches(seed=0, batch_size=BATCH, start_step=0))
    logits = np.ones((BATCH, CLASSES), np.float16)
    logits[5, 2] = np.nan
    finite = built.finite_rows(
        current, taught.teacher.variables, sharding.to_global(batch | {"teacher_logits": logits}, mesh)
    )
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(finite["teacher logits"])), [5])


def test_a_run_does_not_change_over_to_a_cache_but_the_cache_may_move(tmp_path, capsys):
    config = tiny()
    job.run(config, str(tmp_path / "live"))
    make(tmp_path / "c")
    config.teacher.cache = str(tmp_path / "c")
    with pytest.raises(BadInput, match=r"another teacher \(weights (\w+), now \1, cached in float16\)"):
        job.run(config, str(tmp_path / "live"))
    (result,) = job.run(config, str(tmp_path / "cached"))
    assert "teacher's logits in training: cached in float16" in capsys.readouterr().err
    # As without a cache, so that `evaluate` finds the teacher.
    assert export.read(tmp_path / "cached").taught_by == result["teacher"]["fingerprint"]
    shutil.move(tmp_path / "c", tmp_path / "d")
    config.teacher.cache = str(tmp_path / "d")
    job.run(config, str(tmp_path / "cached"))
    config.teacher.cache = ""
    with pytest.raises(BadInput, match=r"another teacher \(weights (\w+), cached in float16, now \1\)"):
        job.run(config, str(tmp_path / "cached"))


# ------------------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------------------


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


class Asked:
    """Says to stop at the `number`-th question, one after each step."""

    def __init__(self, number):
        self._left = number

    def __call__(self):
        self._left -= 1
        return self._left <= 0


@pytest.mark.parametrize("step", [1, 3, 6])
def test_an_interrupted_cache_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, step):
    make(tmp_path / "whole")
    with pytest.raises(Preempted, match=f"stopped after {step} of 8 batches"):
        make(tmp_path / "c", stop=Asked(step))
    with pytest.raises(BadInput, match=r"holds less than config.epochs=2: the first step .*cache_teacher --output="):
        open_cache(tmp_path / "c")
    whole_before = {1: 0, 3: 1, 6: 2}[step]  # of 3, 1, 3 and 1 steps
    assert make(tmp_path / "c").written == 4 - whole_before
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")
    assert make(tmp_path / "c").written == 0


def test_a_block_that_the_manifest_does_not_name_does_not_count(tmp_path, monkeypatch):
    """As after a kill between a block and the manifest: its files are there."""
    make(tmp_path / "whole")
    save, saved = logit_files.Writer._save, []

    def killed(writer):
        saved.append(1)
        if len(saved) == 3:  # at the start, and after each block
            raise InterruptedError
        save(writer)

    with monkeypatch.context() as patch:
        patch.setattr(logit_files.Writer, "_save", killed)
        with pytest.raises(StorageFailure):
            make(tmp_path / "c")
    assert len(list((tmp_path / "c" / "logits").glob("c.*"))) == 2
    assert make(tmp_path / "c").written == 3
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")


def test_storage_that_takes_no_block_is_said(tmp_path):
    make(tmp_path / "c", epochs=1)
    (tmp_path / "c" / "logits" / "c.1.0.0.0").mkdir()  # where a file has to be
    with pytest.raises(StorageFailure, match=r"could not be written in .*/c: .* 2 blocks are whole. Make room"):
        make(tmp_path / "c")
    (tmp_path / "c" / "logits" / "c.1.0.0.0").rmdir()
    assert make(tmp_path / "c").written == 2


def test_epochs_can_be_added(tmp_path):
    make(tmp_path / "c", epochs=1)
    with pytest.raises(BadInput, match=r"less than config.epochs=2: the first step that is not there is 1 of epoch 2"):
        open_cache(tmp_path / "c")
    assert make(tmp_path / "c", epochs=2).written == 2
    make(tmp_path / "whole")
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")
    assert make(tmp_path / "c", epochs=1).written == 0
    open_cache(tmp_path / "c", tiny(epochs=1))


@pytest.mark.parametrize("part", ["logits", "check"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_block_is_found_and_made_anew(tmp_path, part, damage):
    make(tmp_path / "c")
    before = files_of(tmp_path / "c")
    (file,) = (tmp_path / "c" / part).glob("c.1.0*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-5])
    cache, _, _ = open_cache(tmp_path / "c")
    cache.epoch(0)
    with pytest.raises(BadInput, match=r"is damaged, steps 1 to 3 of epoch 2: .* given again, makes anew"):
        cache.epoch(1)
    assert make(tmp_path / "c").written == 1
    assert files_of(tmp_path / "c") == before


def test_a_block_in_the_place_of_another_is_found(tmp_path):
    make(tmp_path / "c")
    for part in ("logits", "check"):
        (one,), (other,) = ((tmp_path / "c" / part).glob(f"c.{epoch}.0*") for epoch in (0, 1))
        shutil.copy(one, other)
    with pytest.raises(BadInput, match="steps 1 to 3 of epoch 2: they are not what was written"):
        open_cache(tmp_path / "c")[0].epoch(1)


def test_logits_that_float16_cannot_hold_are_refused_with_their_images(tmp_path, monkeypatch):
    prepare = job.prepare

    def prepared(config, methods, *, stop):
        source, mesh, taught = prepare(config, methods, stop=stop)
        apply = taught.teacher.apply
        large = taught.teacher._replace(apply=lambda v, x: apply(v, x).at[3, 1].set(7e4))
        return source, mesh, taught._replace(teacher=large)

    monkeypatch.setattr(job, "prepare", prepared)
    with pytest.raises(
        NumericFailure, match=r"of 1 of 16 images of step 1 are not finite, or too large .*: generated 0/3"
    ):
        make(tmp_path / "c")


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
    monkeypatch.setattr(job.data_lib, "open_source", lambda *_: pytest.fail("the data were opened"))
    with pytest.raises(
        BadInput, match=r"config.teacher.cache=nowhere: no cache .* Make one with python -m dgkd_jax.cache"
    ):
        job.run(tiny(**{"teacher.cache": "nowhere"}))


def test_a_manifest_that_is_none_is_refused(tmp_path):
    make(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text("{}")
    with pytest.raises(BadInput, match="is not that of a cache"):
        open_cache(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="is damaged"):
        make(tmp_path / "c")


def test_a_folder_with_other_files_is_not_written_in(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds files that are no cache"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == ["notes.txt"]
    with pytest.raises(BadInput, match="notes.txt is a file; give a folder"):
        make(tmp_path / "notes.txt")


def test_data_that_changed_since_are_an_error(tmp_path):
    """The keys are the same, the images are not: what a changed folder or another TensorFlow would do."""
    make(tmp_path / "c")
    cache, source, _ = open_cache(tmp_path / "c")
    moved = dataclasses.replace(source, num_classes=9)  # draws other labels
    batches = teacher_cache.WithTeacher(moved, cache).train_batches(seed=0, batch_size=BATCH, start_step=2)
    with pytest.raises(BadInput, match="row 2 of step 3 is not the image that the teacher saw"):
        next(batches)


def in_memory(monkeypatch, *, changed=False):
    """A configuration whose images can lie on the device, and its data set where it is opened from now on."""
    config = test_feed.tiny(**{"teacher.weights": "nowhere.npz", "epochs": 2, "diagnose": False})
    monkeypatch.setattr(job.data_lib, "open_source", OPEN_SOURCE)
    source = test_feed.InMemory(config, on_device=True)
    if changed:
        source.train_set()["image"][:] ^= 1
    monkeypatch.setattr(job.data_lib, "open_source", lambda data: source)
    return config


def test_on_the_device_the_batches_bring_the_same_logits(tmp_path, monkeypatch):
    config = in_memory(monkeypatch)
    make(tmp_path / "c", config)
    cache, source, _ = open_cache(tmp_path / "c", config)
    taught = teacher_cache.WithTeacher(source, cache)
    examples = {name: jnp.asarray(values) for name, values in taught.train_set().items()}
    arguments = {"seed": config.seed, "batch_size": BATCH}
    for step, streamed in enumerate(taught.train_batches(start_step=0, **arguments)):
        epoch = taught.epoch_rows(epoch=step // EPOCH, **arguments)
        found = resident.batch(examples, {name: values[step % EPOCH] for name, values in epoch.items()})
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
        job.run(config, str(tmp_path / "run"))


def test_every_row_is_compared_in_its_turn(tmp_path):
    """A change of one row only is found when the turn comes to it."""
    make(tmp_path / "c")
    cache, source, _ = open_cache(tmp_path / "c")

    class Changed:
        def train_batches(self, *, start_step, **arguments):
            for batch in source.train_batches(start_step=start_step, **arguments):
                batch["image"][5, 0, 0, 0] ^= 1
                yield batch

    batches = teacher_cache.WithTeacher(Changed(), cache).train_batches(seed=0, batch_size=BATCH, start_step=0)
    assert len(list(itertools.islice(batches, 5))) == 5
    with pytest.raises(BadInput, match="row 5 of step 6"):
        next(batches)


# ------------------------------------------------------------------------------------------------------------
# Top k
# ------------------------------------------------------------------------------------------------------------


def plain_top_k(v, y, k, t):
    """The dense logits that top-k stands for, in Python: one row."""
    others = sorted((j for j in range(len(v)) if j != y), key=lambda j: -v[j])
    kept, rest = [y, *others[: k - 1]], others[k - 1 :]
    mass = sum(np.exp(v[j] / t) for j in rest)
    return [v[j] if j in kept else t * np.log(mass / len(rest)) for j in range(len(v))]


@pytest.mark.parametrize("k", [1, 2, 3, 7, 11])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_top_k_is_its_formula(k, temperature):
    rng = np.random.default_rng(k)
    v, y = rng.normal(size=(3, 5, 12)) * 6, rng.integers(0, 12, (3, 5))
    stored = top_classes.shorten(v, y, count=k, temperature=temperature)
    assert stored.values.shape == (3, 5, k)
    assert (stored.classes[..., 0] == y).all()
    found = top_classes.restore(stored, num_classes=12, temperature=temperature)
    expected = np.array([[plain_top_k(v[i, j], y[i, j], k, temperature) for j in range(5)] for i in range(3)])
    assert found.dtype == np.float16
    assert (np.abs(found - expected) <= rounding(expected)).all()


def test_top_k_of_all_classes_is_all_logits():
    rng = np.random.default_rng(0)
    v, y = rng.normal(size=(6, 12)) * 6, rng.integers(0, 12, 6)
    stored = top_classes.shorten(v, y, count=12, temperature=4.0)
    found = top_classes.restore(stored, num_classes=12, temperature=4.0)
    np.testing.assert_array_equal(found, v.astype(np.float16))


@pytest.mark.parametrize("k", [1, 3])
def test_tckd_is_exact_from_top_k_at_its_temperature_and_not_at_another(k):
    """On logits, and a mass of the rest, that float16 rounds by 2⁻¹¹: so are TCKD's log-odds."""
    rng = np.random.default_rng(1)
    v, z, y = rng.normal(size=(64, 12)) * 3, rng.normal(size=(64, 12)) * 3, rng.integers(0, 12, 64)
    with jax.enable_x64(True):
        stored = top_classes.shorten(v, y, count=k, temperature=4.0)
        # Without the rounding of the stored values, to see the formula and not float16.
        stored = stored._replace(values=np.take_along_axis(v, stored.classes.astype(int), 1))
        dense = np.repeat((stored.rest - 4.0 * np.log(12 - k))[:, None].astype(np.float64), 12, 1)
        np.put_along_axis(dense, stored.classes.astype(int), stored.values, 1)
        for loss in (losses.tckd, losses.tckd_gradient):
            exact, found, elsewhere = (
                np.asarray(loss(z, teacher, y, temperature=t)) for teacher, t in ((v, 4.0), (dense, 4.0), (dense, 1.0))
            )
            np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)  # `rest` is float32
            assert np.abs(elsewhere - np.asarray(loss(z, v, y, temperature=1.0))).max() > 0.05
        assert np.abs(losses.nckd(z, dense, y, temperature=4.0) - losses.nckd(z, v, y, temperature=4.0)).max() > 1e-3


def test_a_top_k_cache_is_the_formula_of_the_live_logits(tmp_path):
    config = tiny()
    make(tmp_path / "c", config, top_k=3)
    cache, source, _ = open_cache(tmp_path / "c", config)
    batches, live = live_logits(config)
    arguments = {"seed": 0, "batch_size": BATCH, "start_step": 0}
    for batch, expected, v in zip(
        teacher_cache.WithTeacher(source, cache).train_batches(**arguments), batches, live, strict=True
    ):
        dense = np.array([plain_top_k(row, y, 3, 4.0) for row, y in zip(v, expected["label"], strict=True)])
        assert (np.abs(batch["teacher_logits"] - dense) <= rounding(dense)).all()


def test_a_top_k_cache_serves_one_temperature_and_no_squared_error(tmp_path):
    make(tmp_path / "c", top_k=3)
    with pytest.raises(BadInput, match=r"config.dkd.temperature=2, and .* right at 4 only"):
        job.run(tiny(**{"teacher.cache": str(tmp_path / "c"), "dkd.temperature": 2.0}))
    with pytest.raises(BadInput, match=r"config.method=logit_mse needs every logit, .* top 3 of 10: make"):
        job.run(tiny(**{"teacher.cache": str(tmp_path / "c"), "method": "all"}))
    with pytest.raises(BadInput, match="holds other logits of a teacher .top_k 3 there, 0 here"):
        make(tmp_path / "c")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"method": "ce"}, {}, "config.method=ce has no teacher"),
        ({"method": "all"}, {"top_k": 3}, "at one temperature, and config.method=all has none"),
        ({"method": "logit_mse"}, {"top_k": 3}, "config.method=logit_mse has none"),
        ({}, {"top_k": 10}, "--top-k=10: mnist5k has 10 classes; leave --top-k out"),
    ],
)
def test_what_cannot_be_cached_is_refused(tmp_path, changes, options, message):
    with pytest.raises(BadInput, match=message):
        make(tmp_path / "c", tiny(**changes), **options)
    assert not (tmp_path / "c").exists()


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


def test_the_last_line_is_the_command_that_trains_from_it(tmp_path):
    config = tiny()
    made = make(tmp_path / "c d", config, epochs=1)
    argv = ["cache_teacher", "--config=configs/mnist5k.py", "--config.data.mock=true", "--epochs=1", "--output=c d"]
    first, last = cache_teacher.summary(made, argv, config).splitlines()
    size = sum(len(content) for content in files_of(tmp_path / "c d").values())
    assert f"for 1 epoch, cached in float16: {size / 1e6:,.1f} MB, {size / 64:.0f} bytes an image; 2 blocks" in first
    assert last == (
        "Train from it:  python -m dgkd_jax.main --config=configs/mnist5k.py --config.data.mock=true "
        f"--config.epochs=1 '--config.teacher.cache={tmp_path}/c d'"
    )
