"""Data by an import path: a function that returns splits, and a TFDS builder of the user's own."""

import pytest
from data.read_back import examples

from dgkd_jax.data.open import missing, open_source
from dgkd_jax.errors import BadInput


def test_a_function_that_returns_two_splits_is_a_data_set(section):
    source = open_source(section("own_splits:pair"))
    assert (source.num_train, source.num_eval, source.num_classes) == (30, 12, 3)


def test_a_tfds_builder_is_built_and_read(section):
    data = section("own_splits:Squares", image_size=12)
    assert missing(data) is None
    source = open_source(data)
    assert (source.num_train, source.num_classes, source.eval_split, source.image_shape) == (10, 3, "test", (12, 12, 1))
    assert sorted((image[0], label) for image, label in examples(source)) == [(0, 0), (1, 1), (2, 2), (3, 0)]


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("own_splits:nothing", {}, "gives a int; expected a pair"),
        ("own_splits:none", {}, "has no none"),
        ("own_splits:pair", {"mock": True}, "config.data.mock=True generates images like those of a known set"),
        ("arrays#12345678", {}, "are images from Python, which only Python can give"),
    ],
)
def test_what_gives_no_data_is_named(section, name, values, message):
    with pytest.raises(BadInput, match=message):
        open_source(section(name, **values))
