"""Reading weight files. No torch here: the .pth reader meets a stand-in."""

import json
import os
import pickle
import subprocess
import sys
import types
import urllib.request
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dgkd_jax import torch_port
from dgkd_jax.errors import BadInput
from dgkd_jax.torch_port import files as weight_files


def _safetensors(path, tensors, length=None):
    """The documented format by hand: 8-byte length, JSON header, raw little-endian data."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for entry, (dtype, array) in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[entry] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes((length or len(text)).to_bytes(8, "little") + text + data)
    return path


_TENSORS = {
    "module.half": ("BF16", np.array([1.5, -2.0, 3.25], ml_dtypes.bfloat16)),
    "module.weight": ("F32", np.arange(6, dtype=np.float32).reshape(2, 3)),
    "module.count": ("I64", np.array(4)),
    "module.none": ("F64", np.zeros((0, 3))),
}


def _same(arrays, tensors):
    assert arrays.keys() == {entry.removeprefix("module.") for entry in tensors}
    for entry, (_, array) in tensors.items():
        loaded = arrays[entry.removeprefix("module.")]
        assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(loaded, array)


def test_safetensors_are_read_and_the_module_prefix_dropped(tmp_path):
    _same(torch_port.load(_safetensors(tmp_path / "w.safetensors", _TENSORS)), _TENSORS)


def test_npz_is_read(tmp_path):
    tensors = {entry: tensor for entry, tensor in _TENSORS.items() if tensor[0] != "BF16"}  # unknown to .npz
    np.savez(tmp_path / "w.npz", **{entry: array for entry, (_, array) in tensors.items()})
    _same(torch_port.load(str(tmp_path / "w.npz")), tensors)


def test_prefix_stays_where_only_some_entries_have_it(tmp_path):
    np.savez(tmp_path / "w.npz", **{"module.a": np.zeros(2), "b": np.zeros(2)})
    assert torch_port.load(tmp_path / "w.npz").keys() == {"module.a", "b"}


@pytest.mark.parametrize("kept", [0, 5, 8, 60, -1])
def test_truncated_safetensors_are_refused(tmp_path, kept):
    tensors = {entry: tensor for entry, tensor in _TENSORS.items() if entry != "module.none"}
    path = _safetensors(tmp_path / "w.safetensors", tensors)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match=r"w\.safetensors: not a whole \.safetensors file"):
        torch_port.load(path)


def test_safetensors_of_a_strange_kind_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(BadInput, match="dtype F8_E4M3; readable are F64"):
        torch_port.load(_safetensors(path, {"a": ("F8_E4M3", np.zeros(3, np.uint8))}))
    with pytest.raises(BadInput, match="not a whole"):
        torch_port.load(_safetensors(path, _TENSORS, length=2**60))
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(BadInput, match="not a whole"):
        torch_port.load(path)


@pytest.mark.parametrize("kept", [0, 100, -30])
def test_truncated_npz_is_refused(tmp_path, kept):
    path = tmp_path / "w.npz"
    np.savez(path, a=np.arange(100.0))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BadInput, match=r"w\.npz: not a whole \.npz file"):
        torch_port.load(path)


def test_other_bytes_under_the_name_npz_are_refused(tmp_path):
    (tmp_path / "w.npz").write_bytes(b"neither an archive nor a pickle")
    with pytest.raises(BadInput, match="not a whole"):
        torch_port.load(tmp_path / "w.npz")


def test_npz_with_flipped_bits_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, a=np.arange(100.0))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match="not a whole"):
        torch_port.load(path)


def test_pickled_objects_in_npz_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([{}, None]))
    with pytest.raises(BadInput, match=r"could run any code.*safetensors"):
        torch_port.load(tmp_path / "w.npz")


def test_missing_file_and_unknown_kind_are_said(tmp_path):
    with pytest.raises(BadInput, match=f"no such file.*{tmp_path}"):
        torch_port.load(tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match=r"unknown kind of file; known are \.npz, \.safetensors, \.pth, \.pt"):
        torch_port.load(tmp_path / "w.h5")


class _Tensor:
    def __init__(self, array, dtype="float32"):
        self._array, self.dtype = array, dtype

    def detach(self):
        return self

    def view(self, dtype):
        assert (self.dtype, dtype) == ("bfloat16", "int16")
        return _Tensor(self._array.view(np.int16), dtype)

    def numpy(self):
        if self.dtype in ("bfloat16", "sparse"):
            raise TypeError("no such numpy array")
        return self._array


@pytest.fixture
def load_pth(tmp_path, monkeypatch):
    """load() of a .pth whose content, or whose failure, is given; the stand-in for torch insists on safe loading."""

    def load(content, file="w.pth"):
        def safe_load(path, *, map_location, weights_only):
            assert (map_location, weights_only) == ("cpu", True)
            if isinstance(content, Exception):
                raise content
            return content

        torch = types.ModuleType("torch")
        torch.load, torch.Tensor, torch.bfloat16, torch.int16 = safe_load, _Tensor, "bfloat16", "int16"
        monkeypatch.setitem(sys.modules, "torch", torch)
        path = tmp_path / file
        path.touch()
        return torch_port.load(path)

    return load


_ENTRIES = {"a": _Tensor(np.ones((2, 3), np.float32)), "b": _Tensor(np.array([1.5], ml_dtypes.bfloat16), "bfloat16")}


@pytest.mark.parametrize(
    "content",
    [
        _ENTRIES,
        {"model": _ENTRIES, "epoch": 240, "opt": "SGD"},
        {"state_dict": {f"module.{entry}": tensor for entry, tensor in _ENTRIES.items()}, "best": 72.3},
        {"model": {"state_dict": _ENTRIES}},
        {"state_dict": {"model": _ENTRIES}},
        {"model": {f"module.{entry}": tensor for entry, tensor in _ENTRIES.items()}, "best_acc": _Tensor(np.ones(()))},
        # mdistiller's "latest" and "best": the whole distiller; its extra layers and the teacher are left out
        {
            "epoch": 240,
            "model": {
                **{f"module.student.{entry}": tensor for entry, tensor in _ENTRIES.items()},
                **{f"module.teacher.{entry}": _Tensor(np.zeros(9)) for entry in _ENTRIES},
                "module.conv_reg.weight": _Tensor(np.zeros(9)),
            },
            "optimizer": {"state": {0: {"momentum_buffer": _Tensor(np.ones(3))}}, "param_groups": [{"lr": 0.05}]},
            "best_acc": _Tensor(np.float32(73.1)),
        },
    ],
)
def test_pth_is_unwrapped(load_pth, content):
    arrays = load_pth(content)
    assert arrays.keys() == {"a", "b"}
    np.testing.assert_array_equal(arrays["a"], np.ones((2, 3)))
    assert arrays["b"].dtype == ml_dtypes.bfloat16
    assert arrays["b"][0] == 1.5


def test_a_name_without_suffix_is_read_as_pth(load_pth):
    """mdistiller's student_best."""
    assert load_pth({"model": _ENTRIES}, file="student_best").keys() == {"a", "b"}
    with pytest.raises(BadInput, match=r"student_best: not a whole \.pth file"):
        load_pth(EOFError(), file="student_best")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # the wording of torch 2.13 for a pickled class, and for bytes that are no pickle
        (pickle.UnpicklingError("Weights only load failed. Unsupported global: argparse.Namespace"), "run any code"),
        (pickle.UnpicklingError("Weights only load failed. invalid load key, 'h'."), r"not a whole \.pth file"),
        (RuntimeError("failed finding central directory"), r"not a whole \.pth file"),
        (EOFError(), r"not a whole \.pth file"),
        ({"net": _ENTRIES, "epoch": 3}, "no state_dict.*it holds net, epoch"),
        ([1, 2], "no state_dict.*it holds list"),
        ({"a": _Tensor(np.zeros(2), "sparse")}, "no such numpy array"),
    ],
)
def test_pth_that_cannot_be_used_is_refused(load_pth, content, message):
    with pytest.raises(BadInput, match=message):
        load_pth(content)


