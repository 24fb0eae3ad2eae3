"""The launcher of several processes on one machine: its own behaviour with small children, and real training."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "local.py"

_spec = importlib.util.spec_from_file_location("local", LAUNCHER)
local = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(local)


def launch(*arguments, code, **options):
    """Run the launcher with children `python -c code`; `i` in it is the number of the process."""
    child = f"import os, signal, sys, time; i = int(os.environ['JAX_PROCESS_ID'])\n{code}"
    command = [sys.executable, LAUNCHER, *arguments, "--", sys.executable, "-c", child]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_each_process_is_told_where_the_others_are():
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS", "XLA_FLAGS")
    done = launch(
        "--processes=3",
        "--devices-per-process=2",
        "--port=4321",
        code=f"print(*[os.environ[name] for name in {names}], sep='|')",
        env={**os.environ, "XLA_FLAGS": "--xla_other"},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"[{i}] 127.0.0.1:4321|3|{i}|cpu|--xla_other --xla_force_host_platform_device_count=2" for i in range(3)
    ]


def test_a_free_port_is_found_where_none_is_given():
    done = launch(code="print(os.environ['JAX_COORDINATOR_ADDRESS'])")
    addresses = {line.split()[1] for line in done.stdout.splitlines()}
    assert len(addresses) == 1
    assert re.fullmatch(r"127\.0\.0\.1:\d{4,5}", addresses.pop())


def test_lines_of_both_streams_arrive_whole_and_in_order():
    done = launch(code="for n in range(500): print(i, n, 'x' * 50); print('e', i, n, file=sys.stderr)")
    for i in (0, 1):
        assert [line for line in done.stdout.splitlines() if line.startswith(f"[{i}] ")] == [
            f"[{i}] {i} {n} {'x' * 50}" for n in range(500)
        ]
        assert [line for line in done.stderr.splitlines() if line.startswith(f"[{i}] ")] == [
            f"[{i}] e {i} {n}" for n in range(500)
        ]


@pytest.mark.parametrize("code", [1, 2, 3, 143])
@pytest.mark.parametrize("failing", [0, 1])
def test_one_failure_ends_the_others_and_gives_its_code(code, failing):
    done = launch("--grace-s=0.2", code=f"time.sleep(50) if i != {failing} else sys.exit({code})")
    assert done.returncode == code
    assert f"process {failing} ended with code {code}" in done.stderr
    assert "SIGTERM to those that are left" in done.stderr


def test_others_may_end_by_themselves_within_the_grace():
    done = launch("--grace-s=30", code="time.sleep(0.5 * i); sys.exit(1 + i)")
    assert done.returncode == 2  # said by the program itself, though 1 came first
    assert "SIGTERM" not in done.stderr


def test_death_by_signal_is_128_plus_its_number_and_is_not_masked_by_the_abort_that_it_causes():
    done = launch(code="os.kill(os.getpid(), 9) if i else (time.sleep(0.5), os.abort())")
    assert done.returncode == 128 + signal.SIGKILL


@pytest.mark.slow
def test_a_process_that_ignores_sigterm_is_killed(tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(LAUNCHER.parent)!r}); import local; local._TERM_TO_KILL_S = 0.2; "
        "sys.exit(local.main(sys.argv[1:]))"
    )
    child = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.environ['JAX_PROCESS_ID'] == '0': time.sleep(1); sys.exit(3)\n"
        "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(50)"
    )
    command = [sys.executable, "-c", program, "--grace-s=0.2", "--", sys.executable, "-c", child, tmp_path / "pid"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 3
    assert "SIGKILL to those that are left" in done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_once(number, tmp_path):
    child = (
        "import os, signal, sys, time; i = os.environ['JAX_PROCESS_ID']; seen = []\n"
        f"signal.signal({int(number)}, lambda n, _: seen.append(n)); open(sys.argv[1] + i, 'w').close()\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(0.5); print(len(seen)); sys.exit(143)"
    )
    with subprocess.Popen(
        [sys.executable, LAUNCHER, "--", sys.executable, "-c", child, tmp_path / "ready"],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as launcher:
        wait_for(lambda: all((tmp_path / f"ready{i}").exists() for i in (0, 1)))
        os.killpg(launcher.pid, number)  # as a terminal does: to the launcher and all that shares its group
        output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 143
    assert sorted(output.splitlines()) == ["[0] 1", "[1] 1"]


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        ([(0, 0), (1, 0)], 0),
        ([(0, 0), (1, 1)], 1),
        ([(0, 134), (1, 2)], 2),  # the coordinator's client may abort before the other has finished exiting
        ([(1, 1), (0, 143)], 143),
        ([(1, 137), (0, 134)], 137),
        ([(1, 134), (0, 134)], 134),
        ([(0, 134), (1, 143, True)], 134),  # 143 was our doing
    ],
)
def test_the_code_is_that_of_the_process_that_failed_by_itself(ended, code):
    assert local.exit_code([local.Ended(*each) for each in ended]) == code


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=2"], "no command"),
        (["--processes=0", "--", "true"], "0 is not 1 or more"),
        (["--porcesses=2", "--", "true"], "--porcesses=2"),
        (["--", "no-such-command"], "no command 'no-such-command' on this machine"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(arguments, message):
    done = subprocess.run([sys.executable, LAUNCHER, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- real training: each child ends itself with a dump of its stacks after this many seconds --------------------------

LIMIT_S = 240
TRAIN = f"""
import faulthandler, os, pathlib, runpy, sys
faulthandler.dump_traceback_later({LIMIT_S}, exit=True)
pathlib.Path(sys.argv.pop(1) + os.environ["JAX_PROCESS_ID"]).write_text(str(os.getpid()))
runpy.run_module("dgkd_jax.main", run_name="__main__", alter_sys=True)
"""
# 250 images in batches of 64 do not divide evenly over any number of devices.
CONFIG = {
    "data.mock": True,
    "data.mock_train_examples": 512,
    "data.mock_eval_examples": 250,
    "teacher.model": "small_cnn_w8",
    "teacher.epochs": 1,
    "teacher.dtype": "float64",
    "student.dtype": "float64",
    "method": "dgkd",
    "epochs": 3,
    "batch_size": 32,
    "teacher.batch_size": 32,
    "eval_batch_size": 64,
    "log_every": 4,
    "eval_every": 1.0,
    "heartbeat_timeout_s": 10,
}
# Computed in float64, so that a different order of summation shows only where it is rounded to float32: in gradients,
# parameters and grad_norm. That is 5e-8 in grad_norm and 2e-14 elsewhere; a row lost or counted twice is above 1e-4.
RELATIVE = 1e-6


def training(folder, *, workdir, processes, devices=1):
    overrides = [f"--config.{key}={value}" for key, value in CONFIG.items()]
    return [
        *(sys.executable, LAUNCHER, f"--processes={processes}", f"--devices-per-process={devices}", "--grace-s=30"),
        *("--", sys.executable, "-c", TRAIN, folder / "pid", "--config=configs/mnist5k.py", *overrides),
        *(f"--config.teacher.workdir={folder / 'teacher'}", f"--workdir={folder / workdir}"),
    ]


def train(folder, **options):
    done = subprocess.run(
        training(folder, **options), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S + 60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def wait_for(condition, *, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def history(workdir):
    """{(step, kind): metrics} of a run, without the times that it took. Fails where a line is there twice."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {
        (line.pop("step"), line.pop("kind")): {name: line[name] for name in line if name != "images_per_second"}
        for line in lines
        if line["kind"] in ("train", "eval")
    }
    assert len(found) == sum("kind" not in line for line in lines)  # each line was popped into an entry of its own
    return found


