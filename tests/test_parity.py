"""The parity command without torch: against recorded figures, and its mistakes in one line."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from dgkd_jax.parity import __main__ as command
from dgkd_jax.parity import losses, report

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """As if it were not installed, also where it is."""
    for name in ("torch", "torchvision", "timm"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A folder for a few fixtures instead of all of them."""
    monkeypatch.setattr(report, "FIXTURES", tmp_path / "golden")
    (tmp_path / "golden" / "losses").mkdir(parents=True)
    return tmp_path / "golden"


def test_losses_agree_with_the_recorded_figures(recorded, tmp_path, capsys):
    shutil.copy(GOLDEN / "losses" / "b8_c10_t4.npz", recorded / "losses")
    output = tmp_path / "losses.json"
    assert command.main(["losses", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "torch is not installed" in printed
    assert "dgkd normalized" in printed
    content = json.loads(output.read_text())
    assert content["passed"] is True
    assert {row["dtype"] for row in content["rows"]} == {"float64", "float32"}
    assert max(row["gradient error"] or 0.0 for row in content["rows"] if row["dtype"] == "float64") < 1e-12


@pytest.mark.parametrize(("entry", "row"), [("dkd/loss", "dkd"), ("nckd_grad", "nckd closed_form")])
def test_a_figure_that_differs_is_a_miss_and_exit_code_1(recorded, tmp_path, entry, row):
    figures = dict(np.load(GOLDEN / "losses" / "b8_c10_t4.npz"))
    figures[entry] = figures[entry] * 1.01
    np.savez(recorded / "losses" / "wrong.npz", **figures)
    output = tmp_path / "losses.json"
    assert command.main(["losses", f"--output={output}"]) == 1
    missed = {found["loss"] for found in json.loads(output.read_text())["rows"] if not found["passed"]}
    assert row in missed
    assert "ce" not in missed


def test_training_follows_the_recorded_trajectory(tmp_path, capsys):
    output = tmp_path / "training.json"
    assert command.main(["training", "--method=dkd", "--steps=12", f"--output={output}"]) == 0
    assert "torch is not installed" in capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    np.testing.assert_array_equal(
        [row["PyTorch's"] for row in rows], np.load(GOLDEN / "trajectories" / "resnet14_resnet8_dkd.npz")["loss"]
    )
    assert all(row["loss error"] < 1e-8 for row in rows)
    assert rows[-1]["weight drift"] < 1e-8
    assert rows[0]["weight drift"] is None  # only the last step's norm is recorded


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "command"),
        (["lossess"], "lossess"),
        (["losses", "--steps=3"], "--steps"),
        (["training", "--steps=many"], "many"),
        (["training", "--steps=0"], "at least 1"),
        (["training", "--steps=13"], "12 steps are recorded"),
        (["training", "--method=kd"], "nothing is recorded for kd"),
        (["training", "--method=kdd"], "ce, kd, dkd, dgkd"),
        (["training", "--pair=resnet14"], "TEACHER,STUDENT"),
        (["training", "--pair=resnet50,vgg8"], "resnet110"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, said, capsys):
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("arguments", [["losses"], ["training"]])
def test_neither_torch_nor_fixtures_is_said_so(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "FIXTURES", tmp_path / "nowhere")
    assert command.main(arguments) == 2
    assert "neither torch nor the recorded figures" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said_so(recorded, tmp_path, capsys):
    shutil.copy(GOLDEN / "losses" / "b8_c10_t4.npz", recorded / "losses")
    assert command.main(["losses", f"--output={tmp_path}/no/such/folder.json"]) == 2
    assert "--output=" in capsys.readouterr().err


def test_relative_error_takes_nan_for_the_largest_difference():
    assert report.relative_error(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == np.inf
    assert report.relative_error(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25
    assert report.relative_error(np.array([1e-9]), np.array([0.0]), floor=1e-6) == pytest.approx(1e-3)


def test_breaking_margins_are_found_by_bisection():
    def until(last):
        return lambda margin: np.array([0.0, np.nan if margin > last else 1.0])

    found = [losses.first_failure(until(last)) for last in (0, 1, 6, 150, 9_999, 10_000)]
    assert found == [1, 2, 7, 151, 10_000, None]
