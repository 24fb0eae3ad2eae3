"""What a run survives: each test breaks a real run of the command, gives the command again and looks at what is left.

`make test-faults`; not part of `make test-all`, since each starts several processes.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dgkd_jax.runs.student import read

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
BREAKING = Path(__file__).with_name("breaking.py")
EPOCH = 4  # steps
TEACHER_STEPS, STUDENT_STEPS = EPOCH, 3 * EPOCH
EVAL_BATCHES = 3
LIMIT_S = 240  # of one command; on an idle machine each takes 15 s
COMMAND = (
    "--config=configs/mnist5k.py",
    "--config.method=dgkd",
    "--config.student.model=small_cnn_w8",
    "--config.teacher.model=small_cnn_w8",
    "--config.teacher.epochs=1",
    "--config.epochs=3",
    "--config.data.mock=true",
    "--config.data.image_size=16",
    "--config.data.mock_train_examples=64",
    "--config.data.mock_eval_examples=21",
    "--config.batch_size=16",
    "--config.teacher.batch_size=16",
    "--config.eval_batch_size=8",
    "--config.eval_every=1",
    "--config.log_every=3",
    "--config.checkpoint_every=2",
)


def start(folder, *more, fault="", devices=1, module="dgkd_jax.main", **keywords) -> subprocess.Popen:
    """A command in a process of its own, in a folder whose teacher/ and student/ it fills."""
    filled = {"dgkd_jax.main": "--workdir", "dgkd_jax.cache_teacher": "--output"}[module]
    environment = os.environ | {
        "DGKD_FAULT": fault,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
    }
    return subprocess.Popen(
        [
            sys.executable,
            *("-X", "faulthandler", BREAKING, module),
            *COMMAND,
            f"{filled}={folder / 'student'}",
            f"--config.teacher.workdir={folder / 'teacher'}",
            *more,
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **keywords,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, stderr); stacks of a process that does not end are in the failure's message."""
    try:
        _, errors = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # -X faulthandler prints all stacks
        _, errors = process.communicate(timeout=30)
        pytest.fail(f"no end after {LIMIT_S} s:\n{errors}")
    return process.returncode, errors


def run(folder, *more, **keywords) -> tuple[int, str]:
    return finish(start(folder, *more, **keywords))


def final(folder):
    """The student's variables after the last step, by path."""
    student = read(folder / "student")
    assert student.step == STUDENT_STEPS
    return student.variables


def lines(folder, name):
    """What metrics.jsonl says of the run and not of its speed."""
    parsed = [json.loads(text) for text in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "images_per_second"}
        for line in parsed
        if line["kind"] != "goodput"
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, errors = run(folder)
    assert code == 0, errors
    return folder


def assert_as_uninterrupted(folder, uninterrupted):
    import jax

    jax.tree.map(np.testing.assert_array_equal, final(folder), final(uninterrupted))
    for name in ("teacher", "student"):
        assert lines(folder, name) == lines(uninterrupted, name)
    results = [json.loads((f / "student" / "result.json").read_text()) for f in (folder, uninterrupted)]
    for name in ("last_accuracy", "best_accuracy", "best_epoch"):
        assert results[0]["student"][name] == results[1]["student"][name]
    assert results[0]["teacher"]["fingerprint"] == results[1]["teacher"]["fingerprint"]


# Places are counted over the whole process: the teacher comes first.
@pytest.mark.parametrize(
    "fault",
    [
        f"kill@step:{TEACHER_STEPS - 1}",  # in the teacher's training
        "kill@compile:2",  # the student's
        f"kill@step:{TEACHER_STEPS + 5}",  # only the student gets that far
        f"kill@eval:{EVAL_BATCHES + 2}",  # the student's first evaluation
        "kill@save:3",  # while the student's first checkpoint is being written
        "kill@save:5",
    ],
)
def test_a_run_that_is_killed_and_started_again_ends_bit_equal(tmp_path, uninterrupted, fault):
    code, errors = run(tmp_path, fault=fault)
    assert code == -signal.SIGKILL, errors
    code, errors = run(tmp_path)
    assert code == 0, errors
    assert_as_uninterrupted(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    ("fault", "saved"),
    [
        (f"sigterm@step:{TEACHER_STEPS - 1}", ("teacher", TEACHER_STEPS - 1)),
        ("sigterm@compile:2", ("student", 1)),
        (f"sigterm@step:{TEACHER_STEPS + 5}", ("student", TEACHER_STEPS + 5)),
        (f"sigint@step:{TEACHER_STEPS + 5}", ("student", TEACHER_STEPS + 5)),
        (f"sigterm@eval:{EVAL_BATCHES + 2}", ("student", EPOCH)),
    ],
)
def test_a_run_that_is_told_to_stop_saves_exits_with_143_and_goes_on(tmp_path, uninterrupted, fault, saved):
    code, errors = run(tmp_path, fault=fault)
    assert code == 143, errors
    name, step = saved
    assert f"stopped after step {step} of" in errors
    assert "Traceback" not in errors
    assert (tmp_path / name / "checkpoints" / str(step)).exists()
    code, errors = run(tmp_path)
    assert code == 0, errors
    assert_as_uninterrupted(tmp_path, uninterrupted)


