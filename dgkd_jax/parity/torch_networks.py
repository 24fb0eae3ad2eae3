"""PyTorch networks of torchvision, timm and pytorchcv that compute what ours do, and the output of each layer.

Imported only where torch is installed; the three packages only when a network of theirs is asked for. mdistiller and
the DGKD repository, which many of the CIFAR networks come from, are no packages: of those, another package's network
of the same structure stands in where there is one.
"""

import importlib
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from dgkd_jax.torch_port.names import entry_name

_INSTALL = {
    "torchvision": "torchvision",
    "timm": "timm",
    "pytorchcv": "--no-deps pytorchcv==0.0.74",
}


class NotHere(LookupError):
    """No PyTorch implementation of a network can be imported; the message says which is lacking."""


class Network(NamedTuple):
    """A network of another package, with that package's initial weights.

    Attributes:
        module: in evaluation mode.
        source: the package and its version.
        entry: path of our leaf, such as params/layer1_0/conv1/kernel -> this module's `state_dict` entry.
    """

    module: torch.nn.Module
    source: str
    entry: Callable[[str], str]


def create(name: str, model: Any, *, side: int) -> Network:
    """Another package's network that computes what our `model` does.

    Args:
        name: of `dgkd_jax.models.NAMES`.
        model: ours of that name; it knows the structure and the number of classes.
        side: of the square images, in pixels.

    Raises:
        NotHere: there is no such package, or it is not installed.
    """
    found = [(package, build) for pattern, package, build in _BUILDERS if re.fullmatch(pattern, name)]
    if not found:
        raise NotHere(f"no package has a PyTorch implementation of {name}")
    [(package, build)] = found
    torchvision = _imported("torchvision", name)  # timm imports it too
    module, entry = build(name, model, side, torchvision if package == "torchvision" else _imported(package, name))
    version = importlib.metadata.version(package)
    return Network(module.eval(), f"{package} {version}", entry)


def fill(network: Network, entries: Mapping[str, np.ndarray], dtype: str) -> torch.nn.Module:
    """The network's module in `dtype` with these entries, which must be all but the buffers that it makes itself."""
    module = network.module.to(getattr(torch, dtype))
    given = {name: torch.tensor(np.asarray(array, dtype)) for name, array in entries.items()}
    missing, surplus = module.load_state_dict(given, strict=False)
    learned = [name for name in missing if not name.endswith((".num_batches_tracked", ".relative_position_index"))]
    if learned or surplus:
        raise ValueError(f"entries do not fit {network.source}: missing {learned}, surplus {surplus}")
    return module


