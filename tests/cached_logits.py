"""Caches of generated batches, for the tests of what writes and what reads them."""

import itertools

import numpy as np
from etils import epath
from small_runs import small

from dgkd_jax.training.cached_logits import make as making
from dgkd_jax.training.cached_logits import source as cached_logits
from dgkd_jax.training.cached_logits import store
from dgkd_jax.training.run import prepare

EPOCH, BATCH, CLASSES = 4, 16, 10  # steps, rows, classes of `tiny`


def tiny(**changes):
    """Two epochs of four steps on generated images; the teacher has random weights."""
    own = {
        "method": "dkd",
        "student.model": "small_cnn_w4",
        "teacher.weights": "nowhere.npz",
        "data.mock_train_examples": 70,  # 4 batches and a rest
        "data.mock_eval_examples": 16,
        "eval_batch_size": 8,
        "epochs": 2,
        "log_every": 1,
        "diagnose": False,
    }
    return small(**own | changes)


def use_small_blocks(monkeypatch, tmp_path):
    """Three steps a block, so that an epoch has a whole and a shorter one; runs/ is under tmp_path."""
    monkeypatch.setattr(store, "_BLOCK_STEPS", 3)
    monkeypatch.chdir(tmp_path)


def make(folder, config=None, **options):
    return making.make(config or tiny(), str(folder), **options)


def taught_by(config) -> tuple:
    return prepare(config, stop=lambda: False)


def open_cache(folder, config=None):
    config = config or tiny()
    source, _, taught = taught_by(config)
    cache = cached_logits.Cache(epath.Path(folder), config, teacher=taught.network.fingerprint, source=source)
    return cache, source, taught.network


def live_logits(config, *, first=0, count=2 * EPOCH) -> tuple[list[dict], list[np.ndarray]]:
    """The batches of a run, and what its teacher says of them one by one."""
    source, _, taught = taught_by(config)
    batches = list(
        itertools.islice(source.train_batches(seed=config.seed, batch_size=config.batch_size, start_step=first), count)
    )
    return batches, [np.asarray(taught.network.logits(batch)) for batch in batches]


def rounding(logits: np.ndarray) -> np.ndarray:
    """Half a unit in the last place of float16, 2⁻¹¹ of a number or 2⁻²⁵, and float32's sums in another order."""
    return np.abs(logits) * (2.0**-11 + 1e-5) + 2.0**-25 + 1e-6


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def plain_top_k(v, y, k, t):
    """The dense logits that top-k stands for, in Python: one row."""
    others = sorted((j for j in range(len(v)) if j != y), key=lambda j: -v[j])
    kept, rest = [y, *others[: k - 1]], others[k - 1 :]
    mass = sum(np.exp(v[j] / t) for j in rest)
    return [v[j] if j in kept else t * np.log(mass / len(rest)) for j in range(len(v))]
