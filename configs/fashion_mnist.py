"""Fashion-MNIST, 60,000 training and 10,000 test images, from the files of a Debian package.

    apt-get install dataset-fashion-mnist        # or set --config.data.manual_dir to a folder with the four IDX files
    python -m dgkd_jax.main --config=configs/fashion_mnist.py [--config.method=all]

Teacher: small_cnn_w24, 121,186 parameters. Student: small_cnn_w8, 5,026.
"""

from dgkd_jax.runs import default


def get_config():
    config = default.get_config()
    config.name = "fashion_mnist"
    config.student.model = "small_cnn_w8"
    config.teacher.model = "small_cnn_w24"
    config.teacher.epochs = 12
    config.teacher.learning_rate = 0.1

    config.data.name = "fashion_mnist_local"
    config.data.augment = "none"

    config.epochs = 12
    config.batch_size = 128
    config.eval_batch_size = 500
    config.optimizer.learning_rate = 0.1
    config.schedule.name = "cosine"
    config.schedule.warmup_epochs = 1.0

    config.dkd.beta = 2.0
    config.dkd.warmup_epochs = 1.0
    config.eval_every = 2.0
    config.log_every = 100
    return config