def test_a_second_signal_ends_at_once_and_what_was_saved_is_intact(tmp_path, uninterrupted):
    place = f"sigterm@step:{TEACHER_STEPS + 5}"
    code, errors = run(tmp_path, fault=f"{place},{place}")
    assert code == 128 + signal.SIGTERM
    assert "second SIGTERM" in errors
    assert "stopped after" not in errors
    code, errors = run(tmp_path)
    assert code == 0, errors
    assert_as_uninterrupted(tmp_path, uninterrupted)


def test_a_run_that_hangs_prints_its_stacks_and_ends_with_a_code_that_says_retry(tmp_path, uninterrupted):
    code, errors = run(tmp_path, "--config.watchdog_s=20", fault=f"hang@step:{TEACHER_STEPS + 5}")
    assert code == 1
    assert "Timeout (0:00:20)" in errors
    assert re.search(r'training/loop\.py", line \d+ in train\n', errors)  # where it hung
    code, errors = run(tmp_path)
    assert code == 0, errors
    assert_as_uninterrupted(tmp_path, uninterrupted)


def test_a_second_job_is_refused_and_the_lock_of_a_dead_one_is_taken_over(tmp_path, uninterrupted):
    first = start(tmp_path, fault=f"hang@step:{TEACHER_STEPS + 5}")
    try:
        deadline = time.monotonic() + LIMIT_S
        while not (tmp_path / "student" / "checkpoints" / str(EPOCH)).exists():
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        code, errors = run(tmp_path)
        assert code == 2
        assert f"in use by another job (process {first.pid} on" in errors
    finally:
        first.kill()
        first.communicate()
    code, errors = run(tmp_path)
    assert code == 0, errors
    assert_as_uninterrupted(tmp_path, uninterrupted)


def test_a_full_disk_is_told_and_older_checkpoints_are_intact(tmp_path, uninterrupted):
    code, _ = run(tmp_path, fault=f"kill@step:{TEACHER_STEPS + 5}")
    assert code == -signal.SIGKILL
    before = {path.name for path in (tmp_path / "student" / "checkpoints").iterdir() if path.name.isdigit()}
    # A file may not grow beyond 20 kB, less than the student's parameters: to the program, a disk that is full.
    code, errors = run(tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert code == 1, errors
    assert errors.splitlines()[-1].startswith("dgkd_jax: a checkpoint could not be written")
    after = {path.name for path in (tmp_path / "student" / "checkpoints").iterdir() if path.name.isdigit()}
    assert after == before
    code, errors = run(tmp_path)
    assert code == 0, errors
    assert_as_uninterrupted(tmp_path, uninterrupted)


def test_a_run_goes_on_with_another_number_of_devices(tmp_path, uninterrupted):
    for devices, fault in ((4, "sigterm@step:5"), (2, "sigterm@step:9")):
        code, errors = run(tmp_path, fault=fault, devices=devices)
        assert code == 143, errors
    code, errors = run(tmp_path, devices=8)
    assert code == 0, errors
    import jax

    # Sums over the batch are added in another order: float32 rounding, carried through 12 steps.
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5),
        final(tmp_path),
        final(uninterrupted),
    )


def test_a_cache_whose_making_was_killed_is_finished_by_the_same_command(tmp_path):
    """The teacher's logits of 12 steps, which are one block an epoch."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, errors = run(whole, module="dgkd_jax.cache_teacher")
    assert code == 0, errors
    code, errors = run(killed, module="dgkd_jax.cache_teacher", fault=f"kill@step:{EPOCH + 2}")
    assert code == -signal.SIGKILL, errors
    first = json.loads((killed / "student" / "manifest.json").read_text())
    assert len(first["blocks"]) == 1
    code, errors = run(killed, module="dgkd_jax.cache_teacher")
    assert code == 0, errors
    manifests = [json.loads((folder / "student" / "manifest.json").read_text()) for folder in (killed, whole)]
    assert manifests[0] == manifests[1]
    assert len(manifests[0]["blocks"]) == 3


def test_numbers_that_diverge_end_the_run_with_3_and_the_place(tmp_path):
    code, errors = run(tmp_path, "--config.optimizer.learning_rate=1e30", "--config.nonfinite_limit=4")
    assert code == 3, errors
    assert "steps in a row, from step" in errors
    assert "examples of step" in errors
    assert "Traceback" not in errors


def test_a_host_that_never_joins_ends_the_others(tmp_path):
    environment = {
        "JAX_COORDINATOR_ADDRESS": "localhost:27961",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "dgkd_jax.main", *COMMAND, "--config.join_timeout_s=5", f"--workdir={tmp_path}"],
        cwd=ROOT,
        env=os.environ | environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert process.returncode not in (0, 2, 3), process.stderr
    assert time.monotonic() - began < LIMIT_S / 2
    assert "join" in process.stderr or "DEADLINE" in process.stderr
