"""ImageNet with mdistiller's recipe and torchvision's teacher weights; the argument names the pair of networks.

    python -m dgkd_jax.main --config=configs/imagenet.py:resnet50,resnet18

The pair can be any two names of dgkd_jax.models.NAMES. All have one recipe. A teacher that is not in `WEIGHTS` is
trained first, by the same recipe, once; or give --config.teacher.weights=FILE.

Recipe: batch 512, SGD with momentum 0.9, learning rate 0.2 divided by 10 after 30, 60 and 90 of 100 epochs, weight
decay 1e-4, T 1, α 1, β 0.5, warm-up 1 (mdistiller, configs/imagenet/r34_r18/dkd.yaml); KD with 0.5·CE + 0.5·KD at T 1
(kd.yaml there). Data preparation and hardware: README.md. Not run here: the build machine had no ImageNet.

Published accuracies, top-1 % (validation split). mdistiller: resnet34,resnet18 KD 71.03, DKD 71.70 (teacher 73.31).
DIST's README: resnet50,resnet18 KD 71.35. TTM's README, resnet34,resnet18: NKD 71.96, DIST 72.07, WTTM 72.19; KD of
standardised logits 71.42 (its authors). NKD and DIST have their authors' ImageNet settings by default.
The DGKD blog, DKD / DGKD, with a trainer that freezes BatchNorm:
resnet50,resnet18 45.48 / 48.42; resnet50,shufflenet_v2_x1_0 45.59 / 44.90; vit_small_patch16_224,resnet18 41.57 /
41.81; vit_small_patch16_224,shufflenet_v2_x1_0 39.42 / 39.74; self-distilled resnet18 46.40 / 48.29, resnet50 48.06 /
48.09, resnet101 0.50 / 30.49.
"""

from configs import pairs
from dgkd_jax.runs import default

PAIRS = {
    "resnet34,resnet18": {},
    "resnet50,resnet18": {},
    "resnet50,shufflenet_v2_x1_0": {},
    "vit_small_patch16_224,resnet18": {},
    "vit_small_patch16_224,shufflenet_v2_x1_0": {},
    "resnet18,resnet18": {},
    "resnet50,resnet50": {},
    "resnet101,resnet101": {},
}

# torchvision's first weights of each network (IMAGENET1K_V1), which the published tables used.
WEIGHTS = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "vit_small_patch16_224": "vit_small_patch16_224.safetensors",
}


def get_config(pair: str | None = None):
    teacher, student, _, note = pairs.choose(pair, PAIRS, default="resnet50,resnet18", file="configs/imagenet.py")
    config = default.get_config()
    config.note = note
    config.name = f"imagenet-{teacher}-{student}"
    config.teacher.model = teacher
    if teacher in WEIGHTS:
        config.teacher.weights = f"weights/{WEIGHTS[teacher]}"
    else:
        config.teacher.workdir = f"runs/imagenet-teachers/{teacher}"  # shared by all pairs with this teacher
        config.note += f". It trains {teacher} first, unless --config.teacher.weights names its weights"
    config.teacher.epochs = 100
    config.teacher.learning_rate = 0.2
    if teacher == "vit_small_patch16_224":  # timm's weights were trained on pixels in [-1, 1]
        config.teacher.mean = config.teacher.std = (0.5, 0.5, 0.5)
    config.student.model = student

    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.data.augment = "random_resized_crop"
    config.data.eval_resize = 256
    config.data.readers = 32  # up to 32 processes then read only their own share
    config.data.shuffle_buffer = 512  # per reader: 16,384 JPEGs in total, about 1.8 GB on a single host

    config.epochs = 100
    config.batch_size = 512
    config.eval_batch_size = 1024
    config.optimizer.learning_rate = 0.2
    config.optimizer.weight_decay = 1e-4
    config.schedule.milestones = (30, 60, 90)

    config.kd.ce_weight = 0.5
    config.kd.weight = 0.5
    config.kd.temperature = 1.0
    config.dkd.temperature = 1.0
    config.dkd.beta = 0.5
    config.dkd.warmup_epochs = 1.0
    config.checkpoint_every = 1000
    config.log_every = 100
    return config
