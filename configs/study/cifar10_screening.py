"""The screening on photographs: many arms, five seeds, on a validation part of CIFAR-10's training images.

    CIFAR10_FOLDER=DIR python -m dgkd_jax.study --config=configs/study/cifar10_screening.py

docs/study_plan.md was written before the first run and says what is decided by it.
"""

from configs.study import arms
from configs.study.cifar10_images import MEAN, STD
from dgkd_jax.runs import default
from dgkd_jax.study import Study


def get_base(part: str):
    """The recipe that the screening and its confirmation share; `part` is a function of cifar10_images."""
    config = default.get_config()
    config.name = "cifar10"
    config.teacher.model, config.student.model = "resnet20", "resnet8"
    config.teacher.epochs, config.teacher.learning_rate = 60, 0.1
    config.data.name = f"configs.study.cifar10_images:{part}"
    config.data.augment = "pad_crop_flip"
    config.data.mean, config.data.std = MEAN, STD
    config.epochs = 30
    config.batch_size = 128
    config.eval_batch_size = 500
    config.optimizer.learning_rate = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 1.0
    config.dkd.beta = 2.0
    config.dkd.warmup_epochs = 2.0
    config.eval_every = 1000.0  # only the last one counts
    config.log_every = 78
    config.writers = ()
    return config


def get_study() -> Study:
    base = get_base("screening")
    screened = arms.screened(base)
    return Study(
        name="cifar10_screening",
        about="10,000 CIFAR-10 photographs train, 10,000 others of the training images evaluate, 30 epochs; teachers "
        "resnet20 (three, 60 epochs), student resnet8.",
        base=base,
        seeds=(0, 1, 2, 3, 4),
        teachers=3,
        arms=screened,
        regimes=arms.screened_regimes(screened),
        baseline=arms.BASELINE,
        rows="docs/results/cifar10_screening.jsonl",
        decides=False,
    )
