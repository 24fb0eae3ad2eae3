"""Which ε is best, against the temperature, the student's width and the number of classes; Fashion-MNIST, 8 epochs.

    apt-get install dataset-fashion-mnist
    python -m dgkd_jax.study --config=configs/study/epsilon.py --cache-teacher --workers=2

Curves, no tests: docs/study_plan.md.
"""

from configs import fashion_mnist
from dgkd_jax.study import Study

EPSILONS = (-3.0, -1.0, -0.3, 0.3, 1.0)  # and 0, which is DKD
_WIDE = "dgkd_jax.models.small:SmallCNN(widths=(16, 32, 48))"


def get_study() -> Study:
    base = fashion_mnist.get_config()
    base.data.name = _images(classes=10)
    base.epochs, base.teacher.epochs = 8, 12
    base.eval_every = 1000.0  # only the last one counts
    base.writers = ()
    arms = {"dkd": {"method": "dkd"}} | {
        f"{epsilon:g}": {"method": "dgkd", "dgkd.convention": "per_sample", "dgkd.epsilon": epsilon}
        for epsilon in EPSILONS
    }
    cells = {
        "T = 4, width 8, 10 classes": {},
        "T = 1": {"dkd.temperature": 1.0},
        "T = 2": {"dkd.temperature": 2.0},
        "T = 8": {"dkd.temperature": 8.0},
        "width 4": {"student.model": "small_cnn_w4"},
        "width 16": {"student.model": _WIDE},
        "3 classes": {"data.name": _images(classes=3)},
        "5 classes": {"data.name": _images(classes=5)},
    }
    return Study(
        name="epsilon",
        about="10,000 Fashion-MNIST images train, the test images evaluate, 8 epochs; teachers small_cnn_w24 (four, 12 "
        "epochs), student small_cnn_w8; `per_sample`, T = 4, β = 2, where nothing else is said.",
        base=base,
        seeds=tuple(range(8)),
        teachers=4,
        arms=arms,
        regimes={name: (overrides, tuple(arms)) for name, overrides in cells.items()},
        baseline="dkd",
        rows="docs/results/epsilon.jsonl",
        decides=False,
    )


def _images(*, classes: int) -> str:
    return f"configs.study.fashion_images:of_classes(classes={classes})"