def assert_same_run(found, expected):
    assert list(found) == list(expected)
    for key, values in expected.items():
        assert list(found[key]) == list(values)
        for name, value in values.items():  # a number, or a list of one for each class
            assert found[key][name] == pytest.approx(value, rel=RELATIVE, abs=RELATIVE), (key, name)
        if key[1] == "eval":
            assert found[key]["accuracy"] == values["accuracy"]
            assert (values["accuracy"] * 250) == pytest.approx(round(values["accuracy"] * 250), abs=1e-9)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder with a teacher and a run of one process with one device."""
    folder = tmp_path_factory.mktemp("launched")
    train(folder, workdir="one", processes=1)
    return folder


@pytest.mark.faults
def test_two_processes_train_as_one_does_and_one_of_them_writes(reference):
    done = train(reference, workdir="two", processes=2)
    assert_same_run(history(reference / "two"), history(reference / "one"))
    result = json.loads((reference / "two" / "result.json").read_text())
    assert (result["machine"]["processes"], result["machine"]["devices"]) == (2, 2)
    assert result["evaluation"]["examples"] == 250
    assert len(list((reference / "two").glob("events.*"))) == 1
    assert [line for line in done.stdout.splitlines() if "Everything is in" in line] == [
        f"[0] Everything is in {reference / 'two'}"
    ]


@pytest.mark.faults
def test_a_run_that_lost_a_process_goes_on_with_fewer_processes_or_more_devices(reference):
    workdir = reference / "killed"
    with subprocess.Popen(
        training(reference, workdir="killed", processes=2),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        try:
            wait_for(lambda: any(step.name.isdigit() for step in (workdir / "checkpoints").glob("*")), seconds=LIMIT_S)
            os.kill(int((reference / "pid1").read_text()), signal.SIGKILL)
            output, _ = launcher.communicate(timeout=LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                launcher.kill()
    assert launcher.returncode == 128 + signal.SIGKILL, output
    assert max(step for step, _ in history(workdir)) < 48

    shutil.copytree(workdir, reference / "killed4")
    train(reference, workdir="killed", processes=1)
    assert_same_run(history(workdir), history(reference / "one"))
    train(reference, workdir="killed4", processes=2, devices=2)
    assert_same_run(history(reference / "killed4"), history(reference / "one"))
    assert json.loads((reference / "killed4" / "result.json").read_text())["machine"]["devices"] == 4


@pytest.mark.faults
def test_bad_input_that_one_process_alone_has_is_not_lost_in_the_farewell_of_the_others(reference):
    command = training(reference, workdir="uneven", processes=2)
    program = command.index(TRAIN)
    command[program] = TRAIN.replace(
        "runpy.run", 'sys.argv += ["--config.batch_size=33"] * int(os.environ["JAX_PROCESS_ID"])\nrunpy.run'
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 2, done.stderr
    assert "[1] dgkd_jax: config.batch_size=33 must be a multiple of the number of devices, 2" in done.stderr


@pytest.mark.faults
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_damage_is_seen_by_all(reference):
    workdir = reference / "stopped"
    command = training(reference, workdir="stopped", processes=2)
    command[command.index(TRAIN)] = TRAIN.replace(
        'runpy.run_module("dgkd_jax.main", run_name="__main__", alter_sys=True)',
        'sys.argv.insert(1, "dgkd_jax.main")\nrunpy.run_path("tests/faults/breaking.py", run_name="__main__")',
    )
    assert "breaking" in "".join(map(str, command))
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"DGKD_FAULT": "sigterm@step:30", "DGKD_FAULT_PROCESS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S + 60,
        check=False,
    )
    assert done.returncode == 143, done.stdout + done.stderr
    for process in (0, 1):
        assert f"[{process}] dgkd_jax: stopped after step 30 of 48" in done.stderr
    saved = workdir / "checkpoints" / "30"
    for path in (saved / "state").rglob("d/*"):  # each process has written files of its own; flip one bit in each
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    done = train(reference, workdir="stopped", processes=2)
    assert done.stderr.count("checkpoint 30 is damaged") == 1  # said once, by the first process
    assert (workdir / "damaged_checkpoints" / "30").exists()
    assert_same_run(history(workdir), history(reference / "one"))
