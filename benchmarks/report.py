"""What every benchmark's command shares: options, where it ran, tables, a JSON file, mistakes in one line."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import jax

from dgkd_jax.data import quiet
from dgkd_jax.errors import ArgumentParser, BadInput, exit_code_of
from dgkd_jax.models.onednn import library as onednn
from dgkd_jax.runs import allocator


def parser(description: str) -> ArgumentParser:
    """With --output, and with errors that are `BadInput`."""
    found = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--output", metavar="FILE.json", help="also write everything measured here")
    return found


def add_cores(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cores", type=int, help="of this machine to use (default: all; Linux only)")


def use_cores(cores: int | None) -> None:
    """Keep this process to so many cores; call it before JAX computes anything."""
    if cores is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise BadInput(f"--cores={cores}: this system cannot keep a process to some cores; leave --cores out")
    available = sorted(os.sched_getaffinity(0))
    if not 1 <= cores <= len(available):
        raise BadInput(f"--cores={cores}: there are {len(available)}")
    os.sched_setaffinity(0, available[:cores])


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command; exit code 2 with one line for bad input.

    Freed memory is kept as in a run; PyTorch, in the same process, has that too.
    """
    quiet.for_good()
    allocator.keep_freed_memory()
    raise SystemExit(exit_code_of(main))


def check_output(path: str | None) -> None:
    """Before the measurement, not after it."""
    if path and not Path(path).resolve().parent.is_dir():
        raise BadInput(f"--output={path}: no such folder")


def environment(*packages: str) -> dict[str, Any]:
    """Device, versions, cores and load: what a number depends on.

    Args:
        packages: whose versions are told besides; None for one that is not there.
    """
    device = jax.devices()[0]
    return {
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "device": f"{device.platform} {device.device_kind}",
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "convolutions": onednn.name(),
        **{package: _version(package) for package in ("jax", *packages)},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """In Markdown, so that it can be put into a document as it is."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [columns, tuple("-" * width for width in widths), *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def finish(found: dict[str, Any], *, output: str | None) -> None:
    """Print where it was measured, and write all of it."""
    print("\n" + "; ".join(f"{name} {value}" for name, value in found["environment"].items()))
    if output:
        Path(output).write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {output}")
