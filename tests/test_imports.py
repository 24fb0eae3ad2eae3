"""Imports point one way, and the core needs neither TensorFlow nor torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dgkd_jax"

# Room -> the rooms of ours that it may import. A room that is not here fails the test: say where it belongs.
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "decoupling": set(),
    "coupling": {"decoupling"},
    "fused": {"decoupling"},
    "losses": {"coupling", "decoupling", "fused"},
    "metrics": set(),
    "models": set(),
    "sharding": set(),
    "progress": set(),
    "goodput": set(),
    "compiled_step": set(),
    "watchdog": set(),
    "faults": set(),
    "interruption": set(),
    "writer": {"errors"},
    "epoch_log": {"errors"},
    "analysis": {"errors", "losses"},
    "data": {"errors", "sharding"},
    "torch_names": {"errors"},
    "weight_files": {"errors"},
    "torch_port": {"errors", "models", "torch_names", "weight_files"},
    "state": {"metrics"},
    "steps": {"analysis", "losses", "metrics", "state"},
    "checkpoint": {"errors", "state"},
    "evaluate": {"analysis", "metrics", "models", "sharding", "steps"},
    "predictions": {"analysis", "data", "losses", "sharding", "steps"},
    "config": {"data", "errors", "losses", "models", "steps"},
    "command_line": {"config", "errors"},
    "ownership": {"config", "data", "errors"},
    "top_classes": set(),
    "logit_files": {"errors", "top_classes"},
    "teacher_cache": {"config", "data", "errors", "logit_files", "steps"},
    "program": {"data", "errors", "evaluate", "models", "sharding", "state", "steps"},
    "feed": {"data", "program", "sharding"},
    "train": {
        "checkpoint", "compiled_step", "config", "data", "epoch_log", "errors", "evaluate", "faults", "feed", "goodput",
        "metrics", "ownership", "program", "progress", "sharding", "state", "steps", "watchdog", "writer",
    },
    "job": {
        "checkpoint", "config", "data", "errors", "models", "predictions", "program", "progress", "sharding", "steps",
        "teacher_cache", "torch_port", "train", "weight_files",
    },
    "cache_teacher": {
        "data", "errors", "faults", "job", "logit_files", "main", "ownership", "program", "progress", "sharding",
        "steps", "teacher_cache",
    },
    "export": {"__version__", "checkpoint", "errors", "models", "program", "torch_port", "weight_files"},
    "robustness": {
        "checkpoint", "config", "data", "errors", "export", "models", "predictions", "program", "sharding",
        "torch_port",
    },
    "parity": {"errors", "losses", "models", "state", "steps", "torch_names", "torch_port"},
    "landscape": {"analysis"},
    "study": {"analysis", "cache_teacher", "config", "errors", "job", "main", "report"},
    "report": {"analysis", "errors"},
    "main": {"command_line", "config", "errors", "interruption", "job"},
}  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything imported anywhere in a file, `from a import b` as a.b.

    Except under `if __name__ == "__main__":` — nobody who imports the file gets that.
    """
    names = set()
    body = [
        part
        for part in ast.parse(path.read_text()).body
        if not (isinstance(part, ast.If) and ast.unparse(part.test) == "__name__ == '__main__'")
    ]
    for node in ast.walk(ast.Module(body=body, type_ignores=[])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written absolutely"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    room = room_of(path)
    ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("dgkd_jax.")} - {room}
    assert ours <= ALLOWED[room], f"{room} must not import {ours - ALLOWED[room]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_linen_is_imported_only_by_the_models(path):
    if room_of(path) != "models":
        assert not any(name.startswith("flax.linen") for name in imports_of(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_tensorflow_is_imported_only_by_data_and_the_metric_writer(path):
    heavy = {name.split(".")[0] for name in imports_of(path)} & {"tensorflow", "tensorflow_datasets", "clu"}
    if room_of(path) not in ("data", "writer"):
        assert not heavy


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_imported_only_where_pytorch_is_read_or_compared_with(path):
    torch = {name.split(".")[0] for name in imports_of(path)} & {"torch", "torchvision", "timm", "pytorchcv"}
    if path.relative_to(PACKAGE).as_posix() not in (
        "weight_files.py", "parity/torch_reference.py", "parity/torch_networks.py",
    ):  # fmt: skip
        assert not torch


def test_the_core_imports_without_tensorflow_and_torch():
    """In a fresh interpreter in which importing them is an error."""
    program = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "torch", "torchvision", "timm", "clu"):
    sys.modules[name] = None
from dgkd_jax import losses, models, steps, metrics, state, sharding, evaluate, checkpoint, torch_port, config
import dgkd_jax.data
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
