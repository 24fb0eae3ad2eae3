"""Trains a teacher, distils a student, prints a table: python -m dgkd_jax.main --config=FILE [--config.KEY=VALUE …]

Example: python -m dgkd_jax.main --config=configs/mnist5k.py --config.method=all --config.seed=1
"""

import sys
from collections.abc import Callable

import jax
from absl import flags
from ml_collections import ConfigDict

from dgkd_jax.runs import launch
from dgkd_jax.training import result
from dgkd_jax.training.run import run

_WORKDIR = flags.DEFINE_string("workdir", None, "where everything is left; default runs/NAME/METHOD-seedSEED")


def main(argv: list[str]) -> int:
    """Do the run that the command line describes; returns the exit code."""

    def work(config: ConfigDict, stop: Callable[[], bool]) -> None:
        results = run(config, _WORKDIR.value, stop=stop)
        if jax.process_index() == 0:
            print(f"\n{result.table(results)}\nEverything is in {', '.join(found['workdir'] for found in results)}")

    return launch.command(argv, usage=__doc__.strip(), work=work)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
