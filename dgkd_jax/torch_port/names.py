"""PyTorch's entry name for each of our leaves: one table of substitutions per family of models."""

import re

from dgkd_jax.errors import BadInput

Substitutions = tuple[tuple[str, str], ...]

_EVERY_FAMILY: Substitutions = (
    (r"^(params|batch_stats)/", ""),
    (r"/(kernel|scale)$", "/weight"),
    (r"/(mean|var)$", r"/running_\1"),
)
_IN_SEQUENTIAL: Substitutions = ((r"_(\d+)/", r"/\1/"),)  # the n-th child of a Sequential: layer1_0/ is layer1.0.
_RESNET_MDISTILLER: Substitutions = (*_IN_SEQUENTIAL, ("downsample", "shortcut"), ("^fc/", "linear/"))
_VGG: Substitutions = (*_IN_SEQUENTIAL, ("^fc/", "classifier/"))
_WRN: Substitutions = ((r"^(block\d)_(\d+)/", r"\1/layer/\2/"), ("shortcut", "convShortcut"))
_SHUFFLENET_V1_CIFAR: Substitutions = (*_IN_SEQUENTIAL, ("^fc/", "linear/"))
_SHUFFLENET_V2_CIFAR: Substitutions = (
    (r"^stem_(conv|bn)/", r"\g<1>1/"),
    (r"^last_(conv|bn)/", r"\g<1>2/"),
    (r"_0/right_(conv|bn)3/", r"_0/\g<1>5/"),  # in a stage's first unit the numbers continue from the left side
    (r"_0/right_(conv|bn)2/", r"_0/\g<1>4/"),
    (r"_0/right_(conv|bn)1/", r"_0/\g<1>3/"),
    (r"/(left|right)_", "/"),
    ("^stage2_", "layer1_"),
    ("^stage3_", "layer2_"),
    ("^stage4_", "layer3_"),
    *_SHUFFLENET_V1_CIFAR,
)
_SHUFFLENET_V2: Substitutions = (
    ("^stem_conv/", "conv1_0/"),
    ("^stem_bn/", "conv1_1/"),
    ("^last_conv/", "conv5_0/"),
    ("^last_bn/", "conv5_1/"),
    ("left_conv1/", "branch1_0/"),
    ("left_bn1/", "branch1_1/"),
    ("left_conv2/", "branch1_2/"),
    ("left_bn2/", "branch1_3/"),
    ("right_conv1/", "branch2_0/"),
    ("right_bn1/", "branch2_1/"),
    ("right_conv2/", "branch2_3/"),
    ("right_bn2/", "branch2_4/"),
    ("right_conv3/", "branch2_5/"),
    ("right_bn3/", "branch2_6/"),
    *_IN_SEQUENTIAL,
)
_MOBILENET_V2_MDISTILLER: Substitutions = (
    ("^stem_conv/", "conv1/0/"),
    ("^stem_bn/", "conv1/1/"),
    ("^last_conv/", "conv2/0/"),
    ("^last_bn/", "conv2/1/"),
    (r"^stage(\d)_(\d)/", r"blocks/\1/\2/conv/"),
    ("/expand/", "/0/"),
    ("/expand_bn/", "/1/"),
    ("/depthwise/", "/3/"),
    ("/depthwise_bn/", "/4/"),
    ("/project/", "/6/"),
    ("/project_bn/", "/7/"),
    ("^fc/", "classifier/0/"),
)
_MOBILENET_V2: Substitutions = (
    ("^stem_conv/", "features/0/0/"),
    ("^stem_bn/", "features/0/1/"),
    ("^last_conv/", "features/18/0/"),
    ("^last_bn/", "features/18/1/"),
    ("^stage0_0/depthwise/", "stage0_0/0/0/"),  # the block without the expanding convolution
    ("^stage0_0/depthwise_bn/", "stage0_0/0/1/"),
    ("^stage0_0/project/", "stage0_0/1/"),
    ("^stage0_0/project_bn/", "stage0_0/2/"),
    ("/expand/", "/0/0/"),
    ("/expand_bn/", "/0/1/"),
    ("/depthwise/", "/1/0/"),
    ("/depthwise_bn/", "/1/1/"),
    ("/project/", "/2/"),
    ("/project_bn/", "/3/"),
    *(  # PyTorch numbers blocks across stages, which have 1, 2, 3, 4, 3, 3, 1
        (f"^stage{stage}_{index}/", f"features/{1 + before + index}/conv/")
        for stage, (before, size) in enumerate(((0, 1), (1, 2), (3, 3), (6, 4), (10, 3), (13, 3), (16, 1)))
        for index in range(size)
    ),
    ("^fc/", "classifier/1/"),
)
_EFFICIENTNET_LITE: Substitutions = (
    *_IN_SEQUENTIAL,
    (r"(^|/)(?=[a-z]\w*/)", r"\1_"),  # blocks/3/bn1/ is _blocks.3._bn1.
)
_VIT: Substitutions = (("^patch_embed_proj/", "patch_embed/proj/"), (r"^blocks_(\d+)/", r"blocks/\1/"))
_NUMBERED: Substitutions = ((r"_(\d+)(?=[_/])", r"/\1"),)  # features_1_0/ is features.1.0.
_CONVNEXT: Substitutions = (
    ("/dwconv/", "/block/0/"),
    ("/norm/", "/block/2/"),
    ("/mlp/fc1/", "/block/3/"),
    ("/mlp/fc2/", "/block/5/"),
    *_NUMBERED,
)
_SWIN: Substitutions = (
    ("/mlp/fc1/", "/mlp/0/"),
    ("/mlp/fc2/", "/mlp/3/"),
    (r"/relative_position_bias_table$", r"/attn\g<0>"),
    *_NUMBERED,
)

# (regular expression for the model's whole name, substitutions to apply after those common to all families)
_FAMILIES: tuple[tuple[str, Substitutions], ...] = (
    (r"resnet(18|34|50|101)_cifar", _RESNET_MDISTILLER),
    (r"resnet\d+(x4)?", _IN_SEQUENTIAL),
    (r"vgg\d+(_bn)?", _VGG),
    (r"wrn_\d+_\d+", _WRN),
    (r"shufflenet_v1_cifar", _SHUFFLENET_V1_CIFAR),
    (r"shufflenet_v2_cifar", _SHUFFLENET_V2_CIFAR),
    (r"shufflenet_v2_x\d_\d", _SHUFFLENET_V2),
    (r"mobilenet_v2", _MOBILENET_V2),
    (r"mobilenet_v2_half_cifar", _MOBILENET_V2_MDISTILLER),
    (r"small_cnn_w\d+", ()),
    (r"efficientnet_lite\d", _EFFICIENTNET_LITE),
    (r"(vit|deit)_\w+", _VIT),
    (r"convnext_\w+", _CONVNEXT),
    (r"swin_\w+", _SWIN),
)


def entry_name(path: str, name: str) -> str:
    """PyTorch's entry name of a leaf.

    Args:
        path: of the leaf, for example params/layer1_0/conv1/kernel.
        name: the model's name; it selects the table.

    Raises:
        BadInput: no table covers the name.
    """
    table = next((table for pattern, table in _FAMILIES if re.fullmatch(pattern, name)), None)
    if table is None:
        raise BadInput(f"model {name!r} has no table of PyTorch names; names are in dgkd_jax.models.NAMES")
    for pattern, replacement in (*_EVERY_FAMILY, *table):
        path = re.sub(pattern, replacement, path)
    return path.replace("/", ".")
