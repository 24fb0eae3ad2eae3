"""Waiting for a folder that another run is at work in: two students that need the same teacher at once."""

import threading

import pytest
from etils import epath

from dgkd_jax.errors import Preempted
from dgkd_jax.runs import workdir as workdir_lib


@pytest.mark.slow
def test_who_waits_is_told_for_whom_and_goes_on_when_the_other_has_ended(tmp_path, capsys):
    folder, entered, leave = epath.Path(tmp_path), threading.Event(), threading.Event()

    def other():
        with workdir_lib.lock(folder):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)

    def asked():
        leave.set()  # at the first question the other one ends
        return False

    with workdir_lib.lock(folder, wait=asked):
        assert leave.is_set()
    thread.join()
    assert f"waiting for {folder}, in use by another run (process" in capsys.readouterr().err


def test_who_waits_can_be_stopped(tmp_path):
    folder = epath.Path(tmp_path)
    with (
        workdir_lib.lock(folder),
        pytest.raises(Preempted, match="stopped while waiting"),
        workdir_lib.lock(folder, wait=lambda: True),
    ):
        pytest.fail("both are in")
