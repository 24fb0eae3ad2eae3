"""The command with the TPU's own compiler: small programs for slices that are not here. Needs libtpu (extra `plan`)."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dgkd_jax import models

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed: extra plan"
)
SMALL = ["--config=configs/mnist5k.py", "--config.data.mock=true", "--config.data.image_size=16"]
BARE = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "TPU_"))}


def run(module, *arguments):
    """As a user would, without what the tests set for JAX."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, cwd=ROOT, env=BARE, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    output = tmp_path_factory.mktemp("plan") / "plan.json"
    done = run("dgkd_jax.plan", *SMALL, "--config.method=kd", "--topology=v5e-4", "--per-chip=32", f"--output={output}")
    assert (done.returncode, done.stderr) == (0, "")  # not a word of libtpu about the TPU that is not there
    return done.stdout, json.loads(output.read_text())


@pytest.mark.slow
def test_a_small_step_is_compiled_for_four_chips(planned):
    text, found = planned
    (plan,) = found["plans"]
    assert "the training step on v5e:2x2, 4 chips on 1 host" in text
    assert (plan["batch_size"], plan["per_chip"], plan["fits"]) == (128, 32, True)
    assert plan["steps"] == 40 * (1024 // 128)
    assert 0 < plan["cost"]["roofline_s"] < plan["cost"]["estimated_s"] < 0.01
    assert plan["cost"]["gflop"] > 0
    assert {each["kind"] for each in plan["cost"]["collectives"]} == {"all-reduce"}


def test_its_costs_are_of_teacher_and_student(planned):
    (plan,) = planned[1]["plans"]
    assert set(plan["cost"]["parts"]) == {"teacher", "student, forward", "student, backward", "rest"}
    assert sum(plan["cost"]["parts"].values()) == pytest.approx(1)
    assert any(re.match(r"conv\d conv_general_dilated", layer) for _, _, layer in plan["cost"]["costliest"])


def test_gradients_are_exchanged_in_the_parameters_float32(planned):
    """In bfloat16, in which the networks compute there, it would be half of it; BatchNorm's sums are small."""
    student = models.shapes(models.create("small_cnn_w8", num_classes=10), (16, 16, 1))
    bytes_of_parameters = 4 * sum(leaf.size for leaf in jax.tree.leaves(student["params"]))
    exchanged = sum(each["bytes"] for each in planned[1]["plans"][0]["cost"]["collectives"])
    assert bytes_of_parameters <= exchanged < 1.2 * bytes_of_parameters


@pytest.mark.slow
@pytest.mark.wrong_input
def test_a_program_that_does_not_fit_is_one_line():
    """Images of 2,048 pixels: one batch is 24 GiB."""
    done = run(
        "dgkd_jax.plan", *SMALL, "--config.method=ce", "--topology=v5e:1x1", "--target=evaluate",
        "--config.data.image_size=2048", "--config.data.eval_resize=2048", "--config.data.mock_eval_examples=8192",
        "--per-chip=8192",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"dgkd_jax: accuracy of an evaluation batch does not fit v5e:1x1 with 8,192 images a chip: it needs [\d.]+ GiB "
        r"on each chip, and a chip has 15.75 GiB; --per-chip=\d+ should fit\n",
        done.stderr,
    )


@pytest.mark.slow
def test_other_commands_say_nothing_of_a_tpu_that_is_not_there(tmp_path):
    done = run(
        "dgkd_jax.main", *SMALL, "--config.method=ce", "--config.epochs=1", "--config.writers=()",
        "--config.data.mock_train_examples=128", f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not re.search("TPU|libtpu|InitGoogle", done.stdout + done.stderr)
