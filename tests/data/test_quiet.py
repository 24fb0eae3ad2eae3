"""Other libraries' notes are silenced in a command for good, and in another program only meanwhile."""

import logging
import os

import pytest

from dgkd_jax.data import quiet


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    names = ("tensorflow", "absl", "asyncio")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.INFO)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def heard(caplog) -> list[str]:
    caplog.clear()
    logging.getLogger("tensorflow").warning("TFDS is building")
    logging.getLogger("absl").warning("Orbax is saving")
    logging.getLogger("another.library").warning("something else")
    return [record.getMessage() for record in caplog.records]


def test_another_programs_loggers_are_as_before_afterwards_even_after_an_error(caplog):
    with quiet.meanwhile():
        assert heard(caplog) == ["something else"]
    assert len(heard(caplog)) == 3
    with pytest.raises(KeyError), quiet.meanwhile():
        raise KeyError
    assert len(heard(caplog)) == 3


def test_a_command_is_quiet_for_good_but_a_users_own_choice_stays(caplog, monkeypatch):
    quiet.for_good()
    assert heard(caplog) == ["something else"]
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    quiet.for_good()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"


@pytest.mark.parametrize("there", [False, True])
def test_libtpu_is_told_that_there_is_no_tpu_only_where_there_is_none(tmp_path, monkeypatch, there):
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    monkeypatch.setattr(quiet, "_TPUS", (str(tmp_path / "accel*"),))
    if there:
        (tmp_path / "accel0").touch()
    quiet.for_good()
    assert ("TPU_WORKER_HOSTNAMES" in os.environ) is not there


def test_what_a_cluster_says_of_its_tpu_stays(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t1k-0,t1k-1")
    quiet.absent_tpu()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "t1k-0,t1k-1"
