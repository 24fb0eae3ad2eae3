"""Every loss with its gradient on a graphics card: time and memory, beside the PyTorch forms in eager mode.

    python -m benchmarks.loss_gpu

Calls are queued one after the other and waited for once, so that neither side pays for the host. MiB are held beside
the logits: what our compiler has planned, and PyTorch's own peak. `benchmarks.loss` is the same on CPUs, in turns.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import report
from benchmarks.loss import ours, theirs
from dgkd_jax.errors import BadInput

SHAPES = ((64, 100), (1024, 1000), (512, 32768))
_WARM_UP, _OURS, _THEIRS = 3, 50, 30  # calls


def milliseconds(call, wait, count: int) -> float:
    """Mean time of a call. `wait` takes the result of the last."""
    for _ in range(_WARM_UP):
        last = call()
    wait(last)
    start = time.perf_counter()
    for _ in range(count):
        last = call()
    wait(last)
    return (time.perf_counter() - start) / count * 1e3


def row(rows: int, classes: int, name: str) -> str:
    rng = np.random.default_rng(0)
    student, teacher = (3 * rng.standard_normal((2, rows, classes))).astype(np.float32)
    labels = rng.integers(0, classes, rows).astype(np.int32)
    inputs = tuple(map(jnp.asarray, (student, teacher, labels)))
    program = jax.jit(jax.value_and_grad(ours()[name])).lower(*inputs).compile()
    planned = program.memory_analysis()
    held = (planned.temp_size_in_bytes + planned.output_size_in_bytes) / 2**20
    of_ours = milliseconds(lambda: program(*inputs), jax.block_until_ready, _OURS)

    z, v, y = (torch.tensor(array).cuda() for array in (student, teacher, labels))
    z.requires_grad_(True)
    y, loss = y.long(), theirs()[name]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    of_torch = milliseconds(
        lambda: torch.autograd.grad(loss(z, v, y), z)[0], lambda _: torch.cuda.synchronize(), _THEIRS
    )
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    numbers = f"{of_ours:.3f} | {of_torch:.3f} | {of_torch / of_ours:.2f} | {held:.1f} | {peak:.1f}"
    return f"| {rows}x{classes} | {name} | {numbers} |"


def main() -> None:
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise BadInput("loss_gpu needs a graphics card that JAX and torch both see; on a CPU: benchmarks.loss")
    print("| shape | loss | ours, ms | PyTorch, ms | PyTorch / ours | ours, MiB | PyTorch, MiB |")
    for rows, classes in SHAPES:
        for name in ours():
            print(row(rows, classes, name), flush=True)


if __name__ == "__main__":
    report.run(main)
