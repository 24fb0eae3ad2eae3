"""ImageNet with a strong recipe of 300 epochs, for students of ResNet-18's size; the argument names the pair.

    python -m dgkd_jax.main --config=configs/imagenet_strong.py:resnet50,resnet18

From torchvision's recipe for ResNet-50 ("How to Train State-Of-The-Art Models Using TorchVision's Latest Primitives",
V. Vryniotis, 2021; its command is quoted in pytorch/vision's issue 3995): batch 1024 (128 on each of eight cards), SGD
with momentum 0.9, rate 0.5 with five epochs of linear warm-up and a cosine, weight decay 2e-5 but none on
normalisation, label smoothing 0.1, mixup 0.2 or CutMix 1.0 by a coin for each batch, TrivialAugment, random erasing
0.1, evaluation at 232 pixels cut to 224, and an average of the weights with decay 0.99998 every 32 steps. That
implementation multiplies 1 - 0.99998 by batch·32/epochs, which is a decay of 1 - 2e-5·1024/300 per step here.

Other than there: 300 epochs instead of 600; images of 224 pixels in training instead of 176 (one size for both here);
no repeated augmentation; moves of pixels take the nearest one, where its script interpolates; the warm-up begins at 0
instead of 1 % of the rate; the head's bias is not decayed either.

Ours: distillation. KD needs no label, so it is the same for mixed images; 0.5·CE + 0.5·KD at T 1 as in
configs/imagenet.py, whose pairs and teacher weights these are. The teacher sees the mixed images too. Not run here: the
build machine had no ImageNet, so no accuracy is promised.
"""

from configs import imagenet


def get_config(pair: str | None = None):
    config = imagenet.get_config(pair)
    config.name = config.name.replace("imagenet", "imagenet-strong", 1)
    config.teacher.workdir = config.teacher.workdir.replace("imagenet", "imagenet-strong", 1)
    config.method = "kd"

    config.data.eval_resize = 232
    config.data.trivial_augment = True
    config.data.random_erasing = 0.1
    config.data.mixup = 0.2
    config.data.cutmix = 1.0
    config.label_smoothing = 0.1

    config.epochs = 300
    config.batch_size = 1024
    config.optimizer.learning_rate = 0.5
    config.optimizer.weight_decay = 2e-5
    config.optimizer.decay_on = "kernels"
    config.optimizer.ema_decay = 1 - 2e-5 * 1024 / 300
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 5.0
    return config
