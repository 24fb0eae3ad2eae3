"""ImageNet, ResNet-50 (torchvision's weights) teaching ResNet-18 by DGKD.

    python -m dgkd_jax.main --config=configs/imagenet_r50_r18.py

Recipe, published accuracies and what was not run: configs/imagenet.py. Data and weights: README.md.
Without either: add --config.data.mock=true to run the same program on generated images.
"""

from configs import imagenet


def get_config():
    return imagenet.get_config("resnet50,resnet18")
