"""One job at a time in a folder, and one configuration."""

import json
import subprocess
import sys

import pytest
from etils import epath

from configs import mnist5k
from dgkd_jax import data as data_lib
from dgkd_jax import ownership
from dgkd_jax.errors import BadInput


def config(**changes):
    config = mnist5k.get_config()
    config.update_from_flattened_dict({"data.mock": True, "method": "kd"} | changes)
    return config


def test_a_lock_is_exclusive_and_free_after_its_block(tmp_path):
    folder = epath.Path(tmp_path)
    with ownership.lock(folder), pytest.raises(BadInput, match="in use by another job"), ownership.lock(folder):
        pass
    with ownership.lock(folder):
        pass


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    code = f"""
import os, signal
from etils import epath
from dgkd_jax import ownership
with ownership.lock(epath.Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
    assert "process" in (tmp_path / "lock").read_text()
    with ownership.lock(epath.Path(tmp_path)):
        pass


def test_a_claimed_folder_is_known_again_and_another_configuration_refused(tmp_path):
    folder, source = epath.Path(tmp_path), data_lib.open_source(config().data)
    assert not ownership.check(folder, config())
    ownership.claim(folder, config(), source)
    assert ownership.check(folder, config())
    with pytest.raises(BadInput, match="kd.temperature"):
        ownership.check(folder, config(**{"kd.temperature": 2.0}))
    with pytest.raises(BadInput, match="kd.temperature"):
        ownership.claim(folder, config(**{"kd.temperature": 2.0}), source)


@pytest.mark.parametrize("file", ["config.json", "student.json"])
def test_a_file_that_is_missing_or_half_written_is_written_again(tmp_path, file):
    folder, source = epath.Path(tmp_path), data_lib.open_source(config().data)
    ownership.claim(folder, config(), source)
    whole = (tmp_path / file).read_text()
    for damage in (lambda path: path.unlink(), lambda path: path.write_text(whole[: len(whole) // 2])):
        damage(tmp_path / file)
        assert not ownership.check(folder, config())
        ownership.claim(folder, config(), source)
        assert json.loads((tmp_path / file).read_text()) == json.loads(whole)
