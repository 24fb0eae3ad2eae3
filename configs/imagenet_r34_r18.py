"""ImageNet, ResNet-34 (torchvision's weights) teaching ResNet-18: the pair of mdistiller's table (KD 71.03, DKD 71.70).

    python -m dgkd_jax.main --config=configs/imagenet_r34_r18.py --config.method=dkd

Recipe, published accuracies and what was not run: configs/imagenet.py. Data and weights: README.md.
"""

from configs import imagenet


def get_config():
    return imagenet.get_config("resnet34,resnet18")
