"""The cost of the compiled step: operations, memory, and the share of the device's peak that it uses."""

import jax

from dgkd_jax.models.onednn import library as onednn
from dgkd_jax.runs import chips


def cost(compiled: jax.stages.Compiled, *, platform: str, is_loop: bool = False) -> dict[str, float]:
    """Operations and memory of a compiled program, on one device.

    Args:
        platform: that it is compiled for.
        is_loop: it computes its batch in a loop, of which XLA counts one round, so operations are not told.

    Returns:
        Only what the backend reports. `step_gflops`: 10⁹ floating-point operations as XLA counts them; not where
        libraries of vendors do nearly all (cuDNN and cuBLAS on GPUs, oneDNN), of which it counts none. `temporary_mib`,
        `arguments_mib`, `output_mib`: memory in MiB. `donated_mib`: the part of the output that reuses the
        arguments' memory.
    """
    found = {}
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if analysis and analysis.get("flops", 0) > 0 and not is_loop and not _leaves_it_to_vendors(compiled, platform):
        found["step_gflops"] = analysis["flops"] / 1e9
    if memory is not None:
        for name, bytes_ in {
            "temporary_mib": memory.temp_size_in_bytes,
            "arguments_mib": memory.argument_size_in_bytes,
            "output_mib": memory.output_size_in_bytes,
            "donated_mib": memory.alias_size_in_bytes,
        }.items():
            found[name] = bytes_ / 2**20
    return found


def _leaves_it_to_vendors(compiled: jax.stages.Compiled, platform: str) -> bool:
    library = onednn.find() if platform == "cpu" else None
    return platform == "gpu" or (library is not None and library.key in compiled.as_text())


def summary(found: dict[str, float]) -> str:
    """The result of `cost` as one line."""
    words = {
        "step_gflops": "{:.3g} GFLOP",
        "temporary_mib": "{:.3g} MiB of temporaries",
        "arguments_mib": "{:.3g} MiB of arguments",
        "donated_mib": "{:.3g} MiB of them reused for the result",
    }
    return ", ".join(text.format(found[name]) for name, text in words.items() if name in found) or "not told"


def utilisation(found: dict[str, float], steps_per_second: float, *, kind: str | None = None) -> dict[str, float]:
    """{"utilisation": share of the bfloat16 peak}, or {} where the peak or the operations are unknown.

    Args:
        found: from `cost`.
        steps_per_second: measured.
        kind: `device_kind`; None: that of the first device.
    """
    chip = chips.of_kind(kind or jax.devices()[0].device_kind)
    if chip is None or "step_gflops" not in found:
        return {}
    return {"utilisation": found["step_gflops"] * steps_per_second / (1000 * chip.peak_tflops)}
