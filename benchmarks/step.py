"""Images per second of the whole distillation step, beside a PyTorch step written for the comparison.

    python -m benchmarks.step --pair=resnet56,resnet20 [--method=dkd] [--batch=64] [--side=32] [--dtype=float32]
        [--compile] [--cached] [--steps=2] [--rounds=7] [--clock=wall] [--output=FILE.json]

One step: normalise uint8 images, teacher forward in evaluation mode, student forward and backward, SGD with momentum.
Ours is the step of a run, with its metrics; the batch is on the device. PyTorch's is channels_last, eager and, with
--compile, through torch.compile too; --dtype=bfloat16 is its autocast. The networks are torchvision's, timm's and
pytorchcv's, of as many parameters as ours. All take turns; the ratio is that of the same turn.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F

from benchmarks import report, side_by_side, training
from dgkd_jax import models
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import DGKD, DKD
from dgkd_jax.parity import torch_networks, torch_reference
from dgkd_jax.runs import sharding
from dgkd_jax.training.cached_logits.teacher import CachedTeacher
from dgkd_jax.training.monitor import cost

TEMPERATURE, ALPHA, BETA, EPSILON = 4.0, 1.0, 8.0, 0.1
RATE, MOMENTUM, DECAY = 1e-3, 0.9, 5e-4


def main() -> None:
    args = _arguments()
    images, labels = training.examples(args.batch, image_shape=(args.side, args.side, 3), classes=args.classes).values()
    ours, facts = our_step(args)
    runs = {"ours": ours}
    if args.cached:
        runs["ours, cached"], cached = our_step(args, cached=True)
        facts |= {"cached_gflops": cached["step_gflops"]} if "step_gflops" in cached else {}
    runs["torch eager"] = torch_step(args, images, labels, compiled=False)
    if args.compile:
        runs["torch compiled"] = torch_step(args, images, labels, compiled=True)

    ceiling = matmul_ceiling(args.dtype, clock=args.clock)
    seconds = side_by_side.alternate(
        {name: functools.partial(_repeat, run, args.steps) for name, run in runs.items()},
        rounds=args.rounds,
        clock=args.clock,
        pause=side_by_side.OPENMP_PAUSE,
    )
    print(f"{args.pair} by {args.method}, batch {args.batch}, {args.side} px, {args.dtype}, {args.clock} clock")
    found = _print_rates(seconds, images=args.steps * args.batch)
    facts["matmul_gflops_per_second"] = ceiling
    print(f"our step: {cost.summary(facts)}; a {args.dtype} matrix product runs at {ceiling:.0f} GFLOP/s")
    if "step_gflops" in facts:
        achieved = facts["step_gflops"] * args.steps / statistics.median(seconds["ours"])
        facts["utilisation"] = achieved / ceiling
        print(f"our step runs at {achieved:.0f} GFLOP/s, {100 * facts['utilisation']:.0f} % of that")
    if "cached_gflops" in facts:
        print(f"cached: {facts['cached_gflops']:.1f} GFLOP")
    report.finish(
        {"environment": report.environment("torch"), "arguments": vars(args), "ours": facts, "steps": found},
        output=args.output,
    )


def _arguments() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--pair", required=True, help="TEACHER,STUDENT: two of dgkd_jax.models.NAMES")
    parser.add_argument("--method", choices=("dkd", "dgkd"), default="dkd", help="the loss beside cross-entropy")
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--compile", action="store_true", help="PyTorch through torch.compile too")
    parser.add_argument("--cached", action="store_true", help="ours with the teacher's logits in the batch too")
    parser.add_argument("--steps", type=int, default=2, help="of one turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each that are counted")
    parser.add_argument("--clock", choices=side_by_side.CLOCKS, default="wall", help="cpu: with taskset -c 0")
    args = parser.parse_args()
    report.check_output(args.output)
    names = args.pair.split(",")
    if len(names) != 2:
        raise BadInput(f"--pair={args.pair}: give two models, TEACHER,STUDENT")
    for name in names:
        training.check_model(f"--pair={args.pair}", name)
    return args


def _print_rates(seconds: dict[str, list[float]], *, images: int) -> list[dict[str, Any]]:
    """The table of images per second; returns what it shows for the JSON file."""
    found, rows = [], []
    for name, times in seconds.items():
        rates = [images / each for each in times]
        quicker, lowest, highest = side_by_side.ratio(seconds, "ours", name)
        spreads = f"{min(rates):.1f} … {max(rates):.1f}", f"{lowest:.2f} … {highest:.2f}"
        rows.append((name, f"{statistics.median(rates):.1f}", spreads[0], f"{quicker:.2f}", spreads[1]))
        found.append({"step": name, "images_per_second": rates, "ours_is_times_as_quick": (quicker, lowest, highest)})
    print(report.table(("step", "images/s", "lowest … highest", "ours is x", "lowest … highest"), rows))
    return found


def _repeat(run: Callable[[], Callable[[], None]], count: int) -> None:
    for _ in range(count):
        finish = run()
    finish()


def our_step(args: argparse.Namespace, *, cached: bool = False) -> tuple[Callable, dict[str, float]]:
    """A call that queues one step and returns what waits for it; and what the compiled program says of itself."""
    mesh = sharding.make_mesh()
    dkd = DKD(temperature=TEMPERATURE, alpha=ALPHA, beta=BETA, warmup_epochs=0.0)
    teacher, student = args.pair.split(",")
    step, (current, taught, batch) = training.build(
        mesh,
        student=student,
        teacher=teacher,
        batch=args.batch,
        image_shape=(args.side, args.side, 3),
        classes=args.classes,
        dtype=args.dtype,
        method=DGKD(dkd=dkd, epsilon=EPSILON) if args.method == "dgkd" else dkd,
        optimizer=optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, MOMENTUM)),
    )
    if cached:
        taught = CachedTeacher(taught, "")
        batch |= sharding.to_global({"teacher_logits": np.zeros((args.batch, args.classes), np.float16)}, mesh)
    compiled = step.lower(current, taught, batch).compile()
    facts = cost.cost(compiled, platform=jax.default_backend())

    def run():
        nonlocal current
        current = compiled(current, taught, batch)
        return lambda: jax.block_until_ready(current)

    return run, facts


def torch_step(args, images: np.ndarray, labels: np.ndarray, *, compiled: bool) -> Callable:
    """Likewise in PyTorch, on the graphics card where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, student = (_torch_network(name, args).to(device) for name in args.pair.split(","))
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.SGD(student.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # channels_last as it lies
    target = torch.from_numpy(labels).long().to(device)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (training.MEAN, training.STD))

    def loss_of(pixels, target):
        x = (pixels.float() / 255 - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            with torch.no_grad():
                v = teacher(x)
            z = student(x)
        z, v = z.float(), v.float()
        loss = F.cross_entropy(z, target) + _dkd(z, v, target)
        if args.method == "dgkd":
            loss = loss - EPSILON * torch_reference.coupling(z, v, target, TEMPERATURE, "per_sample")
        return loss

    forward = torch.compile(loss_of) if compiled else loss_of

    def run():
        optimizer.zero_grad(set_to_none=True)
        forward(pixels, target).backward()
        optimizer.step()
        return torch.cuda.synchronize if device.type == "cuda" else lambda: None

    return run


def _dkd(z: torch.Tensor, v: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """α·TCKD + β·NCKD as batch means, in the form that is usual in PyTorch (−1000 at the target)."""
    at_target = F.one_hot(target, z.shape[1]).to(z.dtype)
    pairs = []
    for logits in (z, v):
        share = (F.softmax(logits / TEMPERATURE, 1) * at_target).sum(1)
        pairs.append(torch.stack([share, 1 - share], 1))
    tckd = F.kl_div(pairs[0].log(), pairs[1], reduction="batchmean")
    others = [logits / TEMPERATURE - 1000 * at_target for logits in (z, v)]
    nckd = F.kl_div(F.log_softmax(others[0], 1), F.softmax(others[1], 1), reduction="batchmean")
    return TEMPERATURE**2 * (ALPHA * tckd + BETA * nckd)


def _torch_network(name: str, args) -> torch.nn.Module:
    model = models.create(name, num_classes=args.classes)
    if name == "mobilenet_v2_half_cifar":
        module = _mobilenet_v2_half_cifar(args.classes)
    else:
        module = torch_networks.create(name, model, side=args.side).module
    ours = sum(leaf.size for leaf in jax.tree.leaves(models.shapes(model, (args.side, args.side, 3))["params"]))
    theirs = sum(parameter.numel() for parameter in module.parameters())
    if ours != theirs and not name.startswith("vit"):  # their table of positions is resampled, ours is made to measure
        raise SystemExit(f"{name}: PyTorch's network has {theirs:,} parameters, ours {ours:,}")
    return module.to(memory_format=torch.channels_last)


def _mobilenet_v2_half_cifar(classes: int) -> torch.nn.Module:
    import torchvision

    rows = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    module = torchvision.models.MobileNetV2(classes, 0.5, rows, round_nearest=1, dropout=0.0)
    first = module.features[1]
    widen = torchvision.ops.misc.Conv2dNormActivation(16, 16, 1, activation_layer=torch.nn.ReLU6)
    first.conv = torch.nn.Sequential(widen, *first.conv)
    return module


def matmul_ceiling(dtype: str, *, clock: str) -> float:
    """GFLOP/s of a large square matrix product, the quickest of five."""
    side, now = 1024 if jax.default_backend() == "cpu" else 8192, side_by_side.CLOCKS[clock]
    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):
        began = now()
        jax.block_until_ready(product(x, x))
        seconds.append(now() - began)
    return 2 * side**3 / min(seconds[1:]) / 1e9


if __name__ == "__main__":
    report.run(main)
