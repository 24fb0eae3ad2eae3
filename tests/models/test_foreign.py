"""A user's own network computes as it does in its own framework, and what cannot be used is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from own_networks import CLASSES, NNX, SHAPE, Linen, Plain, linear, parameters, two_results

from dgkd_jax import models
from dgkd_jax.errors import BadInput
from dgkd_jax.models import foreign, stored_program

IMAGES = np.random.default_rng(0).normal(size=(7, *SHAPE)).astype(np.float32)


def checked(network, *, num_classes=CLASSES, image_shape=SHAPE):
    found = foreign.architecture(network)
    return foreign.check(found, role="student", data="my images", num_classes=num_classes, image_shape=image_shape)


def trained(architecture, variables, key=0):
    return architecture.apply(variables, IMAGES, train=True, mutable=["batch_stats"], key=jax.random.key(key))


@pytest.mark.slow
def test_a_linen_module_begins_from_its_own_init_and_gives_its_own_logits_and_statistics():
    module, found = Linen(), checked(Linen())
    packed = found.initialise(SHAPE, 3)
    own = module.init({"params": jax.random.key(3)}, jnp.zeros((1, *SHAPE)))
    jax.tree.map(np.testing.assert_array_equal, found.unpacked(packed), own)
    # Compiled or not, products are added in another order.
    np.testing.assert_allclose(found.apply(packed, IMAGES), module.apply(own, IMAGES), rtol=1e-6)
    _, updated = trained(found, packed)
    expected = module.apply(own, IMAGES, train=True, mutable=["batch_stats"], rngs={"params": jax.random.key(0)})[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updated["batch_stats"], expected)


def test_a_module_of_ours_begins_from_the_values_that_it_has_by_its_name():
    module = models.create("small_cnn_w8", num_classes=CLASSES)
    found = checked(module)
    packed = found.initialise(SHAPE, 3)
    own = models.initialise(module, SHAPE, 3)
    jax.tree.map(np.testing.assert_array_equal, found.unpacked(packed), own)
    np.testing.assert_allclose(found.apply(packed, IMAGES), module.apply(own, IMAGES), rtol=1e-6)


def test_a_foreign_module_with_an_attribute_of_that_name_keeps_its_own_values():
    class Named(Linen):
        initial_values: tuple = ("mine",)

    packed, own = (checked(module).initialise(SHAPE, 3) for module in (Named(), Linen()))
    jax.tree.map(np.testing.assert_array_equal, packed, own)


def test_an_nnx_module_gives_its_own_logits_and_statistics_and_stays_as_it_was():
    module = NNX(rngs=nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))))
    found = checked(module)
    packed = found.initialise(SHAPE, 3)
    _, updated = trained(found, packed)
    after = nnx.to_pure_dict(nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, before, after)

    own = nnx.clone(module)
    own.eval()
    np.testing.assert_allclose(found.apply(packed, IMAGES), own(IMAGES), rtol=1e-6)
    own.train()
    own(IMAGES)
    changed = updated["batch_stats"]["norm"]
    np.testing.assert_allclose(changed["mean"], own.norm.mean[...], rtol=1e-6)
    np.testing.assert_allclose(changed["var"], own.norm.var[...], rtol=1e-6)


def test_an_nnx_state_comes_back_as_nnx_takes_it():
    module = NNX(rngs=nnx.Rngs(0))
    found = checked(module)
    packed = jax.tree.map(lambda leaf: leaf + 1, found.initialise(SHAPE, 0))
    nnx.update(module, found.unpacked(packed))
    module.eval()
    np.testing.assert_allclose(module(IMAGES), found.apply(packed, IMAGES), rtol=1e-6)


def test_a_function_begins_from_its_parameters_and_gets_them_back_in_their_form():
    found, given = checked((linear, parameters())), parameters()
    packed = found.initialise(SHAPE, 5)
    np.testing.assert_allclose(found.apply(packed, IMAGES), linear(given, IMAGES), rtol=1e-6)
    back = found.unpacked(packed)
    assert jax.tree.structure(back) == jax.tree.structure(given)
    jax.tree.map(np.testing.assert_array_equal, back, given)


def test_a_linen_module_with_variables_begins_from_them():
    module = Plain()
    own = module.init(jax.random.key(8), jnp.zeros((1, *SHAPE)))
    for network in ((module, own), (module.apply, own)):
        packed = checked(network).initialise(SHAPE, 0)
        jax.tree.map(np.testing.assert_array_equal, packed["params"], own["params"])


@pytest.mark.parametrize("network", [Linen(), NNX(rngs=nnx.Rngs(0))], ids=["linen", "nnx"])
def test_dropout_follows_the_key_and_evaluation_has_none(network):
    found = checked(network)
    packed = found.initialise(SHAPE, 0)
    one, again, other = (np.asarray(trained(found, packed, key)[0]) for key in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(found.apply(packed, IMAGES), found.apply(packed, IMAGES))


def test_the_name_changes_with_the_program_and_the_values_and_not_with_the_process():
    class Other(Linen):
        @nn.compact
        def __call__(self, images, train: bool = False):
            return jnp.tanh(super().__call__(images, train))

    Other.__name__ = "Linen"
    names = [checked(network).name for network in (Linen(), Linen(), Other(), (linear, parameters()))]
    assert names[0] == names[1] != names[2]
    assert all(name.partition("#")[0] == "Linen" for name in names[:3])
    assert checked((linear, parameters(1))).name != names[3] == checked((linear, parameters())).name


@pytest.mark.parametrize("network", [Linen(), NNX(rngs=nnx.Rngs(0)), (linear, parameters())], ids=["linen", "nnx", "f"])
def test_the_stored_program_gives_the_logits_at_any_batch_size(network):
    found = checked(network)
    packed = found.initialise(SHAPE, 0)
    apply = stored_program.from_bytes(stored_program.to_bytes(found, SHAPE))
    for images in (IMAGES, IMAGES[:1]):
        np.testing.assert_allclose(apply(packed, images), found.apply(packed, images), rtol=1e-6, atol=1e-6)


def test_a_network_that_asks_for_the_batch_size_is_stored_too():
    def counts(parameters, images):
        return images.reshape(len(images), -1)[:, :CLASSES] * parameters

    found = checked((counts, np.ones(CLASSES, np.float32)))
    apply = stored_program.from_bytes(stored_program.to_bytes(found, SHAPE))
    packed = found.initialise(SHAPE, 0)
    np.testing.assert_allclose(apply(packed, IMAGES), found.apply(packed, IMAGES), rtol=1e-6)


def test_a_file_that_is_no_stored_program_is_refused():
    with pytest.raises(ValueError, match="no stored program"):
        stored_program.from_bytes(b"something else")


class NeedsMore(nn.Module):
    @nn.compact
    def __call__(self, images, mask):
        return nn.Dense(CLASSES)(images.mean((1, 2)))


class NoParameters(nn.Module):
    @nn.compact
    def __call__(self, images):
        return images.mean((1, 2))


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (object(), "the student is of type object; it must be a Flax Linen module"),
        ((linear, parameters(), 1), "the student is of type tuple"),
        ((two_results, parameters()), "the student two_results returns a tuple of 2; it must return the logits alone"),
        (Linen(classes=4), "the student Linen has 4 outputs, and the labels of my images are of 3 classes"),
        (NeedsMore(), "the student NeedsMore cannot take the images of my images, float32 .*: TypeError.*mask"),
        (NoParameters(), "the student NoParameters has no parameters to train"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_classifier_is_refused(network, message):
    with pytest.raises(BadInput, match=message):
        checked(network)
