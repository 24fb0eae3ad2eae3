"""Import paths: what they lead to, and what is said where they lead nowhere."""

import pytest

from dgkd_jax import own_code
from dgkd_jax.errors import BadInput


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "__init__.py").write_text("")
    (tmp_path / "their_package" / "nets.py").write_text(
        "class Net:\n    def __init__(self, width=1, name=''):\n        self.width, self.name = width, name\n"
    )
    (tmp_path / "their_package" / "broken.py").write_text("import math\n\nvalue = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def load(text):
    return own_code.load(text, key="student.model")


@pytest.mark.usefixtures("module")
def test_an_import_path_leads_to_a_value_with_its_arguments():
    assert load("their_package.nets:Net").arguments is None
    found = load("their_package.nets:Net(width=8, name='a:b(c)')").called(key="student.model")
    assert (found.width, found.name) == (8, "a:b(c)")


@pytest.mark.parametrize("text", ["resnet18", "image_folder:x/y", "a.b", ":Net", "a:b.c", "tfds:x y", "1a:Net"])
def test_other_texts_are_no_import_paths(text):
    assert not own_code.is_import_path(text)


@pytest.mark.wrong_input
@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("their_packag.nets:Net", "there is no module their_packag; it is looked for in the current folder"),
        ("their_package.nets:Nett", "their_package.nets has no Nett; did you mean 'Net'"),
        ("their_package.broken:Net", r"importing their_package.broken failed: ZeroDivisionError.*broken.py, line 3"),
        ("their_package.nets:Net(8)", "arguments are written NAME=VALUE"),
        ("their_package.nets:Net(width=open('x'))", "arguments are written NAME=VALUE"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(text, message):
    with pytest.raises(BadInput, match=message):
        load(text)


@pytest.mark.wrong_input
@pytest.mark.usefixtures("module")
def test_arguments_that_the_class_does_not_have_are_named():
    with pytest.raises(BadInput, match=r"config.student.model: Net: TypeError.*depth"):
        load("their_package.nets:Net(depth=3)").called(key="student.model")


def test_the_name_of_an_object_ignores_addresses_and_follows_program_and_values():
    one, moved = (own_code.name_of_given("my net", f"<f at 0x{place}> x + 1") for place in ("7f00", "7fff"))
    assert one == moved
    assert own_code.is_given(one)
    assert own_code.name_of_given("my net", "x + 2") != one != own_code.name_of_given("my net", "x + 1", b"3")
