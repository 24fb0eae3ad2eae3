"""Exact evaluation: every example of a split counted once, on any number of devices and hosts."""

import functools
from collections.abc import Callable, Iterable
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
        # On CPUs, programs of several processes that are in flight together can wait for each other for ever.
        self._wait = jax.process_count() > 1 and jax.default_backend() == "cpu"
        self._step = jax.jit(
            functools.partial(steps.eval_step, model=model, mean=mean, std=std),
            out_shardings=sharding.replicated(mesh),
        )
        self._add = jax.jit(metrics.merge, donate_argnums=0)

    def __call__(
        self,
        variables: Any,
        batches: Iterable[dict[str, np.ndarray]],
        *,
        num_examples: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Metrics over all rows whose mask is set.

        Args:
            variables: of the model, on the mesh.
            batches: this process's share of the split, padded, with a mask; equally many batches on every process.
            num_examples: the size of the split.
            stop: asked after every batch, on all processes alike; once true, the evaluation ends.

        Returns:
            `accuracy` in [0, 1] and `ce` in nats; None where it was stopped.

        Raises:
            RuntimeError: the batches did not hold each example exactly once.
        """
        totals = self._totals(variables, batches, stop)
        if totals is None:
            return None
        counted = int(totals["accuracy"][1])
        if counted != num_examples:
            raise RuntimeError(f"evaluation counted {counted} examples where the split has {num_examples}")
        return metrics.compute(totals)

    def count(self, variables: Any, batches: Iterable[dict[str, np.ndarray]]) -> tuple[int, int]:
        """(correct answers, examples) of some batches, at least one."""
        correct, counted = self._totals(variables, batches, lambda: False)["accuracy"]
        return int(correct), int(counted)

    def _totals(
        self, variables: Any, batches: Iterable[dict[str, np.ndarray]], stop: Callable[[], bool]
    ) -> metrics.Totals | None:
        totals = None
        for batch in batches:
            batch_totals = self._step(variables, sharding.to_global(batch, self._mesh))
            totals = batch_totals if totals is None else self._add(totals, batch_totals)
            if self._wait:
                jax.block_until_ready(totals)
            if stop():
                return None
        return totals
