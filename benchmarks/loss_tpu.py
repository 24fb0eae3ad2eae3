"""Every loss with its gradient on a TPU that is not here: the compiler's estimate of time and memory traffic.

    python -m benchmarks.loss_tpu [--topology=v5e:1x1] [--shapes=1024x1000,1024x131072] [--losses=dkd,dgkd]
        [--output=FILE.json]

Value and gradient with respect to the student's logits, float32, on one chip. Arrays are the bytes to and from memory
in units of the logits' bytes: two are read and one is written at least. Needs the extra `plan`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import loss as losses
from benchmarks import report
from dgkd_jax.plan import compiler, estimate, slices
from dgkd_jax.runs import compiler_options, sharding

SHAPES = "1024x1000,1024x131072"


def measure(on: slices.Slice, shape: tuple[int, int], name: str) -> dict[str, Any]:
    mesh = sharding.make_mesh(devices=compiler.devices_of(on)[:1])
    logits = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.replicated(mesh))
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=sharding.replicated(mesh))
    program = jax.jit(jax.value_and_grad(losses.ours()[name]), compiler_options=compiler_options.of((), mesh))
    found = compiler.compile_it(program.lower(logits, logits, labels))
    if isinstance(found, compiler.TooLarge):
        return {"shape": list(shape), "loss": name, "ms": None, "arrays": None}
    cost = estimate.cost_of(found, on, of_step=False)
    arrays = 1e9 * cost.gigabytes / (4 * shape[0] * shape[1])
    return {"shape": list(shape), "loss": name, "ms": 1e3 * cost.estimated_s, "arrays": arrays}


def row(found: dict[str, Any]) -> tuple[str, ...]:
    shape = "x".join(map(str, found["shape"]))
    if found["ms"] is None:
        return shape, found["loss"], "does not fit", "-"
    return shape, found["loss"], f"{found['ms']:.3f}", f"{found['arrays']:.1f}"


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--topology", default="v5e:1x1", help="its first chip is compiled for (default v5e:1x1)")
    parser.add_argument("--shapes", default=SHAPES, help=f"BATCHxCLASSES,… (default {SHAPES})")
    parser.add_argument("--losses", default="dkd,dgkd", help=f"of {', '.join(losses.ours())} (default dkd,dgkd)")
    arguments = parser.parse_args()
    report.check_output(arguments.output)
    on, shapes = slices.named(arguments.topology), losses.shapes_of(arguments.shapes)
    names = losses.names_of(arguments.losses)
    compiler.begin()
    found = [measure(on, shape, name) for shape in shapes for name in names]
    print(report.table(("shape", "loss", "estimated, ms", "arrays"), [row(each) for each in found]))
    environment = report.environment("libtpu")
    report.finish({"environment": environment, "topology": on.name, "losses": found}, output=arguments.output)


if __name__ == "__main__":
    report.run(main)
