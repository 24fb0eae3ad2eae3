"""PyTorch's entries <-> variables, and reading weight files. No torch here: the .pth reader meets a stand-in."""

import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from golden import golden_weights

from dgkd_jax import models, torch_port
from dgkd_jax.errors import BadInput

GOLDEN = Path(__file__).parent / "golden" / "models"
FIXTURES = {
    "dgkd_resnet8": "resnet8",
    "dgkd_resnet32x4": "resnet32x4",
    "torchvision_resnet18": "resnet18",
    "torchvision_resnet50": "resnet50",
    "mdistiller_ResNet50": "resnet50_cifar",
    "dgkd_vgg8": "vgg8",
    "dgkd_vgg13_bn": "vgg13_bn",
    "mdistiller_wrn_16_2": "wrn_16_2",
    "mdistiller_ShuffleV1": "shufflenet_v1_cifar",
    "dgkd_ShuffleV2": "shufflenet_v2_cifar",
    "torchvision_shufflenet_v2_x1_0": "shufflenet_v2_x1_0",
    "torchvision_mobilenet_v2": "mobilenet_v2",
    "mdistiller_MobileNetV2": "mobilenet_v2_half_cifar",
    "efficientnet_lite0": "efficientnet_lite0",
    "timm_vit_tiny_patch16_224": "vit_tiny_patch16_224",
    "torchvision_convnext_tiny": "convnext_tiny",
}


def _state_dict(fixture="dgkd_resnet8"):
    return golden_weights.weights(json.loads((GOLDEN / f"{fixture}.json").read_text()))


def _resnet8(num_classes=100):
    return models.create("resnet8", num_classes=num_classes)


def _convert(state_dict):
    return torch_port.from_torch(state_dict, _resnet8(), "resnet8")


# ---------------------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("fixture", FIXTURES)
def test_entries_survive_both_ways_exactly(fixture):
    name, state_dict = FIXTURES[fixture], _state_dict(fixture)
    model = models.create(name, num_classes=10 if fixture.startswith(("torchvision", "timm", "efficient")) else 100)
    back = torch_port.to_torch(torch_port.from_torch(state_dict, model, name), model, name)
    assert back.keys() == state_dict.keys()
    for entry, array in state_dict.items():
        assert back[entry].dtype == array.dtype, entry
        np.testing.assert_array_equal(back[entry], array, err_msg=entry)


@pytest.mark.parametrize(
    "name", ["resnet14", "resnet18_cifar", "small_cnn_w8", "vgg8", "wrn_40_1", "shufflenet_v2_x0_5"]
)
def test_variables_survive_both_ways_exactly(name):
    model = models.create(name, num_classes=5)
    variables = models.initialise(model, model.image_shape, seed=3)
    state_dict = torch_port.to_torch(variables, model, name)
    assert all(array.flags["C_CONTIGUOUS"] for array in state_dict.values())  # writers dump the memory as it lies
    back = torch_port.from_torch(state_dict, model, name)
    jax.tree.map(np.testing.assert_array_equal, back, variables)  # and raises if the trees differ


@pytest.mark.parametrize("name", models.NAMES)
def test_every_model_has_a_table_that_keeps_its_leaves_apart(name):
    model = models.create(name, num_classes=5)
    shapes = models.shapes(model, model.image_shape)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    state_dict = torch_port.to_torch(zeros, model, name)
    counters = [entry for entry in state_dict if entry.endswith(".num_batches_tracked")]
    indices = [entry for entry in state_dict if entry.endswith(".relative_position_index")]  # Swin's other buffer
    assert len(state_dict) - len(counters) - len(indices) == len(jax.tree.leaves(shapes))
    assert len(counters) == len(jax.tree.leaves(shapes.get("batch_stats", {}))) / 2
    assert not any("/" in entry or "kernel" in entry for entry in state_dict)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtypes_are_kept(dtype):
    state_dict = {entry: array.astype(dtype) for entry, array in _state_dict().items()}
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(_convert(state_dict)))


