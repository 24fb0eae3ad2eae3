"""Where arrays go on a mesh of eight devices."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dgkd_jax import models
from dgkd_jax.runs import sharding


def test_mesh_covers_all_devices():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(sharding.make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}


@pytest.mark.parametrize("fsdp", [0, 3, 16])
def test_mesh_that_does_not_fit_the_devices_is_refused(fsdp):
    with pytest.raises(ValueError, match=f"mesh.fsdp={fsdp} must divide the number of devices, 8"):
        sharding.make_mesh(fsdp=fsdp)


def test_large_arrays_are_cut_along_their_largest_divisible_dimension_and_small_ones_copied():
    mesh = sharding.make_mesh(fsdp=4)
    large, odd, small = (
        jax.ShapeDtypeStruct(shape, np.float32) for shape in ((3, 3, 512, 1024), (1025, 4, 1027), (8, 8))
    )
    specs = [s.spec for s in jax.tree.leaves(sharding.parameter_shardings([large, odd, small], mesh))]
    assert specs == [P(None, None, None, "fsdp"), P(None, "fsdp"), P()]


def test_a_mesh_without_fsdp_copies_everything():
    large = jax.ShapeDtypeStruct((4096, 4096), np.float32)
    assert sharding.parameter_shardings(large, sharding.make_mesh()).spec == P()


def test_global_batch_keeps_its_rows_in_order_and_cuts_them_over_all_devices():
    mesh = sharding.make_mesh(fsdp=2)
    rows = np.arange(48).reshape(16, 3)
    found = sharding.to_global({"image": rows}, mesh)["image"]
    np.testing.assert_array_equal(found, rows)
    assert {shard.data.shape for shard in found.addressable_shards} == {(2, 3)}


def test_a_large_teacher_is_really_cut_over_fsdp_and_gives_the_logits_of_the_whole_one():
    model = models.create("vgg8", num_classes=10)
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    variables = models.initialise(model, images.shape[1:], 0)
    mesh = sharding.make_mesh(fsdp=4)
    cut = sharding.place(variables, mesh)

    leaves = jax.tree.leaves(variables)
    large = sum(leaf.nbytes for leaf in leaves if leaf.nbytes >= 4 * 2**20)  # divisible by 4 all of them
    rest = sum(leaf.nbytes for leaf in leaves) - large
    assert large > rest > 0
    for device in jax.devices():
        held = [shard.data.nbytes for leaf in jax.tree.leaves(cut) for shard in leaf.addressable_shards
                if shard.device == device]  # fmt: skip
        assert sum(held) == large // 4 + rest

    forward = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
    compiled = forward.lower(cut, sharding.to_global({"image": images}, mesh)["image"]).compile()
    assert [str(s) for s in jax.tree.leaves(compiled.input_shardings[0][0])] == [
        str(leaf.sharding) for leaf in jax.tree.leaves(cut)
    ]
    logits = np.asarray(compiled(cut, sharding.to_global({"image": images}, mesh)["image"]))
    whole = np.asarray(forward(variables, images))
    # Float32; cut weights and smaller batches per device change the order of summation over up to 4,608 products.
    np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
