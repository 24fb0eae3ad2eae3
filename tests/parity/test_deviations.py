"""The measured deviations against closed forms, and the command that prints them; no torch."""

import json
import sys

import jax
import numpy as np
import pytest
from scipy import stats

from dgkd_jax.parity import __main__ as command
from dgkd_jax.parity import deviations, deviations_training


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    for name in ("torch", "torchvision", "timm"):
        monkeypatch.setitem(sys.modules, name, None)


def values(rows, **wanted):
    """The values of the rows that have these entries."""
    return [row["value"] for row in rows if all(part in row[key] for key, part in wanted.items())]


def mean_coupling(student, teacher, labels, temperature):
    """G of `per_sample` by numpy in float64."""
    z, v = (np.exp(np.asarray(logits, np.float64) / temperature) for logits in (student, teacher))
    rows = np.arange(len(labels))
    p, q = (x[rows, labels] / x.sum(-1) for x in (z, v))
    for x in (z, v):
        x[rows, labels] = 0.0
    s, t = (x / x.sum(-1, keepdims=True) for x in (z, v))
    rest = (1 + p - q)[:, None] * s - t
    return temperature**2 * np.mean((p - q) ** 2 + (rest**2).sum(-1))


@pytest.mark.parametrize("name", deviations.STUDENTS)
def test_conventions_differ_by_their_closed_factors(name):
    batch, classes = 64, 100
    logits = deviations.random_logits(batch, classes, name)
    shares, guard = deviations.gradient_shares(*logits)
    coupling, scale = mean_coupling(*logits, deviations.TEMPERATURE), batch**2 * classes
    per_epsilon = float(shares["per_sample"]) / 0.1
    # float32 logits and gradients that are themselves sums of a hundred terms
    near = {"rel": 1e-3}
    assert float(shares["literal"]) == pytest.approx(6 * per_epsilon / scale, **near)
    assert float(shares["normalized"]) == pytest.approx(6 * per_epsilon / (coupling + 1e-8 * scale), **near)
    assert float(shares["self_normalized"]) == pytest.approx(0.1 * per_epsilon / coupling, **near)
    assert float(guard) == pytest.approx(coupling / (coupling + 1e-8 * scale), **near)


@pytest.mark.slow
def test_normalized_weakens_with_the_batch_as_its_guard_says():
    measured = values(deviations.batch_dependence(), deviation="normalized")
    coupling = mean_coupling(*deviations.random_logits(64, 100, "unconfident"), deviations.TEMPERATURE)
    expected = np.array([1 / (coupling + 1e-8 * batch**2 * 100) for batch in (16, 64, 256, 4096)])
    np.testing.assert_allclose(np.divide(measured, measured[0]), expected / expected[0], rtol=1e-3)


def test_ramps_are_shifted_by_half_an_epoch():
    rows = deviations.ramps()
    first = {
        form: values(rows, setting=f"{form},", quantity="1st")[0] for form in ("step", "epoch_from_0", "epoch_from_1")
    }
    whole = {form: values(rows, setting=f"{form},", quantity="whole")[0] for form in first}
    assert first == pytest.approx({"step": 390 / 781 / 20, "epoch_from_0": 0.0, "epoch_from_1": 0.05}, rel=1e-5)
    assert whole == pytest.approx(
        {"step": 0.5 - 0.5 / 781 / 20, "epoch_from_0": 0.475, "epoch_from_1": 0.525}, rel=1e-5
    )


def test_milestones():
    measured = values(deviations.milestones(), deviation="milestones")
    early, late = 60 + 1.5 + 0.15 + 0.15, 150 + 3.0 + 0.3 + 0.03
    np.testing.assert_allclose(measured, [early / 240, late / 240], rtol=1e-6)