def test_kernels_change_layout_and_vectors_do_not():
    state_dict = _state_dict()
    params = _convert(state_dict)["params"]
    kernel, head = params["layer2_0"]["conv1"]["kernel"], params["fc"]["kernel"]
    assert kernel[2, 0, 5, 7] == state_dict["layer2.0.conv1.weight"][7, 5, 2, 0]
    assert head[11, 42] == state_dict["fc.weight"][42, 11]
    np.testing.assert_array_equal(params["layer2_0"]["downsample_1"]["bias"], state_dict["layer2.0.downsample.1.bias"])


def test_step_counters_may_be_absent_and_come_back_as_zero():
    state_dict = _state_dict()
    for entry in [entry for entry in state_dict if "num_batches_tracked" in entry]:
        del state_dict[entry]
    state_dict["bn1.num_batches_tracked"] = np.array(7)
    back = torch_port.to_torch(_convert(state_dict), _resnet8(), "resnet8")
    counter = back["bn1.num_batches_tracked"]
    assert (counter.dtype, counter.shape, counter.item()) == (np.int64, (), 0)


def test_images_of_another_kind_are_named_by_their_shape():
    model, name = models.create("small_cnn_w8", num_classes=10), "small_cnn_w8"
    variables = models.initialise(model, (32, 32, 3), seed=0)
    with pytest.raises(BadInput, match=r"params/conv1/kernel is \(3, 3, 3, 8\), not \(3, 3, 1, 8\)"):
        torch_port.to_torch(variables, model, name)
    state_dict = torch_port.to_torch(variables, model, name, image_shape=(32, 32, 3))
    back = torch_port.from_torch(state_dict, model, name, image_shape=(32, 32, 3))
    jax.tree.map(np.testing.assert_array_equal, back, variables)


# -------------------------------------------------------------------------------------------------- entries that misfit


def test_missing_surplus_and_misshapen_entries_are_listed():
    state_dict = _state_dict()
    del state_dict["layer1.0.bn2.running_mean"]
    state_dict["layer9.weight"] = np.zeros(3)
    state_dict["elsewhere.num_batches_tracked"] = np.array(0)  # of no BatchNorm of ours
    state_dict["conv1.weight"] = np.zeros((16, 1, 3, 3))
    with pytest.raises(BadInput) as error:
        _convert(state_dict)
    message = str(error.value)
    assert "missing: layer1.0.bn2.running_mean\n" in message
    assert "surplus: layer9.weight, elsewhere.num_batches_tracked\n" in message
    assert "wrong shape: conv1.weight is (16, 1, 3, 3), not (16, 3, 3, 3)\n" in message
    assert "fit no model" in message


def test_long_lists_are_cut_and_counted():
    state_dict = {entry: array for entry, array in _state_dict().items() if not entry.startswith("layer2")}
    with pytest.raises(BadInput, match=r"missing: (\S+, ){4}… \(15 in all\)"):  # 3 kernels, 3 BatchNorms of 4
        _convert(state_dict)


@pytest.mark.parametrize(
    ("fixture", "looks_like"),
    [
        ("torchvision_resnet18", "resnet18 with 10 classes"),
        ("mdistiller_ResNet50", "resnet50_cifar with 100 classes"),
        ("dgkd_resnet20", "resnet20 with 100 classes"),
        ("dgkd_ShuffleV2", "shufflenet_v2_cifar with 100 classes"),
    ],
)
def test_the_model_that_would_fit_is_named(fixture, looks_like):
    with pytest.raises(BadInput, match=f"They fit {looks_like}\\."):
        _convert(_state_dict(fixture))


def test_another_number_of_classes_is_said():
    with pytest.raises(BadInput, match=r"fc\.weight is \(100, 64\), not \(10, 64\)[^$]*They fit resnet8 with 100"):
        torch_port.from_torch(_state_dict(), _resnet8(num_classes=10), "resnet8")


