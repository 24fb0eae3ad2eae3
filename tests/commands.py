"""Giving the main command within the tests' process."""

import sys
from pathlib import Path
from unittest import mock

import pytest
from absl import flags

from dgkd_jax import cache_teacher
from dgkd_jax import main as main_module
from dgkd_jax.runs import launch

ROOT = Path(__file__).parents[1]
# absl keeps the flags of every imported command in one place; a process of main's own would not have these.
FOREIGN_FLAGS = {flag.name: flag for flag in flags.FLAGS.flags_by_module_dict()[cache_teacher.__name__]}


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
    for name in FOREIGN_FLAGS:
        delattr(flags.FLAGS, name)
    try:
        with mock.patch.object(sys, "argv", ["main", *arguments]):
            return main_module.main(list(sys.argv))
    finally:
        for name, flag in FOREIGN_FLAGS.items():
            flags.FLAGS[name] = flag
