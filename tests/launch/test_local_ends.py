"""The launcher of several processes leaves no process behind, however it ends, and refuses what it cannot start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launch" / "local.py"
# Each child writes its number and the signal that it heard into files whose names begin with its first argument.
CHILD = """
import os, signal, sys, time
place = sys.argv[1] + os.environ["JAX_PROCESS_ID"]
def heard(number, frame):
    open(place + ".heard", "w").write(signal.Signals(number).name)
    sys.exit(143)
for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(each, heard)
open(place + ".new", "w").write(str(os.getpid()))
os.rename(place + ".new", place + ".pid")
time.sleep(60)
"""


def waited_for(condition, *, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def runs(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def started(tmp_path):
    """A function that starts the launcher with two children; returns it and the children's process numbers."""
    launchers, children = [], []

    def start(*before, **options):
        command = [*before, sys.executable, LAUNCHER, "--", sys.executable, "-c", CHILD, tmp_path / "child"]
        launchers.append(subprocess.Popen(command, **options))
        files = [tmp_path / f"child{i}.pid" for i in (0, 1)]
        waited_for(lambda: all(file.exists() for file in files))
        children.extend(int(file.read_text()) for file in files)
        return launchers[0], list(children)

    yield start
    for pid in [each.pid for each in launchers if each.poll() is None] + [pid for pid in children if runs(pid)]:
        os.kill(pid, signal.SIGKILL)
    for launcher in launchers:
        launcher.communicate()


def heard(tmp_path):
    return [(tmp_path / f"child{i}.heard").read_text() for i in (0, 1)]


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent has ended")


@needs_proc
def test_a_closed_terminal_lets_the_children_save(started, tmp_path):
    """SIGHUP reaches them as SIGTERM, which they answer by saving."""
    launcher, children = started()
    launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(timeout=120) == 143
    assert heard(tmp_path) == ["SIGTERM", "SIGTERM"]
    assert not any(map(runs, children))


@needs_proc
def test_under_nohup_a_closed_terminal_changes_nothing(started, tmp_path):
    launcher, children = started("nohup", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    launcher.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert launcher.poll() is None
    assert all(map(runs, children))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=120) == 143


@needs_proc
def test_a_killed_launcher_leaves_no_child(started, tmp_path):
    launcher, children = started()
    launcher.kill()
    launcher.wait()
    waited_for(lambda: not any(map(runs, children)))
    assert heard(tmp_path) == ["SIGTERM", "SIGTERM"]


@needs_proc
def test_children_end_also_where_nobody_reads_the_output(started, tmp_path):
    """As after a closed terminal: whatever the launcher writes fails."""
    reader, writer = os.pipe()
    launcher, children = started(stdout=writer, stderr=writer)
    os.close(reader)
    os.close(writer)
    os.kill(children[0], signal.SIGTERM)
    launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(timeout=120) == 143
    assert not any(map(runs, children))


def refused(*arguments):
    done = subprocess.run(
        [sys.executable, LAUNCHER, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("local.py: ")
    return done.stderr


def test_a_file_that_is_no_program_is_one_line(tmp_path):
    file = tmp_path / "program"
    file.write_text("print('hello')\n")
    assert f"{file} is not executable: chmod +x {file}" in refused("--", file)
    file.chmod(0o755)
    assert f"{file} cannot be started: Exec format error" in refused("--", file)
    file.write_text("#!/no/such/interpreter\n")
    assert f"{file} cannot be started: No such file" in refused("--", file)
    assert f"{tmp_path} is a folder, no command" in refused("--", tmp_path)
    assert "there is no command '/no/such/file' on this machine" in refused("--", "/no/such/file")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "-0.5", "1e300", "soon", ""])
def test_a_grace_that_is_no_time_is_refused(value):
    assert f"argument --grace-s: {value} is not a number of seconds, 0 or more" in refused(f"--grace-s={value}", "true")


@pytest.mark.parametrize("value", ["0", "65536", "-1", "http", "1.5"])
def test_a_port_that_is_none_is_refused(value):
    assert f"argument --port: {value} is not a port, 1 to 65535" in refused(f"--port={value}", "true")
    if not value.isdecimal() or value == "0":
        assert f"argument --processes: {value} is not 1 or more" in refused(f"--processes={value}", "true")
