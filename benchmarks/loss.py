"""Every loss with its gradient: time and peak memory, beside the PyTorch forms.

    python -m benchmarks.loss [--shapes=64x100,1024x1000] [--losses=dkd,dgkd] [--cores=1] [--seconds=2]
        [--output=FILE.json]

Times are of value and gradient with respect to the student's logits in float32, compiled for JAX, eager for PyTorch
(DGKD by double backward), one call of each in turn. MiB are the most that is held at once beside the logits: for JAX
what the compiler has planned, for PyTorch its own record of allocations. Without torch, ours alone are measured. On a
machine that is busy, --cores=1 keeps PyTorch's threads from waiting for each other.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report, side_by_side
from dgkd_jax import losses
from dgkd_jax.errors import BadInput
from dgkd_jax.parity.losses import PEERS, PEERS_WEIGHTS

SHAPES = "64x100,256x1000,1024x1000,512x32768"
TEMPERATURE, ALPHA, BETA, EPSILON = 4.0, 1.0, 8.0, 0.1
AT = {"temperature": TEMPERATURE}
_ROUNDS = 50  # at most


def ours() -> dict[str, Callable]:
    """name -> scalar of (student logits, teacher logits, labels)."""
    at, weights = AT, {"alpha": ALPHA, "beta": BETA, "temperature": TEMPERATURE}

    def of_parts(z, v, y):
        gradients = losses.tckd_gradient(z, v, y, **at), losses.nckd_gradient(z, v, y, **at)
        coupling = losses.coupling_of_gradients(*gradients, convention="per_sample")
        return jnp.mean(losses.dkd(z, v, y, **weights)) - EPSILON * coupling

    return {
        "ce": lambda z, v, y: jnp.mean(losses.cross_entropy(z, y)),
        "kd": lambda z, v, y: jnp.mean(losses.kd(z, v, **at)),
        "tckd": lambda z, v, y: jnp.mean(losses.tckd(z, v, y, **at)),
        "nckd": lambda z, v, y: jnp.mean(losses.nckd(z, v, y, **at)),
        "logit_mse": lambda z, v, y: jnp.mean(losses.logit_mse(z, v)),
        "dkd": lambda z, v, y: jnp.mean(losses.dkd(z, v, y, **weights)),
        "dgkd": lambda z, v, y: losses.dgkd(z, v, y, epsilon=EPSILON, convention="per_sample", **weights),
        "dgkd of parts": of_parts,  # the same without the pass of its own: what autodiff makes of the closed forms
    } | {
        name: lambda z, v, y, name=name, own=own: jnp.mean(PEERS[name](z, v, y, **own))
        for name, own in _of_peers().items()
    }


def _of_peers() -> dict[str, dict[str, float]]:
    """The peers' settings, by name."""
    return {name: own | ({} if name == "wttm" else AT) for name, own in PEERS_WEIGHTS.items()}


def theirs() -> dict[str, Callable]:
    """The same in PyTorch: name -> scalar of (student logits, teacher logits, labels)."""
    from dgkd_jax.parity import torch_reference

    def term(name):
        return lambda z, v, y: torch_reference.loss_terms(z, v, y, TEMPERATURE, names=(name,))[name]

    def dkd(z, v, y):
        terms = torch_reference.loss_terms(z, v, y, TEMPERATURE, names=("tckd", "nckd"))
        return ALPHA * terms["tckd"] + BETA * terms["nckd"]

    def dgkd(z, v, y):
        return dkd(z, v, y) - EPSILON * torch_reference.coupling(z, v, y, TEMPERATURE, "per_sample")

    names = ("ce", "kd", "tckd", "nckd", "logit_mse")
    peers = {
        name: lambda z, v, y, name=name, own=own: torch_reference.PEERS[name](z, v, y, **own)
        for name, own in _of_peers().items()
    }
    return {name: term(name) for name in names} | {"dkd": dkd, "dgkd": dgkd, "dgkd of parts": dgkd} | peers


def compile_ours(loss: Callable, arrays: tuple[np.ndarray, ...]) -> tuple[Callable[[], Any], int]:
    """A call that computes value and gradient, and the bytes that its program holds beside its inputs."""
    inputs = tuple(map(jnp.asarray, arrays))
    program = jax.jit(jax.value_and_grad(loss)).lower(*inputs).compile()
    planned = program.memory_analysis()
    held = planned.temp_size_in_bytes + planned.output_size_in_bytes
    return lambda: jax.block_until_ready(program(*inputs)), held


