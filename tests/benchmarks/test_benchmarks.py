"""What the benchmarks count and compute; never how fast anything is."""

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scaling, side_by_side, training
from benchmarks.named_gradients import stacked
from dgkd_jax.training.named_gradients import value_and_named_gradients

ROOT = Path(__file__).parents[2]


def test_collectives_are_read_from_a_programs_text():
    program = """
  %a = (f32[3,2]{1,0}, f32[], /*index=2*/bf16[4]{0}) all-reduce(%x, %y, %z), channel_id=1, to_apply=%add
  %b = s32[5]{0} all-gather(%w), channel_id=2, dimensions={0}
  %c = f32[7]{0} add(%p, %q), metadata={op_name="all-reduce"}
"""
    found = scaling.collectives(program)
    assert [(each.kind, each.bytes) for each in found] == [("all-reduce", 24 + 4 + 8), ("all-gather", 20)]
    assert scaling.split(found) == (24 + 8 + 20, 4)


def program_text(step, inputs):
    """As XLA has optimised it; what LLVM makes of it afterwards is not in the text, so it need not be good."""
    return step.lower(*inputs).compile({"xla_backend_optimization_level": 0}).as_text()


@pytest.mark.slow
def test_the_step_sums_gradients_and_batch_norm_statistics_once_over_eight_devices_and_nothing_else_of_size():
    mesh = jax.make_mesh((8, 1), ("data", "fsdp"))
    step, inputs = training.build(mesh, student="small_cnn_w8", teacher="small_cnn_w8", batch=16)
    found = scaling.collectives(program_text(step, inputs))
    due = scaling.expected(inputs[0], classes=training.CLASSES)
    assert {each.kind for each in found} == {"all-reduce"}
    arrays, scalars = scaling.split(found)
    # 29,680 bytes of parameters; 8 + 16 + 24 channels of three float32 sums each; 100 classes of two.
    assert due == (29_680, 3 * 48 * 4, 2 * 100 * 4)
    assert arrays == due.total
    assert scalars <= 4 * 25  # metrics: 16 means, two counts, and what finite logits and norms need


@pytest.mark.slow
def test_one_device_has_no_collectives():
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    step, inputs = training.build(mesh, student="small_cnn_w8", teacher="small_cnn_w8", batch=8)
    assert scaling.collectives(program_text(step, inputs)) == []


def test_the_scaling_model_of_a_ring():
    at = {"step_ms": 10.0, "bytes_": 10**9, "count": 5, "gigabytes": 100.0}
    assert scaling.weak_scaling(devices=1, latency_us=1.0, **at) == 1.0
    # Half of 1 GB is sent twice by each of two: 10 ms.
    np.testing.assert_allclose(scaling.weak_scaling(devices=2, latency_us=0.0, **at), 0.5, rtol=1e-15)
    # 2 hops of 1 ms for each of five collectives: 10 ms more.
    np.testing.assert_allclose(scaling.weak_scaling(devices=2, latency_us=1000.0, **at), 1 / 3, rtol=1e-15)


def test_calls_are_timed_in_turns_after_one_call_each():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = side_by_side.alternate(runs, rounds=9, seconds=0.0)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # three rounds, though there was no time for one
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


def test_a_ratio_compares_the_same_round():
    times = {"ours": [1.0, 2.0, 8.0], "theirs": [3.0, 2.0, 4.0]}
    assert side_by_side.ratio(times, "ours", "theirs") == (1.0, 0.5, 3.0)


def command(name, *arguments, before=""):
    program = f"import sys; {before} sys.argv[1:] = {list(arguments)!r}; from runpy import run_module; " \
        f"run_module('benchmarks.{name}', run_name='__main__')"  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )


@pytest.mark.slow
def test_losses_are_measured_without_torch_which_is_said(tmp_path):
    output = tmp_path / "loss.json"
    options = ("--shapes=4x3", "--losses=dgkd", "--seconds=0", f"--output={output}")
    done = command("loss", *options, before="sys.modules['torch'] = None;")
    assert done.returncode == 0, done.stderr
    assert "PyTorch is not installed" in done.stdout
    (found,) = json.loads(output.read_text())["losses"]
    assert found["ours"]["rounds"] == 3
    assert found["torch_over_ours"] is None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU's compiler: extra plan")
def test_losses_are_compiled_for_a_tpu(tmp_path):
    """DGKD moves more than DKD, and both at least the logits of both sides and the gradient."""
    output = tmp_path / "loss.json"
    done = command("loss_tpu", "--shapes=256x1000", f"--output={output}")
    assert done.returncode == 0, done.stderr
    dkd, dgkd = json.loads(output.read_text())["losses"]
    assert (dkd["loss"], dgkd["loss"]) == ("dkd", "dgkd")
    assert 3 < dkd["arrays"] < dgkd["arrays"] < 40
    assert 0 < dkd["ms"] < dgkd["ms"] < 1


def test_stacked_cotangents_give_the_named_gradients_that_they_are_measured_against():
    random = np.random.default_rng(0)
    images, params = jnp.asarray(random.normal(size=(4, 3))), jnp.asarray(random.normal(size=(3, 2)))

    def terms_of(params):
        outputs = jnp.tanh(images @ params)
        return {"ce": outputs.mean(), "tckd": (outputs**2).mean(), "nckd": (outputs**3).mean()}, outputs

    def loss_of(terms):
        return 0.5 * terms["ce"] + terms["tckd"] + 8.0 * terms["nckd"]

    found, expected = (
        how(terms_of, loss_of, ("task", "tckd", "nckd"))(params) for how in (stacked, value_and_named_gradients)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("loss", "--shapes=64x1", "--shapes=64x1: write BATCHxCLASSES"),
        ("loss", "--losses=dkdd", "--losses: no loss 'dkdd'"),
        ("loss", "--output=nowhere/x.json", "--output=nowhere/x.json: no such folder"),
        ("loss_tpu", "--topology=v5", "--topology=v5 is no name of a slice"),
        ("startup", "--runs=0", "--runs=0: must be 1 or more"),
        ("startup", "--student=resnet21", "--student:"),
        ("named_gradients", "--rounds=0", "--rounds=0: must be 1 or more"),
        ("scaling", "--batch=12", "--batch=12: must be a multiple of 8"),
        ("scaling", "--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(name, argument, message, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)  # runpy warns of what is imported already
    monkeypatch.setattr(sys, "argv", [name, argument])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("dgkd_jax: ")
    assert message in error
    assert error.count("\n") == 1
