"""What is told of a run's progress, and where."""

import pytest

from dgkd_jax.training.monitor import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def start(**changes):
    arguments = {"start": 0, "total": 100, "steps_per_epoch": 10, "batch_size": 32} | changes
    return progress.ProgressLine("net by kd", **arguments)


def test_a_log_gets_plain_lines_with_epoch_rate_and_time_left(clock, capsys):
    with start() as shown:
        clock[0] += 60  # compiling the first step
        shown.advance(1)
        clock[0] += 4.5
        shown.line(10, "loss 1.0000")
        clock[0] += 2
        shown.line(20, "loss 0.5000")
        clock[0] += 2
        shown.line(100, "loss 0.1000")
    assert capsys.readouterr().err.splitlines() == [
        "net by kd: epoch 1/10, loss 1.0000, 64 images/s, 0:45 left",
        "net by kd: epoch 2/10, loss 0.5000, 160 images/s, 0:16 left",
        "net by kd: epoch 10/10, loss 0.1000, 1,280 images/s",
    ]


def test_between_evaluations_a_log_gets_a_line_at_most_every_half_minute(clock, capsys):
    with start() as shown:
        shown.advance(1)
        for step in range(1, 8):
            clock[0] += 10
            shown.metrics(step, f"step {step}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("step ")[1][0] for line in lines] == ["4"]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_terminal_gets_one_live_line_that_fits(monkeypatch, capsys, columns):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with start() as shown:
        shown._bar.dynamic_ncols = lambda _: (columns, 20)  # what the terminal would say
        for _ in range(100):
            shown.advance(1)
        shown.metrics(100, "loss 0.1000")
        shown._bar.refresh()
        live = capsys.readouterr().err
    frames = [frame for frame in live.split("\r") if "100/100" in frame]
    assert frames[-1].startswith("net by kd: 100 %, step 100/100")
    assert all(len(frame) <= columns for frame in frames)
    assert "left, loss 0.1000" in frames[-1]


def test_on_a_terminal_the_time_left_stands_in_the_live_line_alone(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with start() as shown:
        shown.advance(1)
        clock[0] += 4.5
        shown.line(10, "loss 1.0000")
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "epoch 1/10" in line]
    assert len(told) == 1
    assert "left" not in told[0]


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")])
def test_durations_read_as_a_clock(seconds, shown):
    assert progress.duration(seconds) == shown
