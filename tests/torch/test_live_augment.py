"""The augmentation on the device against torchvision's v2 transforms: every operation's pixels, every distribution."""

import jax
import numpy as np
import pytest
import torch
from recorded_augment import assert_as_torchvision, recorded, trivially_augmented
from scipy import stats
from torchvision.transforms import v2

from dgkd_jax.data import erasing, mixing
from dgkd_jax.data.trivial_augment import LEVELS, OPERATIONS

DRAWS = 4000
THEIR_NAMES = {
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "autocontrast": "AutoContrast",
}


def theirs(image: np.ndarray, operation: str, level: int, negative: bool) -> np.ndarray:
    """What `TrivialAugmentWide` makes of an image when it draws this."""
    transform, name = v2.TrivialAugmentWide(), THEIR_NAMES.get(operation, operation.capitalize())
    magnitudes, signed = transform._AUGMENTATION_SPACE[name]
    strengths = magnitudes(LEVELS, *image.shape[:2])
    strength = 0.0 if strengths is None else float(strengths[level]) * (-1 if signed and negative else 1)
    changed = transform._apply_image_or_video_transform(
        torch.from_numpy(image).permute(2, 0, 1),
        name,
        strength,
        interpolation=transform.interpolation,
        fill=transform._fill,
    )
    return changed.permute(1, 2, 0).numpy()


def test_the_operations_are_torchvisions():
    names = [THEIR_NAMES.get(operation, operation.capitalize()) for operation in OPERATIONS]
    assert names == list(v2.TrivialAugmentWide._AUGMENTATION_SPACE)


@pytest.mark.parametrize(("side", "channels"), [((32, 32), 3), ((28, 28), 1), ((40, 31), 3)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_level_of_an_operation_gives_torchvisions_pixels(operation, side, channels):
    random = np.random.default_rng(0)
    y, x = np.mgrid[: side[0], : side[1]]
    waves = [128 + 60 * np.sin(x / (4 + k) + k) * np.cos(y / (5 + k)) for k in range(channels)]
    image = np.clip(np.stack(waves, -1) + random.normal(0, 15, (*side, channels)), 12, 245).astype(np.uint8)
    levels, negative = np.repeat(np.arange(LEVELS), 2), np.tile([False, True], LEVELS)
    found = trivially_augmented(image, np.full(len(levels), OPERATIONS.index(operation)), levels, negative)
    for ours, level, sign in zip(found, levels, negative, strict=True):
        assert_as_torchvision(ours, theirs(image, operation, level, sign), operation, level)


def test_what_was_recorded_is_what_torchvision_computes():
    given = recorded()
    for (operation, level, negative), expected in zip(given["choices"], given["augmented"], strict=True):
        computed = theirs(given["images"][0], OPERATIONS[operation], level, bool(negative))
        np.testing.assert_array_equal(computed, expected)
    images, labels = torch.from_numpy(given["images"]).permute(0, 3, 1, 2), torch.from_numpy(given["labels"]).long()
    top, left, bottom, right = (int(corner) for corner in given["cutmix_box"])
    share = 1 - (bottom - top) * (right - left) / (16 * 18)
    for name, transform, parameters, pixels in (
        ("mixup", v2.MixUp(num_classes=4), {"lam": float(given["mixup_lambda"])}, images.float()),
        ("cutmix", v2.CutMix(num_classes=4), {"box": (left, top, right, bottom), "lam_adjusted": share}, images),
    ):
        parameters |= {"labels": labels, "batch_size": 4}
        mixed = transform.transform(pixels, parameters).permute(0, 2, 3, 1)
        np.testing.assert_array_equal(mixed.numpy(), given[f"{name}_images"])
        np.testing.assert_array_equal(transform.transform(labels, parameters).numpy(), given[f"{name}_labels"])
    fill = torch.from_numpy(given["erasing_fill"]).to(torch.uint8)[:, None, None]
    for image, (top, left, bottom, right), expected in zip(
        images, given["erasing_boxes"].tolist(), given["erased"], strict=True
    ):
        erased = v2.functional.erase(image, top, left, bottom - top, right - left, fill)
        np.testing.assert_array_equal(erased.permute(1, 2, 0).numpy(), expected)


def drawn(one):
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(4), DRAWS)))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixing_has_torchvisions_distributions(alpha):
    torch.manual_seed(0)
    height, width = 32, 48
    image = [torch.zeros(2, 3, height, width)]
    bits = {"alpha": alpha, "height": height, "width": width}
    ours = drawn(lambda key: mixing.mixup(jax.random.bits(key, (3,)), **bits).weight)
    expected = [v2.MixUp(alpha=alpha, num_classes=2).make_params(image)["lam"] for _ in range(DRAWS)]
    # Ours are multiples of 1/65536: rounded, since one in ten is nearer to 0 or 1 than that at α = 0.2.
    assert stats.ks_2samp(ours, np.round(np.array(expected) * 2**16) / 2**16).pvalue > 0.01
    mixes = drawn(lambda key: mixing.cutmix(jax.random.bits(key, (3,)), **bits))
    boxes = [v2.CutMix(alpha=alpha, num_classes=2).make_params(image) for _ in range(DRAWS)]
    share = np.array([box["lam_adjusted"] for box in boxes])
    pixels = height * width
    assert stats.ks_2samp(np.round(mixes.weight * pixels), np.round(share * pixels)).pvalue > 0.01
    own = np.ones((DRAWS, height, width))
    for mask, box in zip(own, boxes, strict=True):
        left, top, right, bottom = box["box"]
        mask[top:bottom, left:right] = 0
    tolerance = 5 * np.sqrt(2 * 0.25 / DRAWS)  # five standard errors of the difference of two shares
    np.testing.assert_allclose(mixes.shares.mean(axis=0), own.mean(axis=0), atol=tolerance)


def test_erasing_has_torchvisions_distribution():
    torch.manual_seed(0)
    height, width = 48, 64
    draw = jax.jit(lambda key: erasing.draw(key, batch=DRAWS, probability=1.0, height=height, width=width))
    top, left, bottom, right = np.asarray(draw(jax.random.key(2))).T
    transform, image = v2.RandomErasing(p=1.0), [torch.zeros(3, height, width)]
    theirs = [transform.make_params(image) for _ in range(DRAWS)]
    for name, found in (("i", top), ("j", left), ("h", bottom - top), ("w", right - left)):
        assert stats.ks_2samp(found, [each[name] for each in theirs]).pvalue > 0.01
