"""The demo: 5,000 MNIST digits from a Python package, for two CPU cores.

    python -m dgkd_jax.main --config=configs/mnist5k.py [--config.method=METHOD,METHOD…|all]

Teacher: small_cnn_w24, 121,186 parameters. Student: small_cnn_w8, 5,026. Training: 4,000 digits; evaluation: 1,000.
Accuracies: the table that `make demo` prints; see README.md.
"""

from dgkd_jax.runs import default


def get_config():
    config = default.get_config()
    config.name = "mnist5k"
    config.student.model = "small_cnn_w8"
    config.teacher.model = "small_cnn_w24"
    config.teacher.epochs = 20
    config.teacher.learning_rate = 0.1

    config.data.name = "mnist5k"
    config.data.augment = "pad_crop"

    config.epochs = 40
    config.batch_size = 128
    config.eval_batch_size = 200
    config.optimizer.learning_rate = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 1.0

    config.dkd.beta = 2.0
    config.dkd.warmup_epochs = 2.0
    config.eval_every = 5.0
    config.log_every = 31
    return config
