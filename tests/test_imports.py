"""What is imported where: heavy packages only where they are needed. That imports point one way: `make lint`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dgkd_jax"

# Package -> the only files and folders that may import it.
ONLY_IN = {
    "flax.linen": ("models", "export/onnx.py"),
    "tensorflow": ("data", "evaluate/corruptions.py"),
    "tensorflow_datasets": ("data", "evaluate/foreign_sets.py"),
    "clu": ("training/monitor/to_tensorboard.py",),
    "wandb": ("training/monitor/to_wandb.py",),
    "mlflow": ("training/monitor/to_mlflow.py",),
    "torch": ("torch_port/files.py", "parity/torch_reference.py", "parity/torch_networks.py"),
    "jax2onnx": ("export/onnx.py",),
}


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything imported anywhere in a file, `from a import b` as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written absolutely"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_heavy_package_is_imported_only_where_it_is_needed(package):
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(f"{name}.".startswith(f"{package}.") for name in imports_of(path))
    }
    assert found, "nobody imports it any more"
    assert {path for path in found if not path.startswith(ONLY_IN[package])} == set()


@pytest.mark.slow
def test_the_core_imports_without_tensorflow_and_torch():
    """In a fresh interpreter in which importing them is an error."""
    program = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "torch", "torchvision", "timm", "clu", "wandb", "mlflow"):
    sys.modules[name] = None
from dgkd_jax import distill, losses, methods, models, torch_port
from dgkd_jax.evaluate import evaluator, metrics
from dgkd_jax.runs import checkpoint, config, sharding, student
from dgkd_jax.training import build, loop, state, step
import dgkd_jax.data.open
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
