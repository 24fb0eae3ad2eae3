"""The parity command against the PyTorch that is installed."""

import json

import pytest
import torch

from dgkd_jax.parity import __main__ as command
from dgkd_jax.parity import losses, torch_reference


def test_losses_agree_on_random_logits():
    found = losses.run(
        torch_reference,
        shapes=((8, 2), (16, 100)),
        temperatures=(1.0, 4.0),
        scales=(1.0, 9.0),
        dtypes=("float64", "bfloat16"),
    )
    assert found.passed, [row for row in found.rows if not row["passed"]]
    assert found.reference == f"torch {torch.__version__}"
    compared = {row["loss"] for row in found.shown}
    assert {"ce", "kd", "tckd", "nckd", "dkd", "logit_mse", "tckd closed_form", "nckd autodiff"} < compared
    for convention in ("per_sample", "literal", "normalized", "self_normalized"):
        assert {f"coupling {convention}", f"dgkd {convention}"} < compared


def test_the_usual_form_breaks_where_its_probabilities_underflow():
    """float32 ends at 2^-149, e^-103.3: there the log of a probability is infinite, at T times that margin."""
    rows = {
        (row["T"], row["loss"]): row
        for row in losses.breaking_points(torch_reference)
        if row["side"] == "student wrong"
    }
    for temperature in (1.0, 4.0):
        tckd, dgkd = rows[temperature, "tckd"], rows[temperature, "dgkd per_sample"]
        assert abs(tckd["value from"] - 103.3 * temperature) < 2 * temperature
        # The squares of the second derivative underflow at half the exponent.
        assert dgkd["gradient from"] < 0.5 * tckd["value from"]
        assert tckd["passed"]
        assert dgkd["passed"]


@pytest.mark.parametrize("method", ["kd", "dgkd"])
def test_training_in_both_frameworks_stays_together(method, tmp_path, monkeypatch):
    # Of the conventions two, since each is compiled twice: the default, and the one of the PyTorch repository.
    monkeypatch.setattr(losses.losses, "CONVENTIONS", ("per_sample", "normalized"))
    output = tmp_path / "training.json"
    assert command.main(["training", f"--method={method}", "--steps=4", f"--output={output}"]) == 0
    rows = json.loads(output.read_text())["rows"]
    conventions = 2 if method == "dgkd" else 1
    assert len(rows) == conventions * 2 * 4
    assert all(row["weight drift"] < 1e-10 for row in rows if row["dtype"] == "float64")


def test_training_sees_another_temperature(monkeypatch, capsys):
    """The comparison fails when one side computes something else."""
    terms = torch_reference.loss_terms
    monkeypatch.setattr(torch_reference, "loss_terms", lambda z, v, y, temperature: terms(z, v, y, temperature + 0.01))
    assert command.main(["training", "--method=kd", "--steps=1"]) == 1
    assert "NO" in capsys.readouterr().out
