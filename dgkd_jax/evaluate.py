"""Exact evaluation: every example of a split counted once, on any number of devices and hosts.

A run's student beside its teacher, on its own and on other sets, is evaluated by a command:

    python -m dgkd_jax.evaluate --workdir=DIR --data=NAME[,NAME…] [--step=best|last|N]
"""

import functools
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dgkd_jax import metrics, sharding, steps


class Evaluator:
    """Compiles the evaluation of one model once, for any number of evaluations.

    Args:
        model: the model's `apply`.
        mesh: where the batches go.
        mean, std: per channel, in units of pixel/255.
    """

    def __init__(self, model: steps.Apply, *, mesh: Mesh, mean: tuple[float, ...], std: tuple[float, ...]):
        self._mesh = mesh
        self._step = jax.jit(
            functools.partial(steps.eval_step, model=model, mean=mean, std=std),
            out_shardings=sharding.replicated(mesh),
        )
        self._add = jax.jit(metrics.merge, donate_argnums=0)

    def __call__(
        self, variables: Any, batches: Iterable[dict[str, np.ndarray]], *, num_examples: int
    ) -> dict[str, float]:
        """Metrics over all rows whose mask is set.

        Args:
            variables: of the model, on the mesh.
            batches: this process's share of the split, padded, with a mask; equally many batches on every process.
            num_examples: the size of the split.

        Returns:
            `accuracy` in [0, 1] and `ce` in nats.

        Raises:
            RuntimeError: the batches did not hold each example exactly once.
        """
        totals = None
        for batch in batches:
            batch_totals = self._step(variables, sharding.to_global(batch, self._mesh))
            totals = batch_totals if totals is None else self._add(totals, batch_totals)
        counted = 0 if totals is None else int(totals["accuracy"][1])
        if counted != num_examples:
            raise RuntimeError(f"evaluation counted {counted} examples where the split has {num_examples}")
        return metrics.compute(totals)


if __name__ == "__main__":
    from dgkd_jax import robustness  # a room above this one

    sys.exit(robustness.main(sys.argv[1:]))
