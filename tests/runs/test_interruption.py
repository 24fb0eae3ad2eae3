"""Signals are noted and asked for; the second one, and a hang, end the process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dgkd_jax.runs.interruption import Interruption


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_program_goes_on(number, capfd):
    before = signal.getsignal(number)
    with Interruption() as interruption:
        assert not interruption.agreed()
        os.kill(os.getpid(), number)
        wait_for(interruption.agreed)
        assert interruption.agreed()  # it stays so
    assert signal.getsignal(number) == before
    assert f"{number.name}: saving after this step" in capfd.readouterr().err


def test_without_a_signal_nothing_stops():
    with Interruption() as interruption:
        assert not any(interruption.agreed() for _ in range(5))


def child(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_does_not_look():
    result = child(
        """
import os, signal, time
from dgkd_jax.runs.interruption import Interruption
with Interruption():
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    time.sleep(60)
"""
    )
    assert result.returncode == 128 + signal.SIGTERM
    assert "second SIGTERM, ending at once" in result.stderr
