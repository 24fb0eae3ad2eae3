"""PyTorch's entries <-> variables."""

import functools
import math

import golden_networks
import jax
import ml_dtypes
import numpy as np
import pytest

from dgkd_jax import models, torch_port
from dgkd_jax.errors import BadInput
from dgkd_jax.models import convnext

# One of each table of entries.
RECORDS = (
    "dgkd_resnet8",
    "dgkd_resnet32x4",
    "torchvision_resnet18",
    "torchvision_resnet50",
    "mdistiller_ResNet50",
    "dgkd_vgg8",
    "dgkd_vgg13_bn",
    "mdistiller_wrn_16_2",
    "mdistiller_ShuffleV1",
    "dgkd_ShuffleV2",
    "torchvision_shufflenet_v2_x1_0",
    "torchvision_mobilenet_v2",
    "mdistiller_MobileNetV2",
    "efficientnet_lite0",
    "timm_vit_tiny_patch16_224",
    "torchvision_convnext_tiny",
)


def _state_dict(fixture="dgkd_resnet8"):
    return golden_networks.state_dict(fixture)


def _resnet8(num_classes=100):
    return models.create("resnet8", num_classes=num_classes)


def _convert(state_dict):
    return torch_port.from_torch(state_dict, _resnet8(), "resnet8")


# ---------------------------------------------------------------------------------------------------------- both ways


def _numbered(shapes):
    """Entries of these shapes, every number in them another one; made quicker than the record's own."""
    first, entries = 0, {}
    for entry, shape in shapes.items():
        if entry.endswith("num_batches_tracked"):
            entries[entry] = np.zeros(shape, np.int64)
        else:
            entries[entry] = np.arange(first, first + math.prod(shape), dtype=np.float64).reshape(shape)
            first += math.prod(shape)
    return entries


@pytest.mark.parametrize("record", RECORDS)
def test_entries_survive_both_ways_exactly(record):
    name, golden = golden_networks.NAMES[record], golden_networks.read(record)
    model = models.create(name, num_classes=len(golden["logits"][0]))
    state_dict = _numbered(golden["state_dict"])
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


@pytest.fixture
def few_names(monkeypatch):
    """Among which a model that fits is looked for, since tracing all of them takes seconds."""
    monkeypatch.setattr(models, "NAMES", ("resnet8", "resnet14", "vgg8"))


@pytest.mark.usefixtures("few_names")
def test_missing_surplus_and_misshapen_entries_are_listed():
    state_dict = _state_dict()
    del state_dict["layer1.0.bn2.running_mean"]
    state_dict["layer9.weight"] = np.zeros(3)
    state_dict["elsewhere.num_batches_tracked"] = np.array(0)  # of no BatchNorm of ours
    state_dict["conv1.weight"] = np.zeros((16, 1, 3, 3))
    with pytest.raises(BadInput) as error:
        _convert(state_dict)
    message = str(error.value)
    assert "missing: layer1.0.bn2.running_mean; " in message
    assert "surplus: layer9.weight, elsewhere.num_batches_tracked; " in message
    assert "wrong shape: conv1.weight is (16, 1, 3, 3), not (16, 3, 3, 3). " in message
    assert "fit no model" in message
    assert "\n" not in message


@pytest.mark.usefixtures("few_names")
def test_long_lists_are_cut_and_counted():
    state_dict = {entry: array for entry, array in _state_dict().items() if not entry.startswith("layer2")}
    with pytest.raises(BadInput, match=r"missing: (\S+, ){4}… \(15 in all\)"):  # 3 kernels, 3 BatchNorms of 4
        _convert(state_dict)


@pytest.mark.slow
def test_the_model_that_would_fit_is_named():
    """Of all that there are, so this is one test: they are traced once."""
    for record, looks_like in [
        ("torchvision_resnet18", "They fit resnet18 with 10 classes"),
        ("mdistiller_ResNet50", "They fit resnet50_cifar with 100 classes"),
        ("dgkd_resnet20", "They fit resnet20 with 100 classes"),
        ("dgkd_ShuffleV2", "They fit shufflenet_v2_cifar with 100 classes"),
        ("timm_vit_32x112", r"They fit no model in dgkd_jax\.models\.NAMES"),
    ]:
        with pytest.raises(BadInput, match=f"{looks_like}\\."):
            _convert(_state_dict(record))


@pytest.mark.usefixtures("few_names")
def test_another_number_of_classes_is_said():
    with pytest.raises(BadInput, match=r"fc\.weight is \(100, 64\), not \(10, 64\)[^$]*They fit resnet8 with 100"):
        torch_port.from_torch(_state_dict(), _resnet8(num_classes=10), "resnet8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", "vgg8", "mobilenet_v2_half_cifar", "convnext_tiny"])
def test_another_number_of_classes_gets_a_fresh_head_only_where_asked(name, monkeypatch):
    monkeypatch.setattr(models, "NAMES", ("resnet14",))  # which would fit is not what this is about
    short = functools.partial(convnext.ConvNeXt, stage_sizes=(1, 1, 1, 1), widths=(8, 16, 24, 32))
    monkeypatch.setitem(models._CONSTRUCTORS, "convnext_tiny", short)
    hundred = models.create(name, num_classes=100)
    state_dict = torch_port.to_torch(models.initialise(hundred, hundred.image_shape, seed=1), hundred, name)
    state_dict = {entry: array for entry, array in state_dict.items() if "num_batches" not in entry}
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
@pytest.mark.usefixtures("few_names")
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
    with pytest.raises(BadInput, match=r"not those of resnet8: missing: batch_stats/bn1/mean, batch_stats/bn1/var"):
        torch_port.to_torch(variables, _resnet8(), "resnet8")
