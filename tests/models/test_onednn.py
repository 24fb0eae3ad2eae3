"""oneDNN's convolutions (the extra `onednn`) against float64, and that XLA's are used wherever oneDNN's cannot be."""

from functools import partial
from importlib import metadata

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from bits import digests
from jax.sharding import PartitionSpec as P
from small_runs import Asked, small

from dgkd_jax import models
from dgkd_jax.data.open import open_source
from dgkd_jax.errors import Preempted
from dgkd_jax.models import layers
from dgkd_jax.models.cpu_convolution import by_library
from dgkd_jax.models.onednn import convolution as onednn
from dgkd_jax.models.onednn import library
from dgkd_jax.runs import sharding
from dgkd_jax.training import loop

needs_onednn = pytest.mark.skipif(
    library.find() is None, reason=library.status() or "not installed: pip install -e '.[onednn]'"
)
ONE, ASYMMETRIC = ((1, 1), (1, 1)), ((0, 2), (1, 0))
# Together they have every dense convolution of all networks, but for the sides of large images; and the images' sides.
NETWORKS = {
    "resnet8": 32, "resnet8x4": 32, "resnet18": 64, "resnet50": 64, "resnet18_cifar": 32, "resnet50_cifar": 32,
    "vgg8": 32, "wrn_16_2": 32, "shufflenet_v1_cifar": 32, "shufflenet_v2_x0_5": 64, "shufflenet_v2_x1_0": 64,
    "mobilenet_v2": 64, "mobilenet_v2_half_cifar": 32,
    "efficientnet_lite0": 64, "vit_tiny_patch16_224": 64, "vit_small_patch16_224": 64, "convnext_tiny": 64,
    "small_cnn_w4": 32, "small_cnn_w8": 32, "small_cnn_w24": 32,
}  # fmt: skip


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def all_three(function, x, kernel):
    """Output, input gradient and kernel gradient, for a gradient of the output that is the same for all."""
    y, pull_back = jax.vjp(function, x, kernel)
    return y, *pull_back(numbers(*y.shape, seed=1).astype(y.dtype))


