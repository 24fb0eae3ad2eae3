"""One job at a time in a folder, and one configuration."""

import json
import subprocess
import sys

import pytest
from etils import epath

from configs import mnist5k
from dgkd_jax.data.open import open_source
from dgkd_jax.errors import BadInput
from dgkd_jax.models.network import Network
from dgkd_jax.runs import workdir as workdir_lib


def config(**changes):
    config = mnist5k.get_config()
    config.update_from_flattened_dict({"data.mock": True, "method": "kd"} | changes)
    return config


def pixels(source) -> Network:
    """A network of which nothing is asked but the pixels that it knows."""
    return Network(None, None, source.mean, (0.25,))


def test_a_lock_is_exclusive_and_free_after_its_block(tmp_path):
    folder = epath.Path(tmp_path)
    with workdir_lib.lock(folder), pytest.raises(BadInput, match="in use by another job"), workdir_lib.lock(folder):
        pass
    with workdir_lib.lock(folder):
        pass


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    code = f"""
import os, signal
from etils import epath
from dgkd_jax.runs import workdir
with workdir.lock(epath.Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
    assert "process" in (tmp_path / "lock").read_text()
    with workdir_lib.lock(epath.Path(tmp_path)):
        pass


def test_a_claimed_folder_is_known_again_and_another_configuration_refused(tmp_path):
    folder, source = epath.Path(tmp_path), open_source(config().data)
    assert not workdir_lib.check(folder, config())
    workdir_lib.claim(folder, config(), source, pixels(source), total_steps=7)
    assert workdir_lib.check(folder, config())
    about = json.loads((tmp_path / "student.json").read_text())
    assert about == {
        "name": "mnist5k", "num_classes": 10, "image_shape": [28, 28, 1], "mean": list(source.mean), "std": [0.25],
        "enable_x64": False, "total_steps": 7,
    }  # fmt: skip
    with pytest.raises(BadInput, match="kd.temperature"):
        workdir_lib.check(folder, config(**{"kd.temperature": 2.0}))
    with pytest.raises(BadInput, match="kd.temperature"):
        workdir_lib.claim(folder, config(**{"kd.temperature": 2.0}), source, pixels(source), total_steps=7)


@pytest.mark.parametrize("file", ["config.json", "student.json"])
def test_a_file_that_is_missing_or_half_written_is_written_again(tmp_path, file):
    folder, source = epath.Path(tmp_path), open_source(config().data)
    workdir_lib.claim(folder, config(), source, pixels(source), total_steps=7)
    whole = (tmp_path / file).read_text()
    for damage in (lambda path: path.unlink(), lambda path: path.write_text(whole[: len(whole) // 2])):
        damage(tmp_path / file)
        assert not workdir_lib.check(folder, config())
        workdir_lib.claim(folder, config(), source, pixels(source), total_steps=7)
        assert json.loads((tmp_path / file).read_text()) == json.loads(whole)
