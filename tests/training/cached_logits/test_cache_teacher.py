"""A cache is written block by block, goes on where it was, and what is damaged in it is found."""

import shutil

import pytest
from cached_logits import files_of, make, open_cache, tiny, use_small_blocks
from small_runs import Asked

from dgkd_jax import cache_teacher
from dgkd_jax.errors import BadInput, NumericFailure, Preempted, StorageFailure
from dgkd_jax.training import run as running
from dgkd_jax.training.cached_logits import store


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path):
    use_small_blocks(monkeypatch, tmp_path)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_an_interrupted_cache_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, step):
    make(tmp_path / "whole")
    with pytest.raises(Preempted, match=f"stopped after {step} of 8 batches"):
        make(tmp_path / "c", stop=Asked(step - 1))
    with pytest.raises(BadInput, match=r"holds less than config.epochs=2: the first step .*cache_teacher --output="):
        open_cache(tmp_path / "c")
    whole_before = {1: 0, 3: 1, 6: 2}[step]  # of 3, 1, 3 and 1 steps
    assert make(tmp_path / "c").written == 4 - whole_before
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")
    assert make(tmp_path / "c").written == 0


def test_a_block_that_the_manifest_does_not_name_does_not_count(tmp_path, monkeypatch):
    """As after a kill between a block and the manifest: its files are there."""
    make(tmp_path / "whole")
    save, saved = store.Writer._save, []

    def killed(writer):
        saved.append(1)
        if len(saved) == 3:  # at the start, and after each block
            raise InterruptedError
        save(writer)

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "_save", killed)
        with pytest.raises(StorageFailure):
            make(tmp_path / "c")
    assert len(list((tmp_path / "c" / "logits").glob("c.*"))) == 2
    assert make(tmp_path / "c").written == 3
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")


def test_storage_that_takes_no_block_is_said(tmp_path):
    make(tmp_path / "c", epochs=1)
    (tmp_path / "c" / "logits" / "c.1.0.0.0").mkdir()  # where a file has to be
    with pytest.raises(StorageFailure, match=r"could not be written in .*/c: .* 2 blocks are whole. Make room"):
        make(tmp_path / "c")
    (tmp_path / "c" / "logits" / "c.1.0.0.0").rmdir()
    assert make(tmp_path / "c").written == 2


def test_epochs_can_be_added(tmp_path):
    make(tmp_path / "c", epochs=1)
    with pytest.raises(BadInput, match=r"less than config.epochs=2: the first step that is not there is 1 of epoch 2"):
        open_cache(tmp_path / "c")
    assert make(tmp_path / "c", epochs=2).written == 2
    make(tmp_path / "whole")
    assert files_of(tmp_path / "c") == files_of(tmp_path / "whole")
    assert make(tmp_path / "c", epochs=1).written == 0
    open_cache(tmp_path / "c", tiny(epochs=1))


@pytest.mark.parametrize("part", ["logits", "check"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_block_is_found_and_made_anew(tmp_path, part, damage):
    make(tmp_path / "c")
    before = files_of(tmp_path / "c")
    (file,) = (tmp_path / "c" / part).glob("c.1.0*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flip" else content[:-5])
    cache, _, _ = open_cache(tmp_path / "c")
    cache.epoch(0)
    with pytest.raises(BadInput, match=r"is damaged, steps 1 to 3 of epoch 2: .* given again, makes anew"):
        cache.epoch(1)
    assert make(tmp_path / "c").written == 1
    assert files_of(tmp_path / "c") == before


def test_a_block_in_the_place_of_another_is_found(tmp_path):
    make(tmp_path / "c")
    for part in ("logits", "check"):
        (one,), (other,) = ((tmp_path / "c" / part).glob(f"c.{epoch}.0*") for epoch in (0, 1))
        shutil.copy(one, other)
    with pytest.raises(BadInput, match="steps 1 to 3 of epoch 2: they are not what was written"):
        open_cache(tmp_path / "c")[0].epoch(1)


def test_logits_that_float16_cannot_hold_are_refused_with_their_images(tmp_path, monkeypatch):
    teach = running.teach

    def taught_to_exaggerate(*arguments):
        taught = teach(*arguments)
        apply = taught.network.apply
        return taught._replace(network=taught.network.replace(apply=lambda v, x: apply(v, x).at[3, 1].set(7e4)))

    monkeypatch.setattr(running, "teach", taught_to_exaggerate)
    with pytest.raises(
        NumericFailure, match=r"of 1 of 16 images of step 1 are not finite, or too large .*: generated 0/3"
    ):
        make(tmp_path / "c")


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"method": "ce"}, {}, "config.method=ce has no teacher"),
        ({"method": "all"}, {"top_k": 3}, "at one temperature, and config.method=all has none"),
        ({"method": "logit_mse"}, {"top_k": 3}, "config.method=logit_mse has none"),
        ({}, {"top_k": 10}, "--top-k=10: mnist5k has 10 classes; leave --top-k out"),
    ],
)
def test_what_cannot_be_cached_is_refused(tmp_path, changes, options, message):
    with pytest.raises(BadInput, match=message):
        make(tmp_path / "c", tiny(**changes), **options)
    assert not (tmp_path / "c").exists()


@pytest.mark.wrong_input
def test_a_manifest_that_is_none_is_refused(tmp_path):
    make(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text("{}")
    with pytest.raises(BadInput, match="is not that of a cache"):
        open_cache(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="is damaged"):
        make(tmp_path / "c")


def test_a_folder_with_other_files_is_not_written_in(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds files that are no cache"):
        make(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == ["notes.txt"]
    with pytest.raises(BadInput, match="notes.txt is a file; give a folder"):
        make(tmp_path / "notes.txt")


def test_the_last_line_is_the_command_that_trains_from_it(tmp_path):
    config = tiny()
    made = make(tmp_path / "c d", config, epochs=1)
    argv = ["cache_teacher", "--config=configs/mnist5k.py", "--config.data.mock=true", "--epochs=1", "--output=c d"]
    first, last = cache_teacher.summary(made, argv, config).splitlines()
    size = sum(len(content) for content in files_of(tmp_path / "c d").values())
    assert f"for 1 epoch, cached in float16: {size / 1e6:,.1f} MB, {size / 64:.0f} bytes an image; 2 blocks" in first
    assert last == (
        "Train from it:  python -m dgkd_jax.main --config=configs/mnist5k.py --config.data.mock=true "
        f"--config.epochs=1 '--config.teacher.cache={tmp_path}/c d'"
    )
