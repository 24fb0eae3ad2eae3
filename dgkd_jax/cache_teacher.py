"""Stores the teacher's logits of every training batch, so that students of the same seed need not run the teacher.

    python -m dgkd_jax.cache_teacher --config=FILE [--config.KEY=VALUE …] [--epochs=E] [--output=DIR] [--top-k=K]

--epochs  how many epochs to store (default: config.epochs); the same command with a larger number adds more later
--output  the folder (default: runs/NAME/teacher-logits-seedSEED)
--top-k   store the label's logit and the K-1 largest others of each image, and the log-sum of the rest at the
          temperature of --config.method; 0 (default) stores all classes. Saves space with hundreds of classes

The teacher is the one that `python -m dgkd_jax.main` uses with the same arguments; it is trained first if necessary.
After an interruption give the same command again: it continues, and replaces damaged blocks. Then train with
--config.teacher.cache=DIR.

Example: python -m dgkd_jax.cache_teacher --config=configs/mnist5k.py --epochs=5
"""

import os
import re
import shlex
import sys
from collections.abc import Callable

import jax
from absl import flags
from ml_collections import ConfigDict

from dgkd_jax.runs import launch
from dgkd_jax.training.cached_logits import store
from dgkd_jax.training.cached_logits.fill import Made
from dgkd_jax.training.cached_logits.make import make

_EPOCHS = flags.DEFINE_integer("epochs", None, "epochs to store; default config.epochs", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "folder of the cache; default runs/NAME/teacher-logits-seedSEED")
_TOP_K = flags.DEFINE_integer("top-k", 0, "classes to store of each image; 0 = all", lower_bound=0)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""

    def work(config: ConfigDict, stop: Callable[[], bool]) -> None:
        made = make(config, _OUTPUT.value, epochs=_EPOCHS.value, top_k=_TOP_K.value, stop=stop)
        if jax.process_index() == 0:
            print(summary(made, argv, config))

    return launch.command(argv, usage=__doc__.strip(), work=work)


def summary(made: Made, argv: list[str], config: ConfigDict) -> str:
    """Text for the user: what was stored, its size, and the command that trains from it."""
    size = store.size_on_disk(made.folder)
    images = made.epochs * made.about.steps_per_epoch * made.about.batch_size
    given = [argument for argument in argv[1:] if re.match("--?config(?!.teacher.cache=)", argument)]
    if made.epochs < config.epochs:
        given.append(f"--config.epochs={made.epochs}")
    command = shlex.join(["python", "-m", "dgkd_jax.main", *given, f"--config.teacher.cache={os.fspath(made.folder)}"])
    return (
        f"{made.folder}: the logits of {config.teacher.model} (weights {made.about.teacher}) for "
        f"{_counted(made.epochs, 'epoch')}, {made.about.description}: {size / 1e6:,.1f} MB, "
        f"{size / images:.0f} bytes an image; {_counted(made.written, 'block')} written now\n"
        f"Train from it:  {command}"
    )


def _counted(number: int, thing: str) -> str:
    return f"{number or 'no'} {thing}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
