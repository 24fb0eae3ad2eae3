"""A process that hangs ends itself."""

import subprocess
import sys

import pytest


def child(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_watchdog_ends_a_process_without_beats_and_shows_where_it_hung():
    result = child(
        """
import time
from dgkd_jax.training.monitor.watchdog import Watchdog
def stuck():
    time.sleep(60)
with Watchdog(0.5):
    stuck()
"""
    )
    assert result.returncode == 1
    assert "in stuck" in result.stderr


@pytest.mark.slow
def test_beats_keep_the_watchdog_quiet_and_so_does_its_end():
    result = child(
        """
import time
from dgkd_jax.training.monitor.watchdog import Watchdog
with Watchdog(1.0) as watchdog:
    for _ in range(15):
        time.sleep(0.1)
        watchdog.beat()
time.sleep(1.5)
with Watchdog(0):
    time.sleep(0.1)
"""
    )
    assert result.returncode == 0, result.stderr
