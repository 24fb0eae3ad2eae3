"""What stands beside a checkpoint's arrays is sealed: damage to it is damage, and the checkpoint before is used."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from dgkd_jax.errors import BadInput
from dgkd_jax.runs.checkpoint import Checkpoints

RECORD = {"history": {"last_accuracy": 0.434}, "teacher": None}


def state(step):
    return {"step": jnp.int32(step), "weight": jnp.full((3,), float(step))}


class State(dict):
    """A tree with the step as an attribute, as `TrainState` has it."""

    step = property(lambda self: self["step"])


jax.tree_util.register_pytree_with_keys(
    State,
    lambda tree: ([(jax.tree_util.DictKey(name), tree[name]) for name in sorted(tree)], tuple(sorted(tree))),
    lambda names, leaves: State(zip(names, leaves, strict=True)),
)


@pytest.fixture
def saved(tmp_path):
    """The checkpoints of steps 1 and 2."""
    with Checkpoints(tmp_path / "checkpoints", keep=5) as checkpoints:
        for step in (1, 2):
            checkpoints.save(State(state(step)), record=RECORD | {"step": step})
    return tmp_path / "checkpoints"


def restore(folder):
    with Checkpoints(folder, keep=5) as checkpoints:
        return checkpoints.restore()


def change(folder, old, new):
    file = folder / "2" / "meta" / "metadata"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_an_intact_record_is_restored(saved):
    found, record = restore(saved)
    assert record == RECORD | {"step": 2}
    assert found["weight"].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.434", "0.534"),  # one bit of one digit
        ('"last_accuracy"', '"last_accuracx"'),
        ('"record"', '"recorc"'),
        ('"digest"', '"digesu"'),
        ('"jax"', '"jay"'),
        (
            "{",
            "[",
        ),
    ],
)
def test_a_changed_record_is_moved_aside_and_the_one_before_is_used(saved, old, new):
    change(saved, old, new)
    _, record = restore(saved)
    assert record == RECORD | {"step": 1}
    assert (saved.parent / "damaged_checkpoints" / "2").is_dir()


def test_a_record_that_is_null_is_damage(saved):
    file = saved / "2" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"record": None}))
    assert restore(saved)[1] == RECORD | {"step": 1}


def test_a_step_that_was_copied_to_another_number_is_not_taken_for_the_newest(saved):
    shutil.copytree(saved / "1", saved / "7")
    _, record = restore(saved)
    assert record == RECORD | {"step": 2}
    assert (saved.parent / "damaged_checkpoints" / "7").is_dir()


def test_a_checkpoint_from_before_the_seal_is_read_and_said_to_be_one(saved, caplog):
    file = saved / "2" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["seal"]
    file.write_text(json.dumps(meta))
    assert restore(saved)[1] == RECORD | {"step": 2}
    assert "sealed only the arrays" in caplog.text


def test_where_every_record_is_damaged_nothing_is_moved(saved):
    for step in ("1", "2"):
        (saved / step / "meta" / "metadata").write_text("{}")
    with pytest.raises(BadInput, match="no checkpoint in .* can be used"):
        restore(saved)
    assert (saved / "2").is_dir()
