"""A study on mnist5k: trains on 4,000 digits, evaluates on 1,000; 20 epochs.

python -m dgkd_jax.study --config=configs/study/mnist5k.py --workers=2
"""

from configs import mnist5k
from configs.study import arms
from dgkd_jax.study import Study


def get_study() -> Study:
    base = mnist5k.get_config()
    base.epochs = 20
    base.teacher.epochs = 20
    base.dkd.warmup_epochs = 2.0
    base.eval_every = 10.0  # an evaluation takes as long as training; only the last one counts
    return Study(
        name="mnist5k",
        about="4,000 MNIST digits train, 1,000 evaluate, 20 epochs; teacher small_cnn_w24 (121k parameters), student "
        "small_cnn_w8 (5.0k).",
        base=base,
        seeds=(0, 1, 2, 3, 4),
        arms=arms.ARMS | arms.with_momenta(base),
        regimes=arms.regimes(few=1000, epochs=20),
        baseline=arms.BASELINE,
    )
