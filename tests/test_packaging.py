"""What is installed: the dependencies, the wheel, and distillation without TensorFlow."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

DISTILS_ARRAYS = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "clu", "tensorboard", "torch", "configs"):
    sys.modules[name] = None
import numpy as np
import dgkd_jax
assert dgkd_jax.__file__.startswith(sys.argv[1]), dgkd_jax.__file__
random = np.random.default_rng(0)
labels = np.arange(60) % 3
images = (80 * labels[:, None, None, None] + random.integers(0, 60, (60, 4, 4, 1))).astype(np.uint8)
begin = np.zeros((16, 3), np.float32)
apply = lambda kernel, images: images.reshape(images.shape[0], -1) @ kernel
found = dgkd_jax.distill((apply, begin), train=(images, labels), method="ce", epochs=20, batch_size=20,
                         workdir=sys.argv[2], optimizer={"learning_rate": 0.5}, diagnose=False)
assert found.accuracy > 0.6, found.accuracy
"""


def plain(lines: list[str]) -> set[str]:
    """With one kind of quotation mark and no spaces."""
    return {line.replace("'", '"').replace(" ", "") for line in lines}


def test_the_requirements_are_the_dependencies_and_the_pipelines():
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    required = [line for line in lines if line]
    expected = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["tfds"]
    assert plain(required) == plain(expected)


def test_every_dependency_has_an_upper_or_lower_bound():
    every = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    assert [line for line in every if not re.search(r"[<>=]=?\d|^dgkd_jax\[|^jax\[", line)] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copied = ["pyproject.toml", "README.md", "LICENSE", "dgkd_jax"]
    source.mkdir()
    subprocess.run(["cp", "-r", *copied, source], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_source_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    written = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dgkd_jax").rglob("*")
        if path.suffix in (".py", ".cc", ".h") or path.name == "py.typed"
    }
    assert held == written


@pytest.mark.slow
def test_the_wheel_distils_arrays_without_tensorflow(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    command = [sys.executable, "-c", DISTILS_ARRAYS, str(tmp_path / "site"), str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path), "PATH": ""},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.new_environment  # a minute: it installs the wheel and its dependencies into a new environment
def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel], check=True)
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"^(tensorflow|clu|torch)", listed, re.MULTILINE)
    done = subprocess.run(
        [python, "-I", "-c", DISTILS_ARRAYS, str(tmp_path / "venv"), str(tmp_path / "run")],
        cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": ""}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
