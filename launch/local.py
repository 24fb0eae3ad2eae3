#!/usr/bin/env python3
"""Run one command as several processes that train together on this machine's CPU.

    python launch/local.py --processes 2 --devices-per-process 1 -- python -m dgkd_jax.main --config=configs/mnist5k.py

JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell each process where the others are. Output lines get
the prefix `[0] `, `[1] `, … SIGTERM and SIGINT are passed on to all processes. Where the terminal is closed (SIGHUP) or
this launcher is killed (on Linux), they get SIGTERM.

Exit code: 0 if every process ended with 0; else the code of the process that failed by itself; 128 + n if signal n
killed it; 2 for bad arguments. Needs only Python 3.11.
"""

import argparse
import contextlib
import ctypes
import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

# Exit codes that the program chooses itself (bad input, numeric failure, preempted); a lost peer never causes them.
_DELIBERATE = (2, 3, 128 + signal.SIGTERM)
# JAX aborts a process when a peer is lost.
_ABORTED = 128 + signal.SIGABRT
# Time from SIGTERM to SIGKILL for processes that outlive a failed one: they cannot save without the lost peer.
_TERM_TO_KILL_S = 10.0
# Linux: the signal that a process gets when its parent ends, however that ended (prctl(2)).
_PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """How one process ended. `by_us`: it ended after this launcher told it to, because another had failed."""

    index: int
    code: int
    by_us: bool = False


class Signalled(NamedTuple):
    """A signal that this launcher received."""

    number: int


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    options = _parse(argv)
    port = options.port or _free_port()
    environments = [
        process_environment(
            index, processes=options.processes, devices=options.devices_per_process, port=port, inherited=os.environ
        )
        for index in range(options.processes)
    ]
    if options.dry_run:
        for environment in environments:
            settings = [f"{name}={value}" for name, value in environment.items()]
            print(shlex.join(["env", *settings, *options.command]))
        return 0
    if shutil.which(options.command[0]) is None:
        _say(_why_not(options.command[0]))
        return 2

    events: queue.SimpleQueue[Ended | Signalled] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # under nohup
        signal.signal(number, lambda number, _: events.put(Signalled(number)))
    children: list[subprocess.Popen] = []
    try:
        for environment in environments:
            children.append(_start(options.command, environment))
    except OSError as error:  # the file is no program, or its interpreter is missing
        _send(children, signal.SIGKILL)
        _say(f"{options.command[0]} cannot be started: {error.strerror or error}")
        return 2
    ended = _supervise(children, events, grace_s=options.grace_s)
    return exit_code(ended)


def process_environment(
    index: int, *, processes: int, devices: int, port: int, inherited: dict[str, str]
) -> dict[str, str]:
    """The environment variables for process `index` of `processes`, added to the inherited ones or replacing them."""
    count = f"--xla_force_host_platform_device_count={devices}"
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{inherited.get('XLA_FLAGS', '')} {count}".strip(),  # if there are two counts, XLA uses the last
        "PYTHONUNBUFFERED": "1",
    }


def exit_code(ended: list[Ended]) -> int:
    """One exit code for all processes; `ended` is in the order in which they ended.

    The failure that caused the others counts: first any code that the program chose itself (2, 3, 143), because a peer
    of an exiting process may fail before it; then the first that is not an abort.
    """
    failures = [each for each in ended if each.code]
    own = [each.code for each in failures if not each.by_us]
    chosen = [code for code in own if code in _DELIBERATE]
    not_aborted = [code for code in own if code != _ABORTED]
    return next(iter(chosen + not_aborted + own), 0)


def _why_not(command: str) -> str:
    if os.path.isdir(command):
        return f"{command} is a folder, no command"
    if os.path.dirname(command) and os.path.exists(command):
        return f"{command} is not executable: chmod +x {shlex.quote(command)}, or name its interpreter before it"
    return f"there is no command {command!r} on this machine"


def _parse(argv: list[str]) -> argparse.Namespace:
    class OneLine(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"local.py: {message} (see --help)\n")

    parser = OneLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--processes", type=_positive, default=2, help="how many (default 2)")
    parser.add_argument(
        "--devices-per-process", type=_positive, default=1, help="virtual CPU devices of each (default 1)"
    )
    parser.add_argument("--port", type=_port, help="where the processes meet (default: one that is free)")
    parser.add_argument(
        "--grace-s",
        type=_seconds,
        default=60.0,
        help="seconds that the others may live on after one has failed; then SIGTERM, and SIGKILL "
        f"{_TERM_TO_KILL_S:g} s later (default 60)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="what each process runs")
    options = parser.parse_args(argv)
    if not options.command:
        parser.error("no command: give one after --")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port, 1 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= threading.TIMEOUT_MAX:  # false for nan
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, 0 or more")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Its own process group, so that Ctrl-C reaches it once, from here: a second signal would end it at once.
        process_group=0,
        preexec_fn=_tied_to(os.getpid()) if sys.platform == "linux" else None,
    )


def _tied_to(launcher: int) -> Callable[[], None]:
    """For the child between fork and exec: lets it get SIGTERM when the launcher ends, even by SIGKILL."""
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != launcher:  # it ended before that call
            os._exit(128 + signal.SIGTERM)

    return tie


def _supervise(
    children: list[subprocess.Popen], events: queue.SimpleQueue[Ended | Signalled], *, grace_s: float
) -> list[Ended]:
    """Wait for all children, passing on signals; end those that outlive a failed one. Returns them as they ended."""
    watchers = [
        threading.Thread(target=_watch, args=(index, child, events), daemon=True)
        for index, child in enumerate(children)
    ]
    for watcher in watchers:
        watcher.start()
    ended: list[Ended] = []
    last_words = [(grace_s, signal.SIGTERM), (_TERM_TO_KILL_S, signal.SIGKILL)]
    deadline = None
    while len(ended) < len(children):
        try:
            event = events.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
        except queue.Empty:
            _, number = last_words.pop(0)
            _say(f"a process has failed: {number.name} to those that are left")
            _send(children, number)
            deadline = time.monotonic() + last_words[0][0] if last_words else None
            continue
        if isinstance(event, Signalled):
            # Who hears SIGHUP ends at once, without saving.
            _send(children, signal.SIGTERM if event.number == signal.SIGHUP else event.number)
            continue
        told_to_end = len(last_words) < 2
        ended.append(event._replace(by_us=told_to_end))
        if event.code and not told_to_end:
            _say(f"process {event.index} ended with code {event.code}")
            deadline = deadline or time.monotonic() + grace_s
    for watcher in watchers:
        watcher.join()  # until the last lines of output are copied
    return ended


def _watch(index: int, child: subprocess.Popen, events: queue.SimpleQueue[Ended | Signalled]) -> None:
    """Copy the child's output and report its end."""
    pumps = [
        threading.Thread(target=_copy_lines, args=(source, target, f"[{index}] ".encode()), daemon=True)
        for source, target in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
    ]
    for pump in pumps:
        pump.start()
    code = child.wait()
    events.put(Ended(index, 128 - code if code < 0 else code))
    for pump in pumps:
        pump.join(timeout=1.0)  # a grandchild may keep the pipe open


def _copy_lines(source: BinaryIO, target: BinaryIO, prefix: bytes) -> None:
    for line in source:
        try:
            target.write(prefix + line.rstrip(b"\n") + b"\n")
            target.flush()
        except OSError:
            pass  # nobody reads our output any more: keep emptying the pipe, or the child blocks


def _send(children: list[subprocess.Popen], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"local.py: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
