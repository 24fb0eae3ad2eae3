"""The command: mistakes are one line and exit code 2 before anything is written, and outputs go where they should."""

import importlib.util
import shutil

import jax
import numpy as np
import pytest
import student_runs
from own_networks import Linen, images_and_labels

from configs import default
from dgkd_jax import torch_port
from dgkd_jax.export import __main__ as command
from dgkd_jax.runs.student import read
from dgkd_jax.torch_port import export as torch_export
from dgkd_jax.training.run import run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """That of a finished run; tests do not write into it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    student_runs.write(folder, "small_cnn_w8", (28, 28, 1))
    return folder


def refused(capsys, *arguments) -> str:
    """The message."""
    code = command.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1), captured
    return captured.err


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format=onxx"], "'onxx' is none of safetensors, stablehlo, onnx, huggingface; did you mean 'onnx'?"),
        ([], "the following arguments are required: --format"),
        (["--format=onnx", "--output=HERE/student.tflite"], "student.tflite: the name must end in .onnx"),
        (["--format=onnx", "--output=HERE/there.onnx"], "there.onnx exists already; give another name, or --overwrite"),
        (["--format=onnx", "--output=HERE/no/s.onnx"], "there is no folder HERE/no; make it first"),
        (["--format=stablehlo", "--output=HERE/folder.stablehlo"], "is a folder; name a file in it"),
        (["--format=huggingface", "--output=HERE/there.onnx"], "is a file, and this format is a folder"),
        (["--format=huggingface", "--output=HERE/folder.stablehlo"], "exists already; give another name"),
        (["--format=safetensors", "--step=7"], "no checkpoint of step 7 in"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, workdir, tmp_path, capsys):
    (tmp_path / "there.onnx").touch()
    (tmp_path / "folder.stablehlo").mkdir()
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.replace("HERE", str(tmp_path)) for argument in arguments]
    assert message.replace("HERE", str(tmp_path)) in refused(capsys, f"--workdir={workdir}", *arguments)
    assert sorted(tmp_path.rglob("*")) == before
    assert not (workdir / "export").exists()


@pytest.mark.wrong_input
def test_no_run_and_no_checkpoint_yet_are_said(workdir, tmp_path, capsys):
    assert "no work directory of a run" in refused(capsys, f"--workdir={tmp_path / 'no'}", "--format=safetensors")
    for file in ("config.json", "student.json"):
        shutil.copy(workdir / file, tmp_path)
    assert "no checkpoint yet" in refused(capsys, f"--workdir={tmp_path}", "--format=safetensors")


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("format", "package", "extra"), [("onnx", "jax2onnx", "onnx"), ("huggingface", "huggingface_hub", "hf")]
)
def test_a_missing_extra_is_said_with_the_command_that_installs_it(
    format, package, extra, workdir, capsys, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    message = refused(capsys, f"--workdir={workdir}", f"--format={format}")
    assert f"--format={format} needs {package}: pip install 'dgkd_jax[{extra}]'" in message


@pytest.mark.wrong_input
@pytest.mark.parametrize("format", command.FORMATS)
def test_weights_that_are_not_finite_are_named_and_not_written(format, workdir, tmp_path, monkeypatch, capsys):
    student = command.read(workdir)
    statistics = student.variables["batch_stats"]["bn2"]
    monkeypatch.setitem(statistics, "var", np.full_like(statistics["var"], np.inf))
    monkeypatch.setattr(command, "read", lambda *_, **__: student)
    output = tmp_path / f"student{command.FORMATS[format].suffix}"
    message = refused(capsys, f"--workdir={workdir}", f"--format={format}", f"--output={output}")
    assert "the student of step 200 is unusable: batch_stats/bn2/var holds NaN or infinite values" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.wrong_input
@pytest.mark.parametrize("format", ["safetensors", "huggingface"])
def test_a_network_without_names_in_pytorch_is_said(format, workdir, monkeypatch, capsys):
    student = command.read(workdir)
    monkeypatch.setattr(command, "read", lambda *_, **__: student)
    monkeypatch.setattr(torch_export.convert, "entry_name", lambda path, name: names.entry_name(path, "mine"))
    names = importlib.import_module("dgkd_jax.torch_port.names")
    assert "model 'mine' has no table of PyTorch names" in refused(capsys, f"--workdir={workdir}", f"--format={format}")


def test_weights_are_those_of_the_checkpoint_in_pytorchs_names(workdir, tmp_path, capsys):
    output = tmp_path / "student.safetensors"
    assert command.main([f"--workdir={workdir}", "--format=safetensors", f"--output={output}"]) == 0
    assert capsys.readouterr().out == (
        f"{output}: small_cnn_w8 by dkd at step 200 (accuracy 62.50 % on mnist5k), images of 28x28x1, 10 classes, "
        f"{output.stat().st_size / 1e3:.1f} kB\n"
    )
    model = command.read(workdir).model
    found = torch_port.from_torch(torch_port.load(output), model, "small_cnn_w8", image_shape=(28, 28, 1))
    jax.tree.map(np.testing.assert_array_equal, found, command.read(workdir).variables)


@pytest.mark.parametrize(("format", "name"), [("stablehlo", "student.stablehlo"), ("huggingface", "huggingface")])
def test_without_a_name_it_lies_in_the_work_directory_and_is_replaced_only_if_asked(format, name, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    arguments = [f"--workdir={tmp_path / 'run'}", f"--format={format}"]
    output = tmp_path / "run" / "export" / name
    assert command.main(arguments) == 0
    assert output.exists()
    before = output.stat().st_mtime_ns if output.is_file() else (output / "README.md").stat().st_mtime_ns
    assert command.main(arguments) == 2
    assert command.main([*arguments, "--overwrite"]) == 0
    assert (output.stat() if output.is_file() else (output / "README.md").stat()).st_mtime_ns > before


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The work directory of a student that is named by an import path."""
    folder = tmp_path_factory.mktemp("own") / "run"
    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "method": "ce", "student.model": "own_networks:Linen", "data.name": "own_networks:splits", "epochs": 1,
            "batch_size": 16,
        }
    )  # fmt: skip
    run(config, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stablehlo", "onnx", "safetensors"])
def test_a_users_own_network_leaves_with_its_logits(own, kind, tmp_path):
    output = tmp_path / f"student.{kind}"
    assert command.main([f"--workdir={own}", f"--format={kind}", f"--output={output}"]) == 0
    student = read(own)
    images, _ = images_and_labels(5, seed=3)
    mean, std = (np.array(student.about[name], np.float32) for name in ("mean", "std"))
    variables = {"params": student.variables["params"], **student.variables["batch_stats"]}
    expected = Linen().apply(variables, (images / np.float32(255) - mean) / std)
    if kind == "stablehlo":
        found = jax.export.deserialize(bytearray(output.read_bytes())).call(images)
    elif kind == "onnx":
        import onnxruntime  # takes a second

        found = onnxruntime.InferenceSession(output.read_bytes()).run(None, {"images": images})[0]
    else:
        arrays = torch_port.load(output)
        kernel = student.variables["params"]["Dense_0"]["kernel"]
        np.testing.assert_array_equal(arrays["params/Dense_0/kernel"], kernel)
        return
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.wrong_input
def test_a_users_own_network_has_no_folder_for_the_hub(own, capsys):
    error = refused(capsys, f"--workdir={own}", "--format=huggingface")
    assert "and own_networks:Linen is none; take safetensors or stablehlo" in error
