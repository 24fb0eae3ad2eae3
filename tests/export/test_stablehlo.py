"""The exported StableHLO program: run by JAX alone, on batches of any size, it gives the network's logits."""

import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import student_runs

from dgkd_jax.errors import BadInput
from dgkd_jax.export import __main__ as command
from dgkd_jax.export import stablehlo
from dgkd_jax.export.program import Program

RUN_ALONE = """
import sys
sys.modules["dgkd_jax"] = sys.modules["flax"] = None
import jax, jax.export, numpy as np
program = jax.export.deserialize(bytearray(open("student.stablehlo", "rb").read()))
np.savez("logits.npz", **{name: program.call(images) for name, images in np.load("images.npz").items()})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_shape"),
    [
        ("small_cnn_w8", (28, 28, 1)),
        ("mobilenet_v2_half_cifar", (32, 32, 3)),  # depthwise convolutions
        ("vit_tiny_patch16_224", (48, 48, 3)),  # position embeddings resampled
    ],
)
def test_jax_alone_computes_the_logits_of_the_network(name, image_shape, tmp_path):
    variables = student_runs.write(tmp_path / "run", name, image_shape)
    output = tmp_path / "student.stablehlo"
    assert command.main([f"--workdir={tmp_path / 'run'}", "--format=stablehlo", f"--output={output}"]) == 0
    images = student_runs.images(5, image_shape)
    batches = {"all": images, "one": images[:1]}
    np.savez(tmp_path / "images.npz", **batches)
    subprocess.run([sys.executable, "-c", RUN_ALONE], cwd=tmp_path, check=True, timeout=120)
    network = jax.jit(student_runs.network_of(name, variables, channels=image_shape[-1]).__call__)
    expected = np.asarray(network(images))
    with np.load(tmp_path / "logits.npz") as found:
        for which, given in batches.items():
            assert found[which].dtype == np.float32
            assert found[which].shape == (len(given), 10)
            tolerance = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(found[which], expected[: len(given)], rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "grouped"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_each_platform_has_the_depthwise_convolution_that_is_fast_on_it(platform, grouped, monkeypatch):
    """A sum of shifted images on a CPU, the library's elsewhere."""
    name, image_shape = "mobilenet_v2_half_cifar", (32, 32, 3)
    program = Program(student_runs.network_of(name, student_runs.variables_of(name, image_shape)).__call__, image_shape)
    monkeypatch.setattr(stablehlo, "PLATFORMS", (platform,))
    exported = jax.export.deserialize(bytearray(stablehlo.encode(program)))
    assert exported.platforms == (platform,)
    assert bool(re.search(r"feature_group_count = (?!1\b)\d+", exported.mlir_module())) == grouped


@pytest.mark.wrong_input
def test_a_network_that_needs_the_size_of_its_batch_is_said():
    def logits(images):
        return jnp.mean((images[:8] if images.shape[0] > 8 else images) / 255.0, (1, 2))

    with pytest.raises(BadInput, match="--format=stablehlo: the network does not take batches of any size: "):
        stablehlo.encode(Program(logits, (4, 4, 1)))
