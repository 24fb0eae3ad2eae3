"""Time is counted once, for what it was spent on."""

import contextlib

import pytest

from dgkd_jax.training.monitor import timing


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(timing.time, "monotonic", lambda: Clock.now)
    return Clock


def test_parts_add_up_to_the_time_that_passed(clock):
    spent = timing.Timing()
    with spent.measure("init"):
        clock.now += 3
    clock.now += 10  # of nothing else: training
    for seconds in (1, 2):
        with spent.measure("data"):
            clock.now += seconds
    with contextlib.suppress(KeyError), spent.measure("save"):
        clock.now += 4
        raise KeyError  # what fails took its time too
    assert spent.seconds() == {"init": 3, "compile": 0, "data": 3, "training": 10, "save": 4, "evaluation": 0}


def test_a_run_that_goes_on_adds_to_what_it_had_spent(clock):
    spent = timing.Timing()
    clock.now += 5
    spent.go_on_from({"training": 20.0, "save": 2.0})
    assert spent.seconds()["training"] == 25
    assert spent.seconds()["save"] == 2


def test_the_summary_has_seconds_and_shares():
    seconds = dict.fromkeys(timing.PARTS, 0.0) | {"training": 30.0, "compile": 10.0}
    assert "compile 10.0 s (25 %)" in timing.summary(seconds)
    assert "training 30.0 s (75 %)" in timing.summary(seconds)
