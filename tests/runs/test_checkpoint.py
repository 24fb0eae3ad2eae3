"""Checkpoints: what comes back is what was saved, or it is not used."""

import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dgkd_jax.errors import BadInput, NumericFailure
from dgkd_jax.runs import checkpoint, sharding
from dgkd_jax.training import state


def make_state(step: int, *, seed: int = 0) -> state.TrainState:
    rng = np.random.default_rng(seed + step)
    variables = {
        "params": {
            "kernel": rng.normal(size=(64, 256)).astype(np.float32),
            "bias": rng.normal(size=3).astype(np.float32),
        },
        "batch_stats": {"mean": rng.normal(size=3).astype(np.float32)},
    }
    created = state.create(variables, optax.sgd(0.1, momentum=0.9), ema=True, metric_names=("loss", "accuracy"))
    return sharding.place(created.replace(step=np.asarray(step, np.int32)), sharding.make_mesh())


def assert_bit_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(directory, steps_and_accuracies, *, keep=3):
    with checkpoint.Checkpoints(directory, keep=keep) as checkpoints:
        for step, accuracy in steps_and_accuracies:
            checkpoints.save(make_state(step), record={"note": f"at {step}"}, score=accuracy)


def data_file(directory):
    """The file with the values of the kernel, which is larger than all metadata together."""
    path = max((path for path in (directory / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    assert path.stat().st_size > 64 * 256
    return path


def test_restored_state_is_bit_equal_and_keeps_its_record_and_sharding(tmp_path):
    save(tmp_path / "c", [(5, 0.5)])
    with checkpoint.Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        restored, record = checkpoints.restore(make_state(0))
    assert_bit_equal(restored, make_state(5))
    assert record == {"note": "at 5"}
    assert restored.params["kernel"].sharding.mesh.size == 8


def test_a_step_that_is_a_link_is_refused_before_it_would_have_to_be_deleted_but_can_be_read(tmp_path):
    save(tmp_path / "c", [(5, 0.5)])
    (tmp_path / "c" / "5").rename(tmp_path / "elsewhere")
    (tmp_path / "c" / "5").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="c/5 is a symbolic link"):
        checkpoint.Checkpoints(tmp_path / "c", keep=3)
    with checkpoint.Checkpoints(tmp_path / "c", keep=3, read_only=True) as checkpoints:
        restored, _ = checkpoints.restore(make_state(0))
    assert_bit_equal(restored, make_state(5))


def test_without_a_pattern_a_state_is_read_as_it_was_saved(tmp_path):
    """As plain dictionaries, on one device, with nothing known of the run; and its digest is compared all the same."""
    save(tmp_path / "c", [(5, 0.5)])
    with checkpoint.Checkpoints(tmp_path / "c", keep=3, read_only=True) as checkpoints:
        restored, record = checkpoints.restore()
    assert record == {"note": "at 5"}
    expected = make_state(5)
    assert isinstance(restored, dict)
    for name in ("step", "params", "batch_stats", "ema", "totals", "epoch_totals"):
        assert_bit_equal(restored[name], getattr(expected, name))
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(restored))
    file = data_file(tmp_path / "c" / "5")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with (
        checkpoint.Checkpoints(tmp_path / "c", keep=3, read_only=True) as checkpoints,
        pytest.raises(BadInput, match="no checkpoint in .* can be used"),
    ):
        checkpoints.restore()


def test_a_folder_without_checkpoints_restores_nothing(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        assert checkpoints.restore(make_state(0)) is None


def test_what_was_saved_does_not_change_when_its_buffers_are_donated(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + 1, s), donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        current = make_state(5)
        checkpoints.save(current, record={}, score=None)
        for _ in range(3):
            current = step(current)
        jax.block_until_ready(current)
    with checkpoint.Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        restored, _ = checkpoints.restore(make_state(0))
    assert_bit_equal(restored, make_state(5))


def test_newest_and_best_are_kept(tmp_path):
    save(tmp_path / "c", [(1, 0.7), (2, 0.9), (3, 0.9), (4, 0.8), (5, 0.1), (6, None)], keep=2)
    kept = sorted(int(path.name) for path in (tmp_path / "c").iterdir() if path.name.isdigit())
    assert kept == [2, 5, 6]  # of two equally good ones the earlier


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint8, np.bool_, jnp.bfloat16])
def test_digest_changes_with_any_single_bit(dtype):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        values = np.asarray(rng.normal(size=(3, 5)) > 0 if dtype is np.bool_ else rng.normal(size=(3, 5)) * 50).astype(
            dtype
        )
        original = checkpoint.digest({"a": jnp.asarray(values)})
        raw = values.view(np.uint8)
        bits = [(byte, bit) for byte in range(raw.size) for bit in range(1 if dtype is np.bool_ else 8)]
        for byte, bit in bits[:: max(len(bits) // 60, 1)]:
            flipped = raw.copy().reshape(-1)
            flipped[byte] ^= 1 << bit
            flipped = flipped.view(dtype).reshape(values.shape)
            assert checkpoint.digest({"a": jnp.asarray(flipped)}) != original


def test_digest_changes_when_two_elements_or_two_arrays_swap():
    values = jnp.arange(6.0).reshape(2, 3)
    assert checkpoint.digest({"a": values}) != checkpoint.digest({"a": values[::-1]})
    assert checkpoint.digest({"a": values}) != checkpoint.digest({"a": values.reshape(3, 2).T.reshape(2, 3)})
    assert checkpoint.fingerprint({"a": values, "b": -values}) != checkpoint.fingerprint({"a": -values, "b": values})


def test_digest_does_not_depend_on_the_sharding():
    mesh = sharding.make_mesh(fsdp=2)
    values = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    digests = {
        json.dumps(checkpoint.digest([jax.device_put(values, NamedSharding(mesh, spec))]))
        for spec in (P(), P("data"), P("data", "fsdp"), P(None, "fsdp"))
    }
    assert len(digests) == 1


def flip_bit(directory):
    path = data_file(directory)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(bytes(raw))


def truncate(directory):
    path = data_file(directory)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(directory):
    data_file(directory).unlink()


def empty(directory):
    for path in sorted(directory.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()


def spoil_metadata(directory):
    (path,) = [
        p
        for p in (directory / "meta").rglob("*")
        if p.is_file() and "metadata" in p.name and not p.name.startswith("_")
    ]
    path.write_text(path.read_text()[:-20])


def forge_digest(directory):
    """Valid JSON, valid arrays, but not the arrays that were saved."""
    (path,) = [
        p
        for p in (directory / "meta").rglob("*")
        if p.is_file() and "metadata" in p.name and not p.name.startswith("_")
    ]
    meta = json.loads(path.read_text())
    meta["digest"][".params['bias']"] ^= 1
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize("damage", [flip_bit, truncate, delete, empty, spoil_metadata, forge_digest])
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used(tmp_path, damage):
    save(tmp_path / "c", [(1, 0.5), (2, 0.6)])
    damage(tmp_path / "c" / "2")
    with checkpoint.Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        restored, record = checkpoints.restore(make_state(0))
        assert_bit_equal(restored, make_state(1))
        assert record == {"note": "at 1"}
        assert (tmp_path / "damaged_checkpoints" / "2").exists()
        checkpoints.save(make_state(2), record={"note": "again"}, score=0.6)
    with checkpoint.Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        restored, record = checkpoints.restore(make_state(0))
        assert_bit_equal(restored, make_state(2))
        assert record == {"note": "again"}


def test_where_every_checkpoint_is_damaged_nothing_is_moved_and_the_user_is_told(tmp_path):
    save(tmp_path / "c", [(1, 0.5), (2, 0.6)])
    truncate(tmp_path / "c" / "1")
    flip_bit(tmp_path / "c" / "2")
    with (
        checkpoint.Checkpoints(tmp_path / "c", keep=3) as checkpoints,
        pytest.raises(BadInput, match=r"(?s)no checkpoint in .*step 2: .*step 1: .*remove it to start"),
    ):
        checkpoints.restore(make_state(0))
    assert (tmp_path / "c" / "2").exists()


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        checkpoints.save(make_state(4), record={"note": "first"})
        checkpoints.save(make_state(4), record={"note": "second"})
        _, record = checkpoints.restore(make_state(0))
    assert record == {"note": "first"}


def test_what_an_evaluation_adds_replaces_the_checkpoint_of_the_step(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(make_state(4), record={"note": "stopped before its evaluation"})
        checkpoints.save(make_state(4), record={"note": "evaluated"}, score=0.9)
        checkpoints.save(make_state(5), record={"note": "newest"}, score=0.1)
    with checkpoint.Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        assert checkpoints.steps == [4, 5]  # 4 has a score now, the best
        _, record = checkpoints.restore(make_state(0), step=4)
    assert record == {"note": "evaluated"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, bad):
    state = make_state(3)
    state = state.replace(params={**state.params, "bias": state.params["bias"].at[0].set(bad)})
    with checkpoint.Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        with pytest.raises(NumericFailure, match="after step 3 has values that are not finite; it is not saved"):
            checkpoints.save(state, record={})
        assert checkpoints.steps == []


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "no"), OSError(errno.EIO, "no"), ValueError("UNAVAILABLE: try later")]
)
def test_storage_that_does_not_answer_for_now_is_no_damage(tmp_path, monkeypatch, error):
    save(tmp_path / "c", [(1, 0.5), (2, 0.6)])

    def fail(*_):
        raise error

    with checkpoint.Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        monkeypatch.setattr(checkpoints, "_read", fail)
        with pytest.raises(type(error)):
            checkpoints.restore(make_state(0))
        assert checkpoints.steps == [1, 2]
    assert not (tmp_path / "damaged_checkpoints").exists()


def test_a_checkpoint_that_is_not_accepted_ends_the_search(tmp_path):
    save(tmp_path / "c", [(1, 0.5), (2, 0.6)])

    def refuse(record):
        raise BadInput(record["note"])

    with checkpoint.Checkpoints(tmp_path / "c", keep=3) as checkpoints, pytest.raises(BadInput, match="^at 2$"):
        checkpoints.restore(make_state(0), accept=refuse)
    assert not (tmp_path / "damaged_checkpoints").exists()