def outputs(module: torch.nn.Module, images: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
    """What each named submodule returns, in the order of their returning; one that is never called is left out.

    Args:
        module: in evaluation mode.
        images: [batch, channels, height, width], in the module's dtype.
        names: as in `named_modules`; "" is the whole network.
    """
    found: dict[str, np.ndarray] = {}
    hooks = []
    for name in names:
        submodule = module.get_submodule(name)
        # timm's norms hold their activation too, behind an identity; a copy, since activations work in place.
        watched = submodule.drop if hasattr(submodule, "drop") and hasattr(submodule, "running_var") else submodule

        def keep(_, __, output, name=name):
            found[name] = output.detach().numpy(force=True).copy()

        hooks.append(watched.register_forward_hook(keep))
    try:
        with torch.no_grad():
            module(torch.tensor(images))
    finally:
        for hook in hooks:
            hook.remove()
    return found


# ------------------------------------------------------------------------------------------------------------
# Packages
# ------------------------------------------------------------------------------------------------------------

_DECLARED = []  # keeps the declarations alive


def _imported(package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise NotHere(
            f"{package}, which has a PyTorch implementation of {name}, is not installed: "
            f"python -m pip install {_INSTALL[package]}"
        ) from error
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    # torchvision's published build lacks its compiled operators beside another build of torch (a CPU-only one), and
    # does not import unless these two, which no classifier uses, are declared.
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
    return importlib.import_module(package)


# ------------------------------------------------------------------------------------------------------------
# One builder per family: (name, our model, side, package) -> module and `Network.entry`
# ------------------------------------------------------------------------------------------------------------


def _torchvision(name: str, model: Any, side: int, torchvision: ModuleType):
    return getattr(torchvision.models, name)(num_classes=model.num_classes), lambda path: entry_name(path, name)


def _resnet_cifar(name: str, model: Any, side: int, torchvision: ModuleType):
    usual = name.removesuffix("_cifar")
    module, entry = _torchvision(usual, model, side, torchvision)
    module.conv1, module.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    return module, entry


def _shufflenet_v2_cifar(name: str, model: Any, side: int, torchvision: ModuleType):
    module, entry = _torchvision("shufflenet_v2_x1_0", model, side, torchvision)
    module.conv1[0], module.maxpool = torch.nn.Conv2d(3, 24, 1, bias=False), torch.nn.Identity()
    return module, entry


def _vgg(name: str, model: Any, side: int, torchvision: ModuleType):
    """torchvision's convolutions, behind them a mean and one linear layer instead of three."""
    poolings = 4 if side == 64 else 3
    plan, starts = [], [0]  # torchvision's list of widths and poolings, and where in its Sequential a block starts
    for block, (depth, width) in enumerate(zip(model.depths, (64, 128, 256, 512, 512), strict=True)):
        pooling = ["M"] if block < poolings else []
        plan += [width] * depth + pooling
        starts.append(starts[-1] + (3 if model.batch_norm else 2) * depth + len(pooling))
    layers = torchvision.models.vgg.make_layers(plan, batch_norm=model.batch_norm)
    module = torchvision.models.VGG(layers, num_classes=model.num_classes)
    module.avgpool = torch.nn.AdaptiveAvgPool2d(1)
    module.classifier = torch.nn.Linear(512, model.num_classes)

    def entry(path: str) -> str:
        return re.sub(
            r"^block(\d)\.(\d+)", lambda at: f"features.{starts[int(at[1])] + int(at[2])}", entry_name(path, name)
        )

    return module, entry


class _ResampledPositions(torch.nn.Module):
    """timm's network for images of another size than its position embeddings, which are resampled at each call.

    timm's own way (`dynamic_img_size`) does this in float32 whatever the network's dtype.
    """

    def __init__(self, network: torch.nn.Module, patches: int):
        super().__init__()
        self.network, self.patches = network, patches

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        own = self.network.pos_embed
        rows = round((own.shape[1] - 1) ** 0.5)
        grid = own[:, 1:].reshape(1, rows, rows, -1).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, (self.patches,) * 2, mode="bicubic", antialias=True)
        resampled = torch.cat([own[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
        return torch.func.functional_call(self.network, {"pos_embed": resampled}, (images,))


def _vit(name: str, model: Any, side: int, timm: ModuleType):
    module = timm.create_model(name, num_classes=model.num_classes)
    if side == model.image_shape[0]:
        return module, lambda path: entry_name(path, name)
    module.patch_embed.strict_img_size = False
    resampling = _ResampledPositions(module, side // model.patch)
    return resampling, lambda path: f"network.{entry_name(path, name)}"


# Ours count all blocks, timm's those of a stage.
_LITE_PLACES = [(stage, index) for stage, size in enumerate((1, 2, 2, 3, 3, 4, 1)) for index in range(size)]
_LITE_LAYERS = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
_LITE_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE_ENDS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def _efficientnet_lite(name: str, model: Any, side: int, timm: ModuleType):
    def entry(path: str) -> str:
        *block, layer, leaf = entry_name(path, name).split(".")
        if not block:
            return f"{_LITE_ENDS[layer]}.{leaf}"
        number = int(block[1])
        stage, index = _LITE_PLACES[number]
        return f"blocks.{stage}.{index}.{(_LITE_LAYERS if number else _LITE_FIRST_BLOCK)[layer]}.{leaf}"

    return timm.create_model(f"tf_{name}", num_classes=model.num_classes), entry


def _pytorchcv(module: torch.nn.Module, name: str, renames: tuple[tuple[str, str], ...]):
    module.features.final_pool = torch.nn.AdaptiveAvgPool2d(1)  # its own takes 8x8 pixels, of 32-pixel images only

    def entry(path: str) -> str:
        found = entry_name(path, name)
        found = re.sub(
            r"^(?:layer|block)(\d)\.(?:layer\.)?(\d+)",
            lambda at: f"features.stage{at[1]}.unit{int(at[2]) + 1}",
            found,
        )
        for pattern, replacement in renames:
            found = re.sub(pattern, replacement, found)
        return found

    return module, entry


def _thin_resnet(name: str, model: Any, side: int, _: ModuleType):
    resnet_cifar = importlib.import_module("pytorchcv.models.resnet_cifar")
    channels = [[width] * size for size, width in zip(model.stage_sizes, model.widths, strict=True)]
    module = resnet_cifar.CIFARResNet(channels, model.stem_width, bottleneck=False, num_classes=model.num_classes)
    renames = (
        (r"(unit\d+)\.(conv|bn)(\d)\.", r"\1.body.conv\3.\2."),
        (r"downsample\.0", "identity_conv.conv"),
        (r"downsample\.1", "identity_conv.bn"),
        (r"^(conv|bn)1\.", r"features.init_block.\1."),
        (r"^fc\.", "output."),
    )
    return _pytorchcv(module, name, renames)


def _wrn(name: str, model: Any, side: int, _: ModuleType):
    wrn_cifar = importlib.import_module("pytorchcv.models.wrn_cifar")
    channels = [[width * model.widen] * model.blocks for width in (16, 32, 64)]
    module = wrn_cifar.CIFARWRN(channels, 16, num_classes=model.num_classes)
    renames = (
        (r"(unit\d+)\.(conv|bn)(\d)\.", r"\1.body.conv\3.\2."),
        (r"convShortcut", "identity_conv"),
        (r"^conv1\.", "features.init_block."),
        (r"^bn1\.", "features.post_activ.bn."),
        (r"^fc\.", "output."),
    )
    return _pytorchcv(module, name, renames)


# (regular expression that fits our model's whole name, package, builder)
_BUILDERS = (
    (r"resnet(18|34|50|101)", "torchvision", _torchvision),
    (r"resnet(18|34|50|101)_cifar", "torchvision", _resnet_cifar),
    (r"resnet(8|14|20|32|44|56|110|8x4|32x4)", "pytorchcv", _thin_resnet),
    (r"wrn_\d+_\d+", "pytorchcv", _wrn),
    (r"vgg\d+(_bn)?", "torchvision", _vgg),
    (r"(shufflenet_v2_x\d_\d|mobilenet_v2|convnext_\w+|swin_\w+)", "torchvision", _torchvision),
    (r"shufflenet_v2_cifar", "torchvision", _shufflenet_v2_cifar),
    (r"(vit|deit)_\w+", "timm", _vit),
    (r"efficientnet_lite0", "timm", _efficientnet_lite),
)
