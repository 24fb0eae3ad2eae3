"""ONNX, converted by jax2onnx: one file for onnxruntime and other runtimes without JAX."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from dgkd_jax.errors import BadInput
from dgkd_jax.export.program import Program
from dgkd_jax.models import layers

EXTRA, PACKAGE = "onnx", "jax2onnx"
INPUT, OUTPUT = "images", "logits"
_OPSET = 20  # of 2023, the first with Gelu; onnxruntime from 1.18 on
_BATCHES = (1, 3)  # of random images that the file is tried with
_TOLERANCE = 1e-4  # of the largest logit; sums in another order differ by about 1e-6


def encode(program: Program, metadata: Mapping[str, str]) -> bytes:
    """An ONNX model with input `images`, uint8 `[batch, height, width, channels]`, and output `logits`, float32.

    It is run once by onnxruntime on random images and compared with the network, because the converter drops some
    options of some layers without a word.

    Args:
        metadata: name -> text, the model's `metadata_props`.

    Raises:
        BadInput: the converter does not take the network, or its model gives other logits; the message names the
            operation or the error.
    """
    import jax2onnx  # ten seconds, and an extra
    import onnx

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *program.image_shape), jnp.uint8)

    def traced(images: jax.Array) -> jax.Array:
        with _pools_without_padding(), layers.forms_chosen_by(_library):
            return program.logits(images)

    try:
        model = jax2onnx.to_onnx(
            traced, [images], model_name="student", opset=_OPSET, input_names=[INPUT], output_names=[OUTPUT]
        )
        onnx.helper.set_model_props(model, dict(metadata))
        content = model.SerializeToString()
        error = _error(content, program)
    except Exception as failure:  # of any kind: the converter raises what it stumbles over
        reason = str(failure).strip().splitlines() or [""]
        raise BadInput(
            f"--format=onnx: jax2onnx does not take this network: {type(failure).__name__}: {reason[0]}. "
            "Take --format=stablehlo"
        ) from failure
    if not error <= _TOLERANCE:
        raise BadInput(
            f"--format=onnx: jax2onnx changes what this network computes, the logits by {error:.1g} of the largest. "
            "Take --format=stablehlo"
        )
    return content


def _library(*arguments: jax.Array, cpu: Callable, default: Callable) -> jax.Array:
    """One node Conv for each convolution, and not the sums of slices that are fast in XLA on a CPU."""
    del cpu
    return default(*arguments)


@contextlib.contextmanager
def _pools_without_padding() -> Iterator[None]:
    """jax2onnx takes Flax's pools only by keyword, and computes them without padding if it is given in pixels."""
    pools = {"max_pool": (linen.max_pool, -jnp.inf), "avg_pool": (linen.avg_pool, 0.0)}
    with contextlib.ExitStack() as stack:
        for name, (pool, fill) in pools.items():
            stack.enter_context(mock.patch.object(linen, name, _padded_first(pool, fill)))
        yield


def _padded_first(pool: Callable, fill: float) -> Callable:
    def padded(x, window_shape, strides=None, padding="VALID", **options):
        if not isinstance(padding, str):
            x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
            padding = "VALID"
        strides = strides or (1,) * len(window_shape)
        return pool(x, window_shape=tuple(window_shape), strides=tuple(strides), padding=padding, **options)

    return padded


def _error(content: bytes, program: Program) -> float:
    """The largest difference between the logits of the file and those of the network, relative to the largest logit."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (max(_BATCHES), *program.image_shape), np.uint8)
    network = jax.jit(program.logits, compiler_options={"xla_backend_optimization_level": 0})  # it runs once
    expected = np.asarray(network(images))
    largest = max(np.abs(expected).max(), np.finfo(np.float32).tiny)  # weights may be all zeros
    worst = 0.0
    for batch in _BATCHES:
        (found,) = session.run([OUTPUT], {INPUT: images[:batch]})
        if found.shape != expected[:batch].shape:
            return np.inf
        worst = np.maximum(worst, np.abs(found - expected[:batch]).max() / largest)  # NaN stays
    return float(worst)
