"""The parity command without torch: against recorded figures, and its mistakes in one line."""

import functools
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from dgkd_jax import models, torch_port
from dgkd_jax.models import convnext
from dgkd_jax.parity import __main__ as command
from dgkd_jax.parity import findings, losses, model
from dgkd_jax.torch_port import files as weight_files
from dgkd_jax.torch_port import names as torch_names

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """As if it were not installed, also where it is."""
    for name in ("torch", "torchvision", "timm"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A folder for a few fixtures instead of all of them."""
    monkeypatch.setattr(findings, "FIXTURES", tmp_path / "golden")
    for name in ("losses", "peers"):
        (tmp_path / "golden" / name).mkdir(parents=True)
    return tmp_path / "golden"


@pytest.mark.slow
def test_losses_agree_with_the_recorded_figures(recorded, tmp_path, capsys):
    for name in ("losses", "peers"):
        shutil.copy(GOLDEN / name / "b8_c10_t4.npz", recorded / name)
    output = tmp_path / "losses.json"
    assert command.main(["losses", f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "torch is not installed" in printed
    assert "dgkd normalized" in printed
    assert set(losses.PEERS) <= {word.strip() for line in printed.splitlines() for word in re.split(r" {2,}", line)}
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


@pytest.mark.slow
def test_a_figure_of_a_peer_that_differs_is_a_miss(recorded, tmp_path):
    figures = dict(np.load(GOLDEN / "peers" / "b8_c10_t4.npz"))
    figures["nkd_t3/grad"] = figures["nkd_t3/grad"] * 1.01
    np.savez(recorded / "peers" / "b8_wrong.npz", **figures)
    output = tmp_path / "losses.json"
    assert command.main(["losses", f"--output={output}"]) == 1
    missed = [found for found in json.loads(output.read_text())["rows"] if not found["passed"]]
    assert {(found["loss"], found["T"]) for found in missed} == {("nkd", 3.0)}


@pytest.mark.slow
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


@pytest.mark.parametrize(("name", "dtype", "tolerance"), [("resnet8", "float64", 1e-10), ("vgg8", "float32", 1e-4)])
def test_logits_of_a_network_agree_with_the_record(name, dtype, tolerance, tmp_path, capsys):
    output = tmp_path / "model.json"
    assert command.main(["model", f"--name={name}", f"--dtype={dtype}", f"--output={output}"]) == 0
    assert "torch is not installed: these are recorded logits" in capsys.readouterr().out
    [row] = json.loads(output.read_text())["rows"]
    assert row["recorded in"] == f"dgkd_{name}.json"
    assert 0 < row["relative"] < tolerance == row["tolerance"]


def test_logits_that_differ_from_the_record_are_a_miss(recorded, capsys):
    (recorded / "models").mkdir()
    fixture = json.loads((GOLDEN / "models" / "dgkd_resnet8.json").read_text())
    fixture["logits"][1][3] += 1e-8 * np.abs(fixture["logits"]).max()
    (recorded / "models" / "changed.json").write_text(json.dumps(fixture))
    assert command.main(["model", "--name=resnet8"]) == 1
    assert "changed.json" in capsys.readouterr().out


def test_the_first_layer_that_differs_is_named(monkeypatch, tmp_path, capsys):
    """Against a stand-in for PyTorch that returns our own outputs, channels first, one layer and all after it wrong."""
    given = {}

    def outputs(module, images, names):
        captured = model._our_outputs(given["model"], given["variables"], images, "float64")
        theirs = {}
        for layer in ("conv1", "bn1", "layer1_0/conv1", "layer1_0/bn1", "layer1_0", "fc", ""):
            array = np.asarray(captured[layer])
            wrong = 1e-6 if layer in ("layer1_0/bn1", "layer1_0", "fc", "") else 0.0
            theirs[layer.replace("_0", ".0").replace("/", ".")] = np.moveaxis(array, -1, 1) * (1 + wrong)
        assert set(theirs) <= set(names)
        return theirs

    def create(name, created, *, side):
        given["model"] = created
        return types.SimpleNamespace(source="a stand-in", entry=lambda path: torch_names.entry_name(path, name))

    def fill(network, entries, dtype):
        given["variables"] = torch_port.from_torch(entries, given["model"], "resnet8")

    stand_in = types.SimpleNamespace(create=create, fill=fill, outputs=outputs, NotHere=LookupError)
    monkeypatch.setattr(command, "_torch_side", lambda module: stand_in)
    output = tmp_path / "model.json"
    assert command.main(["model", "--name=resnet8", f"--output={output}"]) == 1
    out = capsys.readouterr().out
    assert "the first layer that differs: layer1_0/bn1, in PyTorch layer1.0.bn1, by 1e-06 relative" in out
    assert "(the one before, layer1_0/conv1, agrees)" in out
    rows = json.loads(output.read_text())["rows"]
    assert [row["passed"] for row in rows] == [True] * 3 + [False] * 4
    assert rows[0]["shape"] == "2x32x32x16"


def test_random_weights_depend_on_the_seed_alone_and_hide_no_statistic():
    network = models.create("resnet8", num_classes=10)
    first, again, other = (model._random_entries(network, "resnet8", seed) for seed in (1, 1, 2))
    for entry, array in first.items():
        np.testing.assert_array_equal(array, again[entry])
        assert not np.array_equal(array, other[entry]), entry
        assert np.std(array) > 0, entry
        assert "running_var" not in entry or array.min() >= 1


def _weight_file(path, *, name="resnet8", classes=10, change=None):
    network = models.create(name, num_classes=classes)
    entries = model._random_entries(network, name, 0)
    if change:
        change(entries)
    content = weight_files.encode(entries, {}, suffix=".safetensors")
    path.write_bytes(content)
    return path


def _not_finite(value):
    def change(entries):
        entries["layer2.0.bn1.running_var"][3] = value

    return change


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"change": _not_finite(np.nan)}, "entry layer2.0.bn1.running_var: 1 of 32 values are NaN or infinite"),
        ({"change": _not_finite(np.inf)}, "entry layer2.0.bn1.running_var: 1 of 32 values are NaN or infinite"),
        ({"name": "resnet14"}, "They fit resnet14 with 10 classes."),
        ({"name": "vgg8"}, "no head of resnet8 (fc.bias, fc.weight). They fit vgg8 with 10 classes."),
        ({"classes": 100}, "fc.weight is (100, 64), not (10, 64). They fit resnet8 with 100 classes."),
    ],
)
def test_weights_that_cannot_be_used_are_one_line_and_exit_code_2(settings, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "NAMES", ("resnet8", "resnet14", "vgg8"))  # tracing all of them takes seconds
    path = _weight_file(tmp_path / "w.safetensors", **settings)
    classes = ["--num_classes=10"] if "classes" in settings else []
    assert command.main(["model", "--name=resnet8", f"--weights={path}", *classes]) == 2
    error = capsys.readouterr().err
    assert f"weights {path}: " in error
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.wrong_input
def test_a_weight_file_that_is_cut_off_or_absent_is_one_line_and_exit_code_2(tmp_path, capsys):
    path = _weight_file(tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    for wrong, said in ((path, "not a whole .safetensors file"), (tmp_path / "none.npz", "no such file")):
        assert command.main(["model", "--name=resnet8", f"--weights={wrong}"]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_weights_that_fit_are_said_to_be_uncompared_without_torch(tmp_path, capsys):
    path = _weight_file(tmp_path / "w.safetensors", classes=7)
    assert command.main(["model", "--name=resnet8", f"--weights={path}"]) == 0
    assert f"{path} was read and fits resnet8, but there is nothing to run it in" in capsys.readouterr().out


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model"], "--name"),
        (["model", "--name=resnet21"], "did you mean 'resnet"),
        (["model", "--name=resnet8", "--num_classes=0"], "num_classes must be at least 1"),
        (["model", "--name=resnet8", "--image_size=0"], "--image_size=0: at least 1"),
        (["model", "--name=vgg8", "--image_size=7"], "each side must have at least 8 pixels"),
        (["model", "--name=vit_tiny_patch16_224", "--image_size=50"], "multiples of 16"),
        (["model", "--name=resnet8", "--dtype=float16"], "one of float64, float32"),
        (["model", "--name=resnet8", "--seed=-1"], "--seed=-1: at least 0"),
        (["model", "--name=vgg11"], "no logits of vgg11 are recorded"),
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


@pytest.mark.wrong_input
def test_images_of_which_nothing_is_left_are_refused_with_the_layer(monkeypatch, capsys):
    small = functools.partial(convnext.ConvNeXt, stage_sizes=(1, 1, 1, 1), widths=(2, 2, 2, 2))
    monkeypatch.setitem(models._CONSTRUCTORS, "convnext_tiny", small)
    assert command.main(["model", "--name=convnext_tiny", "--image_size=16"]) == 2
    error = capsys.readouterr().err
    assert "nothing is left of such images in features_6_1" in error
    assert error.count("\n") == 1


@pytest.mark.wrong_input
@pytest.mark.parametrize("arguments", [["losses"], ["training"], ["model", "--name=resnet8"]])
def test_neither_torch_nor_fixtures_is_said_so(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(findings, "FIXTURES", tmp_path / "nowhere")
    assert command.main(arguments) == 2
    assert "neither torch nor the recorded figures" in capsys.readouterr().err


@pytest.mark.wrong_input
def test_an_output_that_cannot_be_written_is_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(losses, "run", lambda _: findings.Report("losses", "nothing", [], [], []))
    assert command.main(["losses", f"--output={tmp_path}/no/such/folder.json"]) == 2
    assert "--output=" in capsys.readouterr().err


def test_relative_error_takes_nan_for_the_largest_difference():
    assert findings.relative_error(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == np.inf
    assert findings.relative_error(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25
    assert findings.relative_error(np.array([1e-9]), np.array([0.0]), floor=1e-6) == pytest.approx(1e-3)


def test_breaking_margins_are_found_by_bisection():
    def until(last):
        return lambda margin: np.array([0.0, np.nan if margin > last else 1.0])

    found = [losses.first_failure(until(last)) for last in (0, 1, 6, 150, 9_999, 10_000)]
    assert found == [1, 2, 7, 151, 10_000, None]
