"""Thin ResNets for 32-pixel images, as RepDistiller, mdistiller and the DGKD repository build them.

Source: He et al., arXiv:1512.03385, section 4.2 (depth = 6n + 2: three stages of n blocks), but with a 1x1
convolution in the shortcut where the shape changes. In those repositories' `x4` networks the stages are four times as
wide, and the stem has 32 channels.
"""

from functools import partial

from dgkd_jax.models.resnet import BasicBlock, ResNet


def _thin(depth: int, *, stem_width: int = 16, widths: tuple[int, int, int] = (16, 32, 64)) -> partial:
    return partial(
        ResNet,
        block=BasicBlock,
        stage_sizes=((depth - 2) // 6,) * 3,
        widths=widths,
        stem_width=stem_width,
        image_shape=(32, 32, 3),
        imagenet_stem=False,
    )


MODELS = {f"resnet{depth}": _thin(depth) for depth in (8, 14, 20, 32, 44, 56, 110)} | {
    f"resnet{depth}x4": _thin(depth, stem_width=32, widths=(64, 128, 256)) for depth in (8, 32)
}