def exactly(x, kernel, *, stride, padding):
    """The same three by numpy in float64, as sums over the kernel's positions; and how many products each sums."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    framed = np.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((framed.shape[1 + axis] - kernel.shape[axis]) // stride + 1 for axis in (0, 1))
    gradient = np.asarray(numbers(len(x), height, width, kernel.shape[3], seed=1), np.float64)
    pulled = gradient.reshape(-1, kernel.shape[3])
    of_framed, of_kernel, y = np.zeros_like(framed), np.zeros_like(kernel), np.zeros_like(pulled)
    for row, column in np.ndindex(kernel.shape[:2]):
        window = np.s_[:, row : row + stride * height : stride, column : column + stride * width : stride]
        seen = framed[window].reshape(-1, kernel.shape[2])
        y += seen @ kernel[row, column]
        of_framed[window] += (pulled @ kernel[row, column].T).reshape(*gradient.shape[:3], -1)
        of_kernel[row, column] = seen.T @ pulled
    (top, _), (left, _) = padding
    of_x = of_framed[:, top : top + x.shape[1], left : left + x.shape[2]]
    products = (kernel[..., 0].size, kernel[:, :, 0].size, gradient[..., 0].size)
    return (y.reshape(gradient.shape), of_x, of_kernel), products


def error(found, expected):
    """The largest, relative to the largest number."""
    largest = np.abs(expected).max() or 1.0
    return np.abs(np.asarray(found, np.float64) - np.asarray(expected, np.float64)).max() / largest


def assert_exact(x, kernel, *, stride, padding):
    assert onednn.takes(x, kernel, padding=padding, groups=1)
    found = jax.jit(partial(all_three, partial(onednn.convolution, stride=stride, padding=padding)))(x, kernel)
    for one, other, products in zip(found, *exactly(x, kernel, stride=stride, padding=padding), strict=True):
        assert one.shape == other.shape
        # So many rounding errors of 2⁻²⁴ add up like the steps of a random walk; at most twice that.
        assert error(one, other) <= 2**-23 * products**0.5


@pytest.mark.slow
@needs_onednn
def test_each_dense_convolution_of_the_networks(monkeypatch):
    found = {}

    def note(x, kernel, *, stride, padding):
        # To a 1×1 kernel all pixels are alike.
        sides = (8, 8) if kernel.shape[:2] == (1, 1) else x.shape[1:3]
        found[(*sides, x.shape[3]), kernel.shape, stride, padding] = None
        return by_library(x, kernel, stride=stride, padding=padding, groups=1)

    with monkeypatch.context() as context:
        context.setattr(onednn, "convolution", note)
        for name, side in NETWORKS.items():
            models.shapes(models.create(name, num_classes=2), (side, side, 3))
    assert len(found) == 135
    for images, kernel, stride, padding in found:
        assert_exact(numbers(2, *images), numbers(*kernel, seed=2), stride=stride, padding=padding)


@needs_onednn
@pytest.mark.parametrize("batch", [1, 7, 37, 48, 64])  # one piece, and several
@pytest.mark.parametrize(("stride", "padding"), [(1, ASYMMETRIC), (2, ASYMMETRIC), (3, ((0, 0), (3, 2)))])
def test_any_batch_stride_and_padding(batch, stride, padding):
    assert_exact(numbers(batch, 17, 14, 5), numbers(3, 2, 5, 9, seed=2), stride=stride, padding=padding)


@pytest.mark.slow
@needs_onednn
def test_random_shapes():
    random = np.random.default_rng(0)
    for _ in range(40):
        batch, height, width, channels, features, stride = random.integers(1, (5, 12, 12, 40, 40, 4))
        padding = tuple(tuple(map(int, pair)) for pair in random.integers(0, 4, (2, 2)))
        sides = (
            random.integers(1, min(6, 1 + size + sum(pair)))
            for size, pair in zip((height, width), padding, strict=True)
        )
        kernel = numbers(*sides, channels, features, seed=2)
        assert_exact(numbers(batch, height, width, channels), kernel, stride=int(stride), padding=padding)


@pytest.mark.skipif(
    library.find() is None or not library.find().takes_bfloat16, reason="oneDNN has no bfloat16 on this processor"
)
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_is_summed_in_float32(stride):
    x, kernel = (array.astype(jnp.bfloat16) for array in (numbers(8, 16, 16, 32), numbers(3, 3, 32, 16, seed=2)))
    gradient = numbers(8, 16 // stride, 16 // stride, 16, seed=1).astype(jnp.bfloat16)
    wide = [array.astype(jnp.float32) for array in (x, kernel, gradient)]
    y, pull_back = jax.vjp(partial(onednn.convolution, stride=stride, padding=ONE), x, kernel)
    expected, pull_exactly = jax.vjp(partial(by_library, stride=stride, padding=ONE, groups=1), *wide[:2])
    for one, other in zip((y, *pull_back(gradient)), (expected, *pull_exactly(wide[2])), strict=True):
        assert one.dtype == jnp.bfloat16
        # Rounded once, at the end, to 8 bits; the sums differ by some 1e-6 before.
        np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=2**-8, atol=1e-5 * np.abs(other).max())


@pytest.mark.slow
@needs_onednn
def test_every_derivative_is_xlas():
    x, kernel, direction = numbers(3, 6, 5, 3), numbers(3, 3, 3, 4, seed=2), numbers(3, 3, 3, 4, seed=3)

    def derivatives(form):
        def loss(x, kernel):
            return jnp.sum(jnp.tanh(0.1 * form(x, kernel)))

        of_kernel = jax.grad(loss, 1)
        return (
            jax.jvp(form, (x, kernel), (x[::-1], direction))[1],
            jax.jacfwd(lambda kernel: form(x[:1], kernel))(kernel),
            jax.jvp(partial(of_kernel, x), (kernel,), (direction,))[1],  # forward over reverse
            jax.grad(lambda x: jnp.sum(of_kernel(x, kernel) * direction))(x),  # reverse over reverse
            jax.grad(lambda kernel: jnp.sum(jax.grad(loss)(x, kernel) * x))(kernel),
            jax.vmap(lambda x: of_kernel(x[None], kernel))(x),  # of each image
            jax.vmap(form, (None, 0))(x, jnp.stack([kernel, direction])),
            jax.vmap(jax.vjp(form, x, kernel)[1])(jnp.stack([form(x, kernel), form(x, direction)])),
            jax.checkpoint(loss)(x, kernel),
            jax.lax.map(lambda image: form(image[None], kernel), x),
        )

    ours = partial(onednn.convolution, stride=2, padding=ONE)
    found, expected = (
        jax.jit(partial(derivatives, ours))(),
        derivatives(partial(by_library, stride=2, padding=ONE, groups=1)),
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(one, other) < 2e-6
    assert "onednn_convolution" in str(jax.make_jaxpr(jax.grad(lambda k: jnp.sum(jnp.sin(ours(x, k)))))(kernel))


@needs_onednn
@pytest.mark.parametrize("fsdp", [1, 2])
@pytest.mark.parametrize(("stride", "padding"), [(1, ONE), (2, ASYMMETRIC)])
def test_a_sharded_batch_is_summed_once_and_never_gathered(stride, padding, fsdp):
    mesh = sharding.make_mesh(fsdp=fsdp)
    x, kernel = numbers(16, 9, 8, 6), numbers(3, 3, 6, 4, seed=2)

    def compute(x, kernel):
        return all_three(partial(onednn.convolution, stride=stride, padding=padding), x, kernel)

    over, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    arrays = jax.device_put(x, over), jax.device_put(kernel, whole)
    program = jax.jit(compute, out_shardings=(over, over, whole)).lower(*arrays).compile()
    text = program.as_text()
    assert text.count(f'custom_call_target="{"dgkd_convolve_" + library.find().key}"') == 3
    assert text.count("all-reduce(") + text.count("all-reduce-start(") == 1
    for other in ("all-gather", "all-to-all", "collective-permute"):
        assert other not in text
    expected, products = exactly(x, kernel, stride=stride, padding=padding)
    for one, other, count in zip(program(*arrays), expected, products, strict=True):
        assert error(one, other) <= 2**-23 * count**0.5


@needs_onednn
def test_a_batch_that_the_devices_do_not_divide_is_computed_whole():
    x, kernel = numbers(3, 9, 8, 6), numbers(3, 3, 6, 4, seed=2)
    arrays = jax.device_put((x, kernel), sharding.replicated(sharding.make_mesh()))
    compute = jax.jit(partial(all_three, partial(onednn.convolution, stride=1, padding=ONE)))
    for one, other in zip(compute(*arrays), exactly(x, kernel, stride=1, padding=ONE)[0], strict=True):
        assert error(one, other) < 2e-6


BITS = """
import hashlib, jax, numpy as np
from functools import partial
from dgkd_jax.models.onednn.convolution import convolution
random, digest = np.random.default_rng(0), hashlib.sha256()
for batch, side, channels in ((48, 24, 16), (64, 8, 64)):
    shapes = (batch, side, side, channels), (3, 3, channels, 32), (batch, side, side, 32)
    *arrays, gradient = (random.standard_normal(shape, np.float32) for shape in shapes)
    function = partial(convolution, stride=1, padding=((1, 1), (1, 1)))
    program = jax.jit(lambda *arrays: (lambda y, pull_back: (y, *pull_back(gradient)))(*jax.vjp(function, *arrays)))
    found = [b"".join(array.tobytes() for array in map(np.asarray, program(*arrays))) for _ in range(5)]
    assert len(set(found)) == 1
    digest.update(found[0])
