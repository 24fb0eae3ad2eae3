"""The exported ONNX model: run by onnxruntime, without JAX, it gives the network's logits; what does not is refused."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import student_runs
from flax import linen

from dgkd_jax.errors import BadInput
from dgkd_jax.export import __main__ as command
from dgkd_jax.export import onnx
from dgkd_jax.export.program import Program

RUN_ALONE = """
import sys
sys.modules["dgkd_jax"] = sys.modules["jax"] = sys.modules["flax"] = None
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("student.onnx", providers=["CPUExecutionProvider"])
(images,), (logits,) = session.get_inputs(), session.get_outputs()
assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)", ["batch", 28, 28, 1])
assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
assert session.get_modelmeta().custom_metadata_map["model"] == "small_cnn_w8"
np.savez("logits.npz", **{name: session.run(None, {"images": x})[0] for name, x in np.load("images.npz").items()})
"""


def test_onnxruntime_without_jax_computes_the_logits_of_the_network(tmp_path, capsys):
    name, image_shape = "small_cnn_w8", (28, 28, 1)
    variables = student_runs.write(tmp_path / "run", name, image_shape)
    output = tmp_path / "student.onnx"
    assert command.main([f"--workdir={tmp_path / 'run'}", "--format=onnx", f"--output={output}"]) == 0
    assert capsys.readouterr().err == ""
    batches = {f"of {count}": student_runs.images(count, image_shape) for count in (1, 64)}
    np.savez(tmp_path / "images.npz", **batches)
    subprocess.run([sys.executable, "-c", RUN_ALONE], cwd=tmp_path, check=True, timeout=120)
    network = student_runs.network_of(name, variables, channels=1)
    with np.load(tmp_path / "logits.npz") as found:
        for which, images in batches.items():
            expected = np.asarray(jax.jit(network.__call__)(images))
            np.testing.assert_allclose(found[which], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
            np.testing.assert_array_equal(found[which].argmax(-1), expected.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "nodes"),
    [
        ("resnet18", 32, {"MaxPool": 1, "Conv": 20}),  # the pool is padded
        ("shufflenet_v1_cifar", 32, {"AveragePool": 3, "Conv": 49}),  # likewise; a depthwise convolution is one node
        ("vit_tiny_patch16_224", 224, {"Gelu": 12}),
    ],
)
def test_other_families_are_converted_layer_by_layer(name, side, nodes, monkeypatch):
    import onnx as library

    monkeypatch.setattr(onnx, "_TOLERANCE", 1e-5)  # `encode` compares the logits itself
    kinds = [node.op_type for node in library.load_from_string(onnx.encode(ours(name, side), {})).graph.node]
    assert {kind: kinds.count(kind) for kind in nodes} == nodes


def ours(name: str, side: int) -> Program:
    image_shape = (side, side, 3)
    return Program(student_runs.network_of(name, student_runs.variables_of(name, image_shape)).__call__, image_shape)


class Own(linen.Module):
    """A network of a user's own, written with Flax's layers, pools given by position."""

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.BatchNorm(use_running_average=True)(linen.Conv(8, (3, 3), strides=2)(x)))
        x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        return linen.Dense(5)(x.reshape(x.shape[0], -1))


def test_a_network_that_is_none_of_ours_is_converted(monkeypatch):
    monkeypatch.setattr(onnx, "_TOLERANCE", 1e-5)
    model = Own()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert onnx.encode(Program(lambda images: model.apply(variables, images / 255.0), (16, 16, 3)), {})


@pytest.mark.wrong_input
def test_an_operation_that_the_converter_does_not_take_is_named():
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)

    def logits(images):
        return jnp.mean(images / 255.0) + jax.pure_callback(lambda: np.ones(3, np.float32), shape)

    for program, operation in (
        (Program(logits, (4, 4, 1)), "'pure_callback'"),
        (ours("vit_tiny_patch16_224", 32), "resize with antialias=True"),  # of the position embeddings
    ):
        with pytest.raises(BadInput, match=f"jax2onnx does not take this network: .*{operation}.* --format=stablehlo"):
            onnx.encode(program, {})


@pytest.mark.wrong_input
def test_a_converter_that_drops_an_option_of_a_layer_is_found_out(monkeypatch):
    """jax2onnx 0.13 to 0.17 compute a pool padded in pixels as one without padding."""
    monkeypatch.setattr(onnx, "_padded_first", lambda pool, fill: pool)

    def logits(images):
        pooled = linen.max_pool(images / 255.0, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        return jnp.sum(pooled, (1, 2))

    with pytest.raises(BadInput, match="jax2onnx changes what this network computes, the logits by 0"):
        onnx.encode(Program(logits, (8, 8, 3)), {})
