"""Forward, input gradient and kernel gradient of convolutions: XLA's, ours (`models/layers.Conv`) and PyTorch's.

    python -m benchmarks.convolution [--batch=64] [--rounds=7] [--clock=wall] [--output=FILE.json]

Milliseconds, medians of runs in turns; the last column is how many times as quick ours is as PyTorch's channels_last.
Ours are `models/cpu_convolution.py`'s; with the extra `onednn`, oneDNN's where the kernel is dense and larger than 1x1.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report, side_by_side
from dgkd_jax.models import layers
from dgkd_jax.models.cpu_convolution import by_library

# in, out, side of the image, side of the kernel, stride, groups, which network has it
SHAPES = [
    (116, 116, 16, 1, 1, 1, "shufflenet_v2_cifar 1x1"),
    (64, 128, 32, 1, 2, 1, "resnet shortcut 1x1"),
    (240, 240, 16, 1, 1, 3, "shufflenet_v1_cifar grouped 1x1"),
    (116, 116, 16, 3, 1, 116, "shufflenet_v2_cifar depthwise 3x3"),
    (116, 116, 32, 3, 2, 116, "shufflenet_v2_cifar depthwise 3x3"),
    (144, 144, 14, 5, 1, 144, "efficientnet_lite0 depthwise 5x5"),
    (192, 192, 14, 7, 1, 192, "convnext_tiny depthwise 7x7"),
    (3, 192, 64, 16, 16, 1, "vit_tiny patches 16x16"),
    (64, 64, 16, 3, 1, 1, "resnet32x4 3x3"),
    (16, 16, 32, 3, 1, 1, "resnet20 3x3"),
    (32, 64, 16, 3, 2, 1, "resnet20 3x3"),
    (64, 64, 8, 3, 1, 1, "resnet20 3x3"),
]


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each that are counted")
    parser.add_argument("--clock", choices=side_by_side.CLOCKS, default="wall", help="cpu: with taskset -c 0")
    args = parser.parse_args()
    report.check_output(args.output)

    print(f"{'':66s}{'pass':8s}{'PyTorch':>9s}{'XLA':>9s}{'ours':>9s}{'x PyTorch':>11s}{'lowest … highest':>19s}")
    rows = []
    for channels, features, size, side, stride, groups, network in SHAPES:
        padding = 0 if side in (1, stride) else side // 2
        title = f"{network}, {channels}→{features}, {size} px, stride {stride}"
        seconds = _measure(channels, features, size, side, stride, groups, padding, args)
        for name, times in seconds.items():
            quicker, lowest, highest = side_by_side.ratio(times, "ours", "torch")
            median = {peer: 1e3 * statistics.median(values) for peer, values in times.items()}
            print(
                f"{title:66s}{name:8s}{median['torch']:9.1f}{median['xla']:9.1f}{median['ours']:9.1f}"
                f"{quicker:11.2f}{f'{lowest:.2f} … {highest:.2f}':>19s}",
                flush=True,
            )
            rows.append({"convolution": title, "pass": name, "ratio": [quicker, lowest, highest], "ms": median})
    report.finish(
        {"environment": report.environment("torch"), "batch": args.batch, "clock": args.clock, "rows": rows},
        output=args.output,
    )


def _measure(channels, features, size, side, stride, groups, padding, args):
    random = np.random.default_rng(0)
    x = random.standard_normal((args.batch, size, size, channels), np.float32)
    kernel = random.standard_normal((side, side, channels // groups, features), np.float32)
    module = layers.Conv(features, side, stride, padding, groups)
    forms = {
        "ours": lambda x, kernel: module.apply({"params": {"kernel": kernel}}, x),
        "xla": lambda x, kernel: by_library(x, kernel, stride=stride, padding=((padding, padding),) * 2, groups=groups),
    }
    gradient = random.standard_normal(jax.eval_shape(forms["xla"], x, kernel).shape, np.float32)
    runs = {"forward": {}, "input": {}, "kernel": {}}
    for name, form in forms.items():
        passes = {
            "forward": lambda x, kernel, gradient, form=form: form(x, kernel),
            "input": lambda x, kernel, gradient, form=form: jax.vjp(lambda x: form(x, kernel), x)[1](gradient),
            "kernel": lambda x, kernel, gradient, form=form: jax.vjp(lambda k: form(x, k), kernel)[1](gradient),
        }
        arrays = [jnp.asarray(array) for array in (x, kernel, gradient)]
        for kind, function in passes.items():
            compiled = jax.jit(function).lower(*arrays).compile()
            runs[kind][name] = lambda compiled=compiled, arrays=arrays: jax.block_until_ready(compiled(*arrays))
    for kind, run in _torch_passes(x, kernel, gradient, stride, padding, groups).items():
        runs[kind]["torch"] = run
    return {
        kind: side_by_side.alternate(of_kind, rounds=args.rounds, clock=args.clock, pause=side_by_side.OPENMP_PAUSE)
        for kind, of_kind in runs.items()
    }


def _torch_passes(x, kernel, gradient, stride, padding, groups):
    import torch

    def channels_last(array, axes):
        return torch.from_numpy(array.transpose(axes)).contiguous(memory_format=torch.channels_last)

    x, gradient = channels_last(x, (0, 3, 1, 2)), channels_last(gradient, (0, 3, 1, 2))
    kernel = channels_last(kernel, (3, 2, 0, 1))

    def backward(of_input, of_kernel):
        return torch.ops.aten.convolution_backward(
            gradient, x, kernel, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups,
            [of_input, of_kernel, False],
        )  # fmt: skip

    return {
        "forward": lambda: torch.nn.functional.conv2d(x, kernel, None, stride, padding, 1, groups),
        "input": lambda: backward(True, False),
        "kernel": lambda: backward(False, True),
    }


if __name__ == "__main__":
    report.run(main)
