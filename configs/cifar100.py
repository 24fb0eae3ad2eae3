"""CIFAR-100 with the published recipes; the argument names the pair of networks. The teacher is trained first, once.

    python -m dgkd_jax.main --config=configs/cifar100.py:resnet56,resnet20 [--config.method=METHOD]

The pair can be any two names of dgkd_jax.models.NAMES. One that is not published takes the recipe of the nearest pair
that is (the most similar student, then teacher: configs/pairs.py), and the run says which. The networks get images of
224 pixels where the name of one ends so, as ViT's do, else of 32.

Recipe: 240 epochs, SGD with momentum 0.9, weight decay 5e-4, batch 64, learning rate 0.05 (0.01 for ShuffleNet and
MobileNet students) divided by 10 after 150, 180 and 210 epochs, T 4, α 1, warm-up 20, CE 1, β per pair. Source:
mdistiller (configs/cifar100/dkd), with the schedule of RepDistiller. Not run here: it takes hours on a GPU.
The peers: NKD with γ 3.5 and T 3 (cls_KD), DIST with T 4 (image_classification_sota), GDKD's w1 and w2 per pair (GDKD,
configs/cifar100/gdkd). WTTM's weight and γ are tuned per pair and not published together: ours are not its table's.
Standardised logits in KD: --config.kd.standardize=true --config.kd.temperature=2 --config.kd.weight=9
--config.kd.ce_weight=0.1 (logit-standardization-KD; T 3 for vgg13_bn,vgg8_bn).

Published accuracies to expect, top-1 % on the test split (RepDistiller: teacher, student, KD; mdistiller: DKD):

    pair                               teacher  student   KD      DKD
    resnet32x4,resnet8x4                79.42    72.50   73.33   76.32
    resnet56,resnet20                   72.34    69.06   70.66   71.97
    resnet110,resnet32                  74.31    71.14   73.08   74.11
    wrn_40_2,wrn_16_2                   75.61    73.26   74.92   76.23
    wrn_40_2,wrn_40_1                   75.61    71.98   73.54   74.81
    vgg13_bn,vgg8_bn                    74.64    70.36   72.98   74.68
    resnet32x4,shufflenet_v1_cifar      79.42    70.50   74.07   76.45
    resnet32x4,shufflenet_v2_cifar      79.42    71.82   74.45   77.07
    resnet50_cifar,mobilenet_v2_half_cifar  79.34  64.60 67.35   70.35

The peers there, from their READMEs (KD-S, DKD-S: with standardised logits, from logit-standardization-KD; DIST, WTTM:
from TTM's):

    pair                                KD-S   DKD-S   DIST    WTTM
    resnet32x4,resnet8x4                76.62  77.01   76.31   76.06
    resnet56,resnet20                   71.43  72.32   71.75   71.92
    resnet110,resnet32                  74.17  74.29   73.69   74.13
    wrn_40_2,wrn_16_2                   76.11  76.39   75.51   76.37
    wrn_40_2,wrn_40_1                   74.37  74.89   74.73   74.58
    vgg13_bn,vgg8_bn                    74.36  74.81   73.89   74.44
    resnet32x4,shufflenet_v1_cifar        –      –     76.34   74.37
    resnet32x4,shufflenet_v2_cifar      75.56  77.37   77.35   76.55
    resnet50_cifar,mobilenet_v2_half_cifar  69.02  70.45  68.66  69.59

and in the DGKD blog (DKD / DGKD; its trainer freezes BatchNorm from the second epoch on, so do not expect its numbers):

    resnet50_cifar,resnet18_cifar               61.07 / 62.01
    vit_small_patch16_224,resnet18_cifar        57.31 / 58.64
    resnet18_cifar,resnet18_cifar               61.53 / 62.35
    resnet50_cifar,resnet50_cifar               54.31 / 53.39
    resnet101_cifar,resnet101_cifar             48.99 / 55.94
    shufflenet_v2_cifar,resnet50_cifar          56.48 / 55.49
    shufflenet_v2_cifar,vit_small_patch16_224   55.84 / 55.56

The DGKD repository publishes no recipe for those that trains properly: they use the recipe above and mdistiller's
default β.
"""

from configs import pairs
from dgkd_jax.runs import default

_SLOW = {"learning_rate": 0.01}  # ShuffleNet and MobileNet students

PAIRS = {
    "resnet32x4,resnet8x4": {"beta": 8.0},
    "resnet56,resnet20": {"beta": 2.0, "gdkd": (1.0, 1.0)},
    "resnet110,resnet32": {"beta": 2.0, "gdkd": (2.0, 2.0)},
    "wrn_40_2,wrn_16_2": {"beta": 6.0, "gdkd": (6.0, 6.0)},
    "wrn_40_2,wrn_40_1": {"beta": 6.0, "gdkd": (2.0, 6.0)},
    "vgg13_bn,vgg8_bn": {"beta": 6.0, "gdkd": (1.0, 6.0)},
    "resnet32x4,shufflenet_v1_cifar": {"beta": 8.0, **_SLOW},
    "resnet32x4,shufflenet_v2_cifar": {"beta": 8.0, **_SLOW},
    "resnet50_cifar,mobilenet_v2_half_cifar": {"beta": 8.0, **_SLOW},
    "resnet50_cifar,resnet18_cifar": {"beta": 8.0},
    "vit_small_patch16_224,resnet18_cifar": {"beta": 8.0},
    "resnet18_cifar,resnet18_cifar": {"beta": 8.0},
    "resnet50_cifar,resnet50_cifar": {"beta": 8.0},
    "resnet101_cifar,resnet101_cifar": {"beta": 8.0},
    "shufflenet_v2_cifar,resnet50_cifar": {"beta": 8.0},
    "shufflenet_v2_cifar,vit_small_patch16_224": {"beta": 8.0},
}


def get_config(pair: str | None = None):
    teacher, student, recipe, note = pairs.choose(pair, PAIRS, default="resnet56,resnet20", file="configs/cifar100.py")
    side = pairs.image_side(teacher, student)
    config = default.get_config()
    config.note = note
    config.name = f"cifar100-{teacher}-{student}"
    config.teacher.model = teacher
    # Shared by all pairs with this teacher and images of this size.
    resized = f"-{side}" if side != pairs.image_side(teacher) else ""
    config.teacher.workdir = f"runs/cifar100-teachers/{teacher}{resized}"
    config.student.model = student

    config.data.name = "cifar100"
    config.data.augment = "pad_crop_flip"
    config.data.image_size = side or 32
    config.data.eval_resize = side
    config.eval_batch_size = 512

    config.optimizer.learning_rate = recipe.get("learning_rate", 0.05)
    config.dkd.beta = recipe.get("beta", 8.0)  # mdistiller's default
    config.gdkd.w1, config.gdkd.w2 = recipe.get("gdkd", (8.0, 8.0))
    config.nkd.gamma = 3.5
    config.nkd.temperature = 3.0
    config.dist.temperature = 4.0
    config.log_every = 200
    return config
