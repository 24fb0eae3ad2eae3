"""A study on Fashion-MNIST: trains on the first 10,000 images, evaluates on all 10,000 test images; 8 epochs.

apt-get install dataset-fashion-mnist
python -m dgkd_jax.study --config=configs/study/fashion_mnist.py --workers=2
"""

from configs import fashion_mnist
from configs.study import arms
from dgkd_jax.study import Study


def get_study() -> Study:
    base = fashion_mnist.get_config()
    base.data.train_examples = 10_000
    base.epochs = 8
    base.teacher.epochs = 12
    base.eval_every = 4.0  # an evaluation takes as long as training; only the last one counts
    return Study(
        name="fashion_mnist",
        about="10,000 Fashion-MNIST images train, the 10,000 of the test split evaluate, 8 epochs; teacher "
        "small_cnn_w24 (121k parameters, 12 epochs), student small_cnn_w8 (5.0k).",
        base=base,
        seeds=(0, 1, 2, 3, 4),
        arms=arms.ARMS | arms.with_momenta(base),
        regimes=arms.regimes(few=2000, epochs=8),
        baseline=arms.BASELINE,
    )