print(digest.hexdigest())
"""


@pytest.mark.slow
@needs_onednn
def test_the_bits_depend_neither_on_the_number_of_threads_nor_on_the_run():
    assert len(digests(BITS)) == 1


# ------------------------------------------------------------------------------------------------------ XLA's instead


def program_of(x, kernel, *, groups=1, padding=1, dtype=jnp.float32):
    module = layers.Conv(kernel.shape[3], kernel.shape[0], 1, padding, groups, dtype=dtype)
    return lambda x, kernel: module.apply({"params": {"kernel": kernel}}, x)


@needs_onednn
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": jnp.float16},
        {"dtype": jnp.float64},
        {"groups": 2},
        {"padding": ((-1, 1), (1, 1))},
        {"x": numbers(0, 9, 8, 6)},
    ],
    ids=str,
)
def test_what_onednn_does_not_take_is_xlas(change):
    change = dict(change)
    x, kernel = change.pop("x", numbers(4, 9, 8, 6)), numbers(3, 3, 6 // change.get("groups", 1), 4)
    with jax.enable_x64(change.get("dtype") == jnp.float64):
        assert "conv_general_dilated" in str(jax.make_jaxpr(program_of(x, kernel, **change))(x, kernel))
    assert "onednn_convolution" in str(
        jax.make_jaxpr(program_of(numbers(4, 9, 8, 6), numbers(3, 3, 6, 4)))(numbers(4, 9, 8, 6), numbers(3, 3, 6, 4))
    )


@needs_onednn
@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda", "tpu")])
def test_an_exported_program_has_xlas_convolution(platforms):
    x, kernel = numbers(4, 9, 8, 6), numbers(3, 3, 6, 4)
    gradient = jax.jit(lambda x, kernel: all_three(program_of(x, kernel), x, kernel))
    exported = jax.export.export(gradient, platforms=platforms)(x, kernel)
    assert "dgkd_convolve" not in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize())
    for one, other in zip(again.call(x, kernel), gradient(x, kernel), strict=True):
        assert error(one, other) < 2e-6
    (batch,) = jax.export.symbolic_shape("batch")
    open_batch = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    jax.export.export(jax.jit(program_of(x, kernel)), platforms=platforms)(open_batch, kernel)
    assert "dgkd_convolve" not in gradient.trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()


@needs_onednn
@pytest.mark.parametrize("check_vma", [True, False])
def test_within_a_shard_map_it_is_xlas(check_vma):
    x, kernel, mesh = numbers(8, 9, 8, 6), numbers(3, 3, 6, 4), sharding.make_mesh()
    form, batch = program_of(x, kernel), P(mesh.axis_names)
    mapped = jax.shard_map(form, mesh=mesh, in_specs=(batch, P()), out_specs=batch, check_vma=check_vma)
    assert "onednn_convolution" not in str(jax.make_jaxpr(mapped)(x, kernel))
    assert error(jax.jit(mapped)(x, kernel), form(x, kernel)) < 2e-6


@needs_onednn
@pytest.mark.parametrize(
    "wrong",
    [
        {"first": np.zeros((2, 5, 5, 3), np.float16)},
        {"first": np.zeros((2, 5, 5, 3), np.int32)},
        {"first": np.zeros((2, 5, 5), np.float32)},
        {"first": np.zeros((2, 5, 5, 4), np.float32)},
        {"first": np.zeros((1, 5, 5, 3), np.float32)},
        {"first": np.zeros((0, 5, 5, 3), np.float32)},
        {"first": np.zeros((2, 5, 6, 3), np.float32)},
        {"second": np.zeros((3, 3, 3, 5), np.float32)},
        {"second": np.zeros((3, 3, 3, 4), np.float16)},
        {"second": np.zeros((9, 3, 3, 4), np.float32)},
        {"result": ((2, 5, 4, 4), "float32")},
        {"result": ((2, 5, 5, 4), "float16")},
        {"result": ((2, 100), "float32")},
        {"of": 3}, {"of": -1}, {"of": 0}, {"of": 1},
        {"stride": 0}, {"stride": -1}, {"stride": 2}, {"stride": 2**62},
        {"top": -1}, {"bottom": 2**62}, {"left": 2}, {"right": -(2**63)},
    ],
    ids=str,
)  # fmt: skip
def test_the_library_refuses_what_does_not_fit(wrong):
    right = {
        "first": np.zeros((2, 5, 5, 3), np.float32), "second": np.zeros((3, 3, 3, 4), np.float32),
        "result": ((2, 5, 5, 4), "float32"), "of": 2, "stride": 1, "top": 1, "bottom": 1, "left": 1, "right": 1,
    } | wrong  # fmt: skip
    first, second, (shape, dtype) = right.pop("first"), right.pop("second"), right.pop("result")
    call = jax.ffi.ffi_call("dgkd_convolve_" + library.find().key, jax.ShapeDtypeStruct(shape, dtype))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: dgkd_jax's convolution by oneDNN: "):
        jax.block_until_ready(call(first, second, **{name: np.int64(value) for name, value in right.items()}))


# -------------------------------------------------------------------------------------------------- found and compiled


def found_anew(monkeypatch, tmp_path, **environment):
    """What a new process with an empty cache would find."""
    monkeypatch.setattr(library, "_CACHE", str(tmp_path / "cache"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return library._found.__wrapped__()


@needs_onednn
def test_why_it_is_not_used_is_one_line(monkeypatch, tmp_path, capfd):
    with monkeypatch.context() as context:
        assert found_anew(context, tmp_path, DGKD_ONEDNN="0") == "DGKD_ONEDNN=0"
    with monkeypatch.context() as context:
        assert found_anew(context, tmp_path, CXX="no-such-compiler") == (
            "oneDNN is installed, but the compiler no-such-compiler is not"
        )
    with monkeypatch.context() as context:
        said = found_anew(context, tmp_path, CXX="false")
        assert said.startswith("false could not compile ")
        assert "\n" not in said
    with monkeypatch.context() as context:
        (tmp_path / "file").write_text("")
        assert "Not a directory" in found_anew(context, tmp_path / "file")
    with monkeypatch.context() as context:
        context.setattr(jax, "process_count", lambda: 2)
        assert found_anew(context, tmp_path) == "oneDNN's are for runs of one process"
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("missing", ["backend", "package"])
def test_where_nobody_asked_for_it_nothing_is_said(monkeypatch, tmp_path, missing):
    def not_there(package):
        raise metadata.PackageNotFoundError(package)

    if missing == "package":
        monkeypatch.setattr(metadata, "distribution", not_there)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert found_anew(monkeypatch, tmp_path) == ""


@needs_onednn
def test_the_log_says_what_is_used_and_how_to_turn_it_off():
    version = metadata.version("onednn-cpu-gomp")
    assert library.status() == f"convolutions by oneDNN {version}: DGKD_ONEDNN=0 for XLA's"


@pytest.mark.slow
@needs_onednn
def test_a_run_goes_on_with_the_other_librarys_convolutions(tmp_path, one_device, monkeypatch):
    small_run = {"data.mock_train_examples": 64, "data.mock_eval_examples": 21, "eval_batch_size": 7, "epochs": 2}
    config = small(**{"method": "ce", "checkpoint_every": 1} | small_run)

    def fit(workdir, *, by, **more):
        jax.clear_caches()  # as in a new process
        with monkeypatch.context() as context:
            if by == "XLA":
                context.setattr(library, "find", lambda: None)
            options = {"source": open_source(config.data), "mesh": one_device, "teacher": None}
            return loop.fit(config, workdir=tmp_path / workdir, **options, **more).variables

    whole = fit("whole", by="oneDNN")
    with pytest.raises(Preempted, match="stopped after step 1 of 8"):
        fit("parts", by="oneDNN", stop=Asked(0))
    with pytest.raises(Preempted, match="stopped after step 3 of 8"):
        fit("parts", by="XLA", stop=Asked(1))
    parts = fit("parts", by="oneDNN")
    errors = [error(*leaves) for leaves in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True)]
    # Rounding errors of 1e-6 in the second and third step, and what the five steps after them make of those.
    assert 0 < max(errors) < 1e-4
