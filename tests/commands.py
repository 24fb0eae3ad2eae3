"""Giving the main command within the tests' process."""

import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags

from dgkd_jax import main as main_module
from dgkd_jax.runs import launch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Nothing is found or left in the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_join_processes", lambda _: None)  # JAX is in use already in the tests' process
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))


def run(*arguments: str) -> int:
    """As a new process: ml_collections reads overrides from sys.argv and makes a flag of each, for good."""
    flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    with mock.patch.object(sys, "argv", ["main", *arguments]):
        return main_module.main(list(sys.argv))
