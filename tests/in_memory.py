"""A set of images that lies in memory, for the tests of what reads it from the host and from the device."""

import numpy as np
from small_runs import small

from dgkd_jax.data.open import open_source

EPOCH, BATCH, EXAMPLES, SIZE = 4, 16, 70, 16


def tiny(**changes):
    """Three epochs of four steps, everything that carries state."""
    own = {
        "method": "dkd",
        "data.mock_train_examples": EXAMPLES,
        "data.mock_eval_examples": 21,
        "eval_batch_size": 24,
        "epochs": 3,
        "log_every": 3,
        "eval_every": 2.0,
        "optimizer.ema_decay": 0.9,
        "checkpoint_every": 5,
        "keep_checkpoints": 9,
    }
    return small(**own | changes)


class InMemory:
    """A fixed set of generated images, streamed with numpy's own padding and cutting, or given whole."""

    def __init__(self, config, *, on_device):
        self._source, self.on_device = open_source(config.data), on_device
        self._set = next(self._source.train_batches(seed=99, batch_size=EXAMPLES, start_step=0))

    def __getattr__(self, name):
        return getattr(self._source, name)

    def train_set(self):
        return self._set

    def epoch_rows(self, *, seed, batch_size, epoch, process_index=0, process_count=1):
        assert (process_index, process_count) == (0, 1)
        random = np.random.default_rng((seed, epoch))
        index = random.permutation(EXAMPLES)[: EPOCH * batch_size].astype(np.int32).reshape(EPOCH, batch_size)
        return {"index": index, "window": random.integers(0, (5, 5, 2), (EPOCH, batch_size, 3), np.int32)}

    def train_batches(self, *, seed, batch_size, start_step, **_):
        for step in range(start_step, 3 * EPOCH + 1):
            rows = self.epoch_rows(seed=seed, batch_size=batch_size, epoch=step // EPOCH)
            images = []
            for index, (top, left, mirrored) in zip(
                rows["index"][step % EPOCH], rows["window"][step % EPOCH], strict=True
            ):
                padded = np.zeros((SIZE + 4, SIZE + 4, 1), np.uint8)
                padded[2:-2, 2:-2] = self._set["image"][index]
                image = padded[top : top + SIZE, left : left + SIZE]
                images.append(image[:, ::-1] if mirrored else image)
            yield {"image": np.stack(images), "label": self._set["label"][rows["index"][step % EPOCH]]}
