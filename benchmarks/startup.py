"""From starting Python to the end of the first training step: cold, and with the compilation cache.

    python -m benchmarks.startup [--student=resnet20] [--teacher=resnet56] [--batch=64] [--runs=3] [--output=FILE.json]
        [--config=configs/mnist5k.py]

Every run is a Python process of its own. A cold run has an empty cache, the runs after it have what it left there. No
data are read: `first step` is the step's own time after compilation. With --config besides: from starting
`python -m dgkd_jax.main` with that configuration to its first step, its data prepared and its teacher trained (for one
epoch) beforehand.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = ("import", "build", "compile", "first step", "whole process")


def child(student: str, teacher: str, batch: int) -> None:
    """One start, timed from within: prints seconds of each part as JSON. Its imports are measured, so they are here."""
    marks = [time.perf_counter()]
    import jax

    from benchmarks import training

    marks.append(time.perf_counter())
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    step, inputs = training.build(mesh, student=student, teacher=teacher, batch=batch)
    marks.append(time.perf_counter())
    program = step.lower(*inputs).compile()
    marks.append(time.perf_counter())
    jax.block_until_ready(program(*inputs))
    marks.append(time.perf_counter())
    print(json.dumps({part: after - before for part, before, after in zip(PARTS, marks, marks[1:], strict=False)}))


def start(cache: Path, *, student: str, teacher: str, batch: int) -> dict[str, float]:
    """Seconds of each of `PARTS` in a fresh process that keeps compiled programs in `cache`."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",  # as dgkd_jax.main has it
    }
    program = f"from benchmarks import startup; startup.child({student!r}, {teacher!r}, {batch})"
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"the measured process failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1]) | {"whole process": elapsed}


def start_main(config: str, cache: Path, folder: Path, *, workdir: str) -> float:
    """Seconds from starting `main` to its student's first step; ended there, but for the work directory "prepared"."""
    command = [sys.executable, "-m", "dgkd_jax.main", f"--config={config}", f"--workdir={folder / workdir}"]
    settings = {"epochs": 1, "teacher.epochs": 1, "teacher.workdir": folder / "teacher"}
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    begun, ready, lines = time.perf_counter(), 0.0, []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            lines.append(line)
            if "ready for the first step" in line:
                ready = time.perf_counter() - begun
                if workdir != "prepared":
                    process.kill()
    if not ready or (workdir == "prepared" and process.returncode):
        raise RuntimeError(f"the measured process failed:\n{''.join(lines)}")
    return ready


def starts_of_main(config: str, *, runs: int) -> dict[str, list[float]]:
    """Seconds to the first step, once with an empty compilation cache and `runs` times with what that left."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start_main(config, folder / "cache of the teacher's training", folder, workdir="prepared")
        found = {"cold, s": [], "with the cache, s": []}
        for run in range(1 + runs):
            seconds = start_main(config, folder / "cache", folder, workdir=f"run{run}")
            found["with the cache, s" if run else "cold, s"].append(seconds)
    return found


def main() -> None:
    from benchmarks import report, side_by_side, training
    from dgkd_jax.errors import BadInput

    parser = report.parser(__doc__)
    training.add_pair(parser, student="resnet20", teacher="resnet56", batch=64)
    parser.add_argument("--config", metavar="FILE", help="of a whole run, to be started besides")
    parser.add_argument("--runs", type=int, default=3, help="with the cache, after the cold one")
    arguments = parser.parse_args()
    report.check_output(arguments.output)
    training.check_pair(arguments)
    if arguments.runs < 1:
        raise BadInput(f"--runs={arguments.runs}: must be 1 or more")
    if arguments.config and not Path(arguments.config).is_file():
        raise BadInput(f"--config={arguments.config}: no such file")
    environment = report.environment()
    with tempfile.TemporaryDirectory() as folder:
        one = functools.partial(
            start, Path(folder), student=arguments.student, teacher=arguments.teacher, batch=arguments.batch
        )
        cold, warm = one(), [one() for _ in range(arguments.runs)]
    spreads = {part: side_by_side.spread([run[part] for run in warm]) for part in PARTS}
    rows = [
        (part, f"{cold[part]:.2f}", *(f"{spreads[part][key] / 1e3:.2f}" for key in ("median_ms", "low_ms", "high_ms")))
        for part in PARTS
    ]
    print(report.table(("part", "cold, s", "with the cache, s", "lower quartile", "upper quartile"), rows))
    found = {"environment": environment, "cold": cold, "warm": warm}
    if arguments.config:
        found["main"] = starts_of_main(arguments.config, runs=arguments.runs)
        print(f"\npython -m dgkd_jax.main --config={arguments.config}, to its first step:")
        cells = [", ".join(f"{each:.1f}" for each in seconds) for seconds in found["main"].values()]
        print(report.table(tuple(found["main"]), [tuple(cells)]))
    report.finish(found, output=arguments.output)


if __name__ == "__main__":
    from benchmarks import report

    report.run(main)