def prepare_theirs(loss: Callable, arrays: tuple[np.ndarray, ...]) -> Callable[[], Any]:
    import torch

    student, teacher, labels = (torch.tensor(array) for array in arrays)
    student.requires_grad_(True)
    labels = labels.long()

    def call():
        value = loss(student, teacher, labels)
        return value.detach(), torch.autograd.grad(value, student)[0]

    return call


def peak_of_torch(call: Callable[[], Any]) -> int:
    """Most bytes that a call holds at once beside its inputs, from PyTorch's own record of allocations."""
    import torch

    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profiled:
        call()
    events = [event for event in profiled.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.max(np.cumsum(changes)))


def measure(shape: tuple[int, int], name: str, *, seconds: float, with_torch: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows, classes = shape
    student, teacher = (3 * rng.standard_normal((2, rows, classes))).astype(np.float32)
    arrays = student, teacher, rng.integers(0, classes, rows).astype(np.int32)
    call, held = compile_ours(ours()[name], arrays)
    calls = {"ours": call}
    if with_torch:
        calls["torch"] = prepare_theirs(theirs()[name], arrays)
    times = side_by_side.alternate(calls, rounds=_ROUNDS, seconds=seconds)
    over_dkd = None
    if name.startswith("dgkd"):
        # On their own: whoever comes after PyTorch in a round finds the caches empty.
        pair = {"ours": call, "dkd": compile_ours(ours()["dkd"], arrays)[0]}
        over_dkd, *_ = side_by_side.ratio(side_by_side.alternate(pair, rounds=_ROUNDS, seconds=seconds), "dkd", "ours")
    return {
        "shape": list(shape),
        "loss": name,
        **{who: side_by_side.spread(found) for who, found in times.items()},
        "torch_over_ours": side_by_side.ratio(times, "ours", "torch")[0] if with_torch else None,
        "ours_over_our_dkd": over_dkd,
        "ours_bytes": held,
        "torch_bytes": peak_of_torch(calls["torch"]) if with_torch else None,
    }


def row(found: dict[str, Any]) -> tuple[str, ...]:
    def number(key, form, unit=1.0):
        return "-" if found[key] is None else form.format(found[key] / unit)

    return (
        "x".join(map(str, found["shape"])),
        found["loss"],
        side_by_side.span(found["ours"]),
        side_by_side.span(found.get("torch")),
        number("torch_over_ours", "{:.2f}"),
        number("ours_over_our_dkd", "{:.2f}"),
        number("ours_bytes", "{:.2f}", 2**20),
        number("torch_bytes", "{:.2f}", 2**20),
    )


COLUMNS = (
    "shape", "loss", "ours, ms [quartiles]", "PyTorch, ms [quartiles]", "PyTorch / ours", "ours / our DKD",
    "ours, MiB", "PyTorch, MiB",
)  # fmt: skip


def shapes_of(text: str) -> list[tuple[int, int]]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text) or re.search(r"x1(,|$)", text):
        raise BadInput(f"--shapes={text}: write BATCHxCLASSES,… with two classes or more, as {SHAPES}")
    return [tuple(map(int, part.split("x"))) for part in text.split(",")]


def names_of(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ours():
            raise BadInput(f"--losses: no loss {name!r}; there are {', '.join(ours())}")
    return names


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--shapes", default=SHAPES, help=f"BATCHxCLASSES,… (default {SHAPES})")
    parser.add_argument("--losses", default=",".join(ours()), help=f"of {', '.join(ours())}")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measurement for each loss at each shape")
    report.add_cores(parser)
    arguments = parser.parse_args()
    report.use_cores(arguments.cores)
    report.check_output(arguments.output)
    shapes, names = shapes_of(arguments.shapes), names_of(arguments.losses)
    environment = report.environment("torch")
    try:
        import torch

        torch.set_num_threads(environment["cores"])
        with_torch = True
    except ImportError:
        with_torch = False
        print("PyTorch is not installed: ours alone (pip install torch brings the peer)")
    one = functools.partial(measure, seconds=arguments.seconds, with_torch=with_torch)
    found = [one(shape, name) for shape in shapes for name in names]
    print(report.table(COLUMNS, [row(each) for each in found]))
    report.finish({"environment": environment, "losses": found}, output=arguments.output)


if __name__ == "__main__":
    report.run(main)