def test_adamws_first_step_is_the_rate_in_every_entry():
    sgd, adamw = values(deviations.optimizer_step(), deviation="AdamW")
    deviation = np.sqrt(2 / (9 * 64))  # of the weights
    # Random entries: their lengths have a relative spread of 1/√(2·36,864).
    assert adamw == pytest.approx(0.05 / deviation, rel=0.02)
    assert sgd == pytest.approx(0.05 * np.hypot(1e-3, 5e-4 * deviation) / deviation, rel=0.02)


def test_wrapped_noise_is_its_expectation():
    sample, pixel = np.arange(-400, 401)[:, None], np.arange(256)
    for sigma in (10, 25, 50):
        weight = np.diff(stats.norm.cdf(np.arange(-400.5, 401), scale=sigma))
        intended = np.clip(pixel + sample, 0, 255)
        wrong = {"uint8": (pixel + sample) % 256, "wide": np.clip(pixel + sample % 256, 0, 255)}
        for how, wrapped in wrong.items():
            (found,) = values(
                deviations.noise(),
                setting=f"σ = {sigma} grey levels, uniform pixels, added {'in ' if how == 'uint8' else ''}{how}",
            )
            expected = weight @ np.abs(wrapped - intended).mean(1)
            assert found == pytest.approx(expected, rel=0.03)  # 200,000 pixels, of which a few per cent wrap


def test_the_usual_form_breaks_and_ours_does_not():
    rows = deviations.breaking_margins()
    usual, ours = (values(rows, setting=name) for name in ("usual", "ours"))
    assert ours == [None, None]
    # exp(−margin/T) leaves float32 between its smallest normal (e^−87.3) and its smallest number (e^−103.3); the nine
    # other classes add up to log 9 + 0.07 more.
    assert 87 < usual[0] < 106
    assert usual[1] == pytest.approx(4 * usual[0], rel=0.03)


def test_two_passes_move_the_statistics_by_019():
    once, twice = values(deviations_training.twice_per_step(), deviation="WRN")
    assert once == pytest.approx(0.1, rel=1e-5)
    assert twice == pytest.approx(1 - 0.9**2, rel=1e-5)


def test_decay_alone_is_the_momentum_recurrence():
    w, trace = 1.0, 0.0
    for epoch in range(240):
        rate = 0.05 * 0.1 ** sum(epoch >= milestone for milestone in (150, 180, 210))
        for _ in range(10):
            trace = 0.9 * trace + 5e-4 * w
            w -= rate * trace
    # float32 over 2,400 steps
    assert deviations_training.decayed_to(epochs=240, steps_per_epoch=10) == pytest.approx(w, rel=1e-3)


@pytest.mark.slow
def test_frozen_training_keeps_the_statistics_and_moves_the_parameters(monkeypatch):
    monkeypatch.setattr(deviations_training, "EPOCHS", 2)
    images, labels = (part[:2] for part in deviations_training.generated(key=0))
    first, second = deviations_training.train(images, labels, frozen_after=1)
    jax.tree.map(np.testing.assert_array_equal, second["batch_stats"], first["batch_stats"])
    assert deviations_training.statistics_drift(first["batch_stats"], second["batch_stats"]) == (0.0, 0.0)
    assert np.abs(second["params"]["fc"]["kernel"] - first["params"]["fc"]["kernel"]).max() > 0
    usual = deviations_training.train(images, labels)
    assert deviations_training.statistics_drift(usual[0]["batch_stats"], usual[1]["batch_stats"])[0] > 0


@pytest.mark.slow
def test_the_command_prints_and_writes_every_row(tmp_path, monkeypatch, capsys):
    row = deviations.effect("BatchNorm frozen", "a network", "drift", 0.25)
    for name in ("coupling_sizes", "batch_dependence", "breaking_margins", "logit_matching"):
        monkeypatch.setattr(deviations, name, list)
    monkeypatch.setattr(deviations_training, "rows", lambda: [row])
    output = tmp_path / "deviations.json"
    assert command.main(["deviations", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "BatchNorm frozen" in printed
    assert "not measured: " in printed
    assert "passed" not in printed  # no tolerance judges these
    assert row in json.loads(output.read_text())["rows"]