def test_pth_without_torch_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch now raises ImportError
    (tmp_path / "w.pt").touch()
    with pytest.raises(BadInput, match=r"python -m pip install 'torch'.*\.safetensors"):
        torch_port.load(tmp_path / "w.pt")


# ----------------------------------------------------------------------------------------------------- huggingface.co


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for huggingface_hub that has two files; returns the list of what was asked of it."""
    asked = []
    _safetensors(tmp_path / "model.safetensors", {"a": ("F32", np.ones(3, np.float32))})
    np.savez(tmp_path / "other.npz", b=np.ones(2))

    def hf_hub_download(*, repo_id, filename, local_files_only):
        asked.append((repo_id, filename, local_files_only))
        path = tmp_path / filename.split("/")[-1]
        if not path.exists():
            raise OSError(f"404 Client Error.\n\nEntry Not Found for {filename}")
        return str(path)

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setattr(weight_files, "resolves", lambda host: host == "huggingface.co")
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    return asked


def test_weights_come_from_the_hub(hub):
    assert torch_port.load("hf:timm/resnet18.a1_in1k").keys() == {"a"}
    assert torch_port.load("hf:me/students/runs/3/other.npz").keys() == {"b"}
    assert hub == [("timm/resnet18.a1_in1k", "model.safetensors", False), ("me/students", "runs/3/other.npz", False)]


@pytest.mark.parametrize(("proxies", "offline"), [({}, True), ({"https": "http://proxy:3128"}, False)])
def test_where_the_hubs_name_is_unknown_only_its_cache_is_asked_unless_a_proxy_knows_it(
    hub, monkeypatch, proxies, offline
):
    monkeypatch.setattr(weight_files, "resolves", lambda host: False)
    monkeypatch.setattr(urllib.request, "getproxies", lambda: proxies)
    assert torch_port.load("hf:me/x").keys() == {"a"}
    assert hub == [("me/x", "model.safetensors", offline)]


def test_what_the_hub_does_not_give_is_said_in_one_line(hub):
    with pytest.raises(BadInput, match=r"^weights hf:me/x/w\.npz: w\.npz is neither in .* \(OSError: 404 .*w\.npz\)$"):
        torch_port.load("hf:me/x/w.npz")
    for name in ("hf:resnet18", "hf:", "hf:/x", "hf:me/", "hf:me/x/"):
        with pytest.raises(BadInput, match=f"weights {name}: .* is written hf:ORG/NAME"):
            torch_port.load(name)


def test_the_hub_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it now raises ImportError
    with pytest.raises(BadInput, match="python -m pip install 'huggingface_hub'"):
        torch_port.load("hf:timm/resnet18.a1_in1k")


def test_the_hub_offline_uses_its_cache_and_nothing_else(tmp_path):
    """The real package, in a process of its own because it reads its variables once."""
    pytest.importorskip("huggingface_hub")
    repository = tmp_path / "hub" / "models--me--student"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    _safetensors(snapshot / "model.safetensors", {"a": ("F32", np.ones(3, np.float32))})
    program = """
from dgkd_jax import errors, torch_port
print(sorted(torch_port.load("hf:me/student")))
try:
    torch_port.load("hf:me/absent")
except errors.BadInput as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()
    assert found == "['a']"
    assert refused.startswith("weights hf:me/absent: model.safetensors is neither in huggingface_hub's cache nor")
    assert "LocalEntryNotFoundError" in refused
