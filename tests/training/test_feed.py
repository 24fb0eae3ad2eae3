"""Training from the device's memory is training on the host's batches, in any number of steps per call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from in_memory import BATCH, EPOCH, InMemory, tiny
from small_runs import Asked, a_teacher, assert_bit_equal, lines

from benchmarks import scaling
from dgkd_jax.data import on_device
from dgkd_jax.errors import NumericFailure, Preempted
from dgkd_jax.runs import sharding
from dgkd_jax.training import build as building
from dgkd_jax.training import feed, loop
from dgkd_jax.training.build import build, steps_on_device


def parts(config, mesh, *, on_device):
    source = InMemory(config, on_device=on_device)
    return source, a_teacher(source, mesh)


def fit(config, workdir, mesh, *, on_device=True, **more):
    source, teacher = parts(config, mesh, on_device=on_device)
    return loop.fit(config, workdir=workdir, source=source, mesh=mesh, teacher=teacher, **more)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, one_device):
    workdir = tmp_path_factory.mktemp("streamed")
    return fit(tiny(), workdir, one_device, on_device=False), workdir


@pytest.fixture(scope="module")
def looped(tmp_path_factory, one_device):
    """Three steps in a call, where they fit before the next thing that is due."""
    workdir = tmp_path_factory.mktemp("looped")
    return fit(tiny(steps_per_call=3), workdir, one_device), workdir


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_call", [1, 3, 16])
def test_it_follows_the_streamed_run(tmp_path, one_device, streamed, steps_per_call):
    expected, folder = streamed
    found = fit(tiny(steps_per_call=steps_per_call), tmp_path, one_device)
    for a, b in zip(jax.tree.leaves(found.variables), jax.tree.leaves(expected.variables), strict=True):
        # The same batches; float32 sums that XLA may order otherwise, amplified over twelve steps at rate 0.1.
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)
    for line, other in zip(lines(tmp_path), lines(folder), strict=True):
        assert line.keys() == other.keys()
        assert (line["step"], line["kind"]) == (other["step"], other["kind"])
    saved = [{path.name for path in (run / "checkpoints").iterdir()} for run in (tmp_path, folder)]
    assert saved[0] == saved[1]


# Calls end at 3, 4, 5, 6, 8: metrics are due at 3 and 6, a checkpoint at 5, epochs end at 4 and 8.
@pytest.mark.slow
@pytest.mark.parametrize(("question", "saved"), [(0, 3), (2, 5), (3, 6)])
def test_stopped_within_an_epoch_it_ends_bit_equal(tmp_path, one_device, looped, question, saved):
    expected, folder = looped
    with pytest.raises(Preempted, match=f"stopped after step {saved} of 12"):
        fit(tiny(steps_per_call=3), tmp_path, one_device, stop=Asked(question))
    found = fit(tiny(steps_per_call=3), tmp_path, one_device)
    assert_bit_equal(found.variables, expected.variables)
    assert lines(tmp_path) == lines(folder)


@pytest.mark.slow
def test_how_the_steps_are_cut_into_calls_does_not_change_a_bit(tmp_path, one_device, looped):
    """There is one program for any number of steps."""
    found = fit(tiny(steps_per_call=2, log_every=5, checkpoint_every=0), tmp_path, one_device)
    assert_bit_equal(found.variables, looped[0].variables)


@pytest.mark.slow
def test_a_run_goes_on_where_the_steps_are_taken_otherwise(tmp_path, one_device, streamed):
    with pytest.raises(Preempted, match="stopped after step 3 of 12"):
        fit(tiny(steps_per_call=3), tmp_path, one_device, stop=Asked(0))
    found = fit(tiny(), tmp_path, one_device, on_device=False)
    for a, b in zip(jax.tree.leaves(found.variables), jax.tree.leaves(streamed[0].variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)  # as above


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_one_trace_per_run_and_no_batch_from_the_host(tmp_path, one_device, monkeypatch, steps_per_call):
    traces = []
    step = building.train_step

    def counted(*arguments, **keywords):
        traces.append(1)
        return step(*arguments, **keywords)

    monkeypatch.setattr(building, "train_step", counted)
    monkeypatch.setattr(InMemory, "train_batches", lambda *_, **__: pytest.fail("a batch was made"))
    fit(tiny(steps_per_call=steps_per_call, epochs=2), tmp_path, one_device)
    assert len(traces) == 1


def compiled(config, mesh, *, on_device):
    source, teacher = parts(config, mesh, on_device=on_device)
    built, current = build(config, source, mesh, teacher)
    with feed.feed(config, built, source=source, mesh=mesh, start=0) as fed:
        return fed.program.lower(current, teacher, *fed.arguments(0, 1)).compile()


@pytest.mark.slow
def test_cost_is_that_of_one_step_and_the_state_is_donated(one_device):
    plain = compiled(tiny(), one_device, on_device=False)
    for steps_per_call in (1, 8):
        found = compiled(tiny(steps_per_call=steps_per_call), one_device, on_device=True)
        operations = [each.cost_analysis()["flops"] for each in (found, plain)]
        np.testing.assert_allclose(*operations, rtol=0.02)  # XLA simplifies a little otherwise within a loop
        assert found.memory_analysis().alias_size_in_bytes == plain.memory_analysis().alias_size_in_bytes > 0


@pytest.mark.slow
def test_devices_exchange_what_they_exchange_for_streamed_batches():
    """Gradients, statistics and sums, and nothing to make the batches, which each device cuts out of its own copy."""
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    kinds = {
        (on_device, most): sorted(
            (each.kind, each.bytes)
            for each in scaling.collectives(compiled(tiny(steps_per_call=most), mesh, on_device=on_device).as_text())
        )
        for on_device, most in ((False, 1), (True, 1), (True, 8))
    }
    assert kinds[True, 1] == kinds[True, 8] == kinds[False, 1]


@pytest.mark.slow
def test_eight_devices_follow_one(tmp_path, looped):
    found = fit(tiny(steps_per_call=3), tmp_path, sharding.make_mesh())
    for a, b in zip(jax.tree.leaves(found.variables), jax.tree.leaves(looped[0].variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)  # as above


@pytest.mark.slow
def test_steps_that_are_not_finite_are_named_as_in_a_streamed_run(tmp_path, one_device):
    config = tiny(**{"steps_per_call": 3, "optimizer.learning_rate": 1e30, "nonfinite_limit": 3, "method": "ce"})
    with pytest.raises(NumericFailure, match=r"3 steps in a row, from step 2 on, .*student logits.*of step 2"):
        fit(config, tmp_path, one_device)


@pytest.mark.slow
def test_a_set_that_cannot_be_decoded_is_streamed_and_the_user_is_told(
    tmp_path, one_device, streamed, monkeypatch, capfd
):
    monkeypatch.setattr(InMemory, "train_set", lambda self: None)
    found = fit(tiny(), tmp_path, one_device)
    assert_bit_equal(found.variables, streamed[0].variables)
    assert "an image cannot be decoded, so the host makes each batch" in capfd.readouterr().err


def test_an_array_of_an_epoch_reaches_the_step_cut_by_step(one_device):
    """Whatever stands beside the indices is the batch's, as what a teacher said of it."""
    config = tiny(steps_per_call=4)
    source, teacher = parts(config, one_device, on_device=True)
    _, current = build(config, source, one_device, teacher)
    rows = source.epoch_rows(seed=0, batch_size=BATCH, epoch=0)
    rows["extra"] = np.random.default_rng(0).normal(size=(EPOCH, BATCH, 3)).astype(np.float16)

    def one_step(current, teacher, batch):
        assert teacher is None
        return current.replace(step=current.step + 1, skipped=batch["extra"][:, 1].astype(float).sum())

    start = current.replace(skipped=np.float32(0), step=np.int32(EPOCH + 1))
    found = steps_on_device(
        start,
        None,
        jax.tree.map(jnp.asarray, on_device.as_rows(source.train_set())),
        rows,
        np.int32(2),
        one_step=one_step,
        steps_per_epoch=EPOCH,
        steps_per_call=4,
        image_shape=source.image_shape,
        batch_sharding=sharding.batch_sharding(one_device),
    )
    assert int(found.step) == EPOCH + 3
    np.testing.assert_allclose(found.skipped, rows["extra"][2, :, 1].astype(float).sum(), rtol=1e-5)  # float32
    assert set(jax.jit(on_device.batch)(source.train_set(), {"index": rows["index"][0]})) == {"image", "label"}


@pytest.mark.parametrize(
    ("start", "every", "most", "expected"),
    [
        (0, [5, 4], 100, [4, 5, 8, 10, 12]),
        (0, [5, 4], 2, [2, 4, 5, 7, 8, 10, 12]),
        (6, [5, 4], 3, [8, 10, 12]),
        (0, [100], 100, [12]),
        (0, [3], 1, list(range(1, 13))),
        (12, [3], 1, []),
    ],
)
def test_calls_end_where_something_is_due(start, every, most, expected):
    assert list(loop.ends_of_calls(start, 12, every=every, most=most)) == expected