@pytest.mark.parametrize(
    "fixture", ["dgkd_resnet8", "dgkd_vgg8", "mdistiller_MobileNetV2", "torchvision_convnext_tiny"]
)
def test_another_number_of_classes_gets_a_fresh_head_only_where_asked(fixture):
    name, state_dict = FIXTURES[fixture], _state_dict(fixture)
    state_dict = {entry: array.astype(np.float32) for entry, array in state_dict.items() if "num_batches" not in entry}
    model = models.create(name, num_classes=7)
    with pytest.raises(BadInput, match="wrong shape"):
        torch_port.from_torch(state_dict, model, name)
    variables = torch_port.from_torch(state_dict, model, name, replace_head=True)
    initial = models.initialise(model, model.image_shape, seed=0)
    back = torch_port.to_torch(variables, model, name)
    fresh = torch_port.to_torch(initial, model, name)
    changed = [entry for entry in state_dict if back[entry].shape != state_dict[entry].shape]
    assert sorted(back[entry].shape[0] for entry in changed) == [7, 7]  # weight and bias, and nothing else
    for entry in state_dict:
        np.testing.assert_array_equal(back[entry], (fresh if entry in changed else state_dict)[entry], err_msg=entry)


def test_a_head_of_the_right_size_is_kept():
    kept = torch_port.from_torch(_state_dict(), _resnet8(), "resnet8", replace_head=True)
    jax.tree.map(np.testing.assert_array_equal, kept, _convert(_state_dict()))


@pytest.mark.parametrize(
    ("entry", "array"),
    [
        ("fc.weight", np.zeros((100, 32))),  # of other features
        ("fc.bias", np.zeros(99)),  # of another number of classes than its weight
        ("conv1.weight", np.zeros((16, 1, 3, 3))),  # no head
    ],
)
def test_a_fresh_head_mends_nothing_else(entry, array):
    with pytest.raises(BadInput, match=f"wrong shape: .*{entry}"):
        torch_port.from_torch(_state_dict() | {entry: array}, _resnet8(num_classes=7), "resnet8", replace_head=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(value):
    state_dict = _state_dict()
    state_dict["layer3.0.conv2.weight"][1, 2, 0, 0] = value
    with pytest.raises(BadInput, match=r"layer3\.0\.conv2\.weight: 1 of 36864 values"):
        _convert(state_dict)


def test_integer_weights_are_refused():
    with pytest.raises(BadInput, match=r"fc\.bias holds int8"):
        _convert(_state_dict() | {"fc.bias": np.zeros(100, np.int8)})


def test_name_without_a_table_is_refused():
    with pytest.raises(BadInput, match=r"'alexnet' has no table .* dgkd_jax\.models\.NAMES"):
        torch_port.from_torch(_state_dict(), _resnet8(), "alexnet")


def test_variables_of_another_model_are_refused():
    variables = models.initialise(_resnet8(), (32, 32, 3), seed=0)
    del variables["batch_stats"]["bn1"]
    with pytest.raises(BadInput, match=r"not those of resnet8:\n  missing: batch_stats/bn1/mean, batch_stats/bn1/var"):
        torch_port.to_torch(variables, _resnet8(), "resnet8")


# --------------------------------------------------------------------------------------------------------------- files


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

    def hf_hub_download(*, repo_id, filename):
        asked.append((repo_id, filename))
        path = tmp_path / filename.split("/")[-1]
        if not path.exists():
            raise OSError(f"404 Client Error.\n\nEntry Not Found for {filename}")
        return str(path)

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_weights_come_from_the_hub(hub):
    assert torch_port.load("hf:timm/resnet18.a1_in1k").keys() == {"a"}
    assert torch_port.load("hf:me/students/runs/3/other.npz").keys() == {"b"}
    assert hub == [("timm/resnet18.a1_in1k", "model.safetensors"), ("me/students", "runs/3/other.npz")]


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
from dgkd_jax import errors, weight_files
print(sorted(weight_files.load("hf:me/student")))
try:
    weight_files.load("hf:me/absent")
except errors.BadInput as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()
    assert found == "['a']"
    assert refused.startswith("weights hf:me/absent: model.safetensors is neither in huggingface_hub's cache nor")
    assert "LocalEntryNotFoundError" in refused
