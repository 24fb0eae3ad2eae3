"""Exact evaluation: every example of a split counted once, on any number of devices and hosts.

A run's student beside its teacher, on its own and on other sets, is evaluated by a command:

    python -m dgkd_jax.evaluate --workdir=DIR --data=NAME[,NAME…] [--step=best|last|N]
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dgkd_jax import metrics, models, sharding, steps
from dgkd_jax.analysis import calibration, collapse

# With more classes than this their accuracies are left out: a line of the metrics would be mostly that.
MOST_CLASSES_LISTED = 1000


class Evaluator:
    """Compiles the evaluation of one model once, for any number of evaluations.

    Args:
        model: the model's `apply`.
        mesh: where the batches go.
        mean, std: per channel, in units of pixel/255.
        diagnose: besides accuracy and cross-entropy whatever `__call__` lists. Keeps the features of the whole split on
            the devices meanwhile; `analysis.collapse` says how much that is.
        teacher: that `diagnose` compares with, if any: its `apply`, `variables` on the mesh, and `mean` and `std` of
            the pixels as it sees them, None = as the model does.
    """

    def __init__(
        self,
        model: steps.Apply,
        *,
        mesh: Mesh,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        diagnose: bool = False,
        teacher: Any = None,
    ):
        self._mesh = mesh
        # On CPUs, programs of several processes that are in flight together can wait for each other for ever.
        self._wait = jax.process_count() > 1 and jax.default_backend() == "cpu"
        self._diagnose = diagnose
        self._teacher_variables = teacher and teacher.variables
        replicated = sharding.replicated(mesh)
        if diagnose:
            step = functools.partial(
                steps.diagnose_step,
                model=model,
                teacher=teacher and teacher.apply,
                mean=mean,
                std=std,
                teacher_mean=teacher and teacher.mean,
                teacher_std=teacher and teacher.std,
            )
        else:
            step = functools.partial(_plain_step, model=model, mean=mean, std=std)
        self._step = jax.jit(step, out_shardings=(replicated, sharding.batch_sharding(mesh)))
        self._add = jax.jit(metrics.merge, donate_argnums=0)
        self._scatter = jax.jit(collapse.scatter, out_shardings=replicated)
        self._classifier = jax.jit(models.classifier, out_shardings=replicated)

    def __call__(
        self,
        variables: Any,
        batches: Iterable[dict[str, np.ndarray]],
        *,
        num_examples: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float | list[float]] | None:
        """Metrics over all rows whose mask is set.

        Args:
            variables: of the model, on the mesh.
            batches: this process's share of the split, padded, with a mask; equally many batches on every process.
            num_examples: the size of the split.
            stop: asked after every batch, on all processes alike; once true, the evaluation ends.

        Returns:
            `accuracy` in [0, 1] and `ce` in nats (the negative log-likelihood). With `diagnose` also `ece`
            (`calibration.expected_error`), `class_accuracy` (a list, NaN for a class without examples; left out for
            more than `MOST_CLASSES_LISTED` classes), the names of `collapse.measures`, and with a teacher `kl`,
            `agreement` and `logit_msd` (`steps.Diagnosis`). None where it was stopped.

        Raises:
            RuntimeError: the batches did not hold each example exactly once.
        """
        totals, kept = None, []
        for batch in batches:
            totals, rows = self._add_batch(totals, variables, batch)
            kept.append(rows)
            if stop():
                return None
        counted = 0 if totals is None else int(totals.means["accuracy"][1])
        if counted != num_examples:
            raise RuntimeError(f"evaluation counted {counted} examples where the split has {num_examples}")
        values = metrics.compute(totals.means)
        return values | self._diagnostics(variables, totals, kept) if self._diagnose else values

    def count(self, variables: Any, batches: Iterable[dict[str, np.ndarray]]) -> tuple[int, int]:
        """(correct answers, examples) of some batches, at least one."""
        totals = None
        for batch in batches:
            totals, _ = self._add_batch(totals, variables, batch)
        correct, counted = totals.means["accuracy"]
        return int(correct), int(counted)

    def _add_batch(
        self, totals: steps.Diagnosis | None, variables: Any, batch: dict[str, np.ndarray]
    ) -> tuple[steps.Diagnosis, steps.Rows | None]:
        """The totals with this batch, and what is kept of its rows."""
        found, rows = self._step(variables, self._teacher_variables, sharding.to_global(batch, self._mesh))
        totals = found if totals is None else self._add(totals, found)
        if self._wait:
            jax.block_until_ready(totals)
        return totals, rows

    def _diagnostics(
        self, variables: Any, totals: steps.Diagnosis, kept: list[steps.Rows]
    ) -> dict[str, float | list[float]]:
        values: dict[str, float | list[float]] = {}
        bins, classes, sums = jax.device_get((totals.bins, totals.classes, totals.features))
        values["ece"] = calibration.expected_error(bins)
        values |= self._collapse(variables, sums, kept)
        if len(classes.count) <= MOST_CLASSES_LISTED:
            values["class_accuracy"] = calibration.class_accuracy(classes).tolist()
        return values

    def _collapse(self, variables: Any, sums: collapse.ClassSums, kept: list[steps.Rows]) -> dict[str, float]:
        """The second pass, over what the first kept; it is let go batch by batch."""
        means = collapse.class_means(sums)
        around = jax.device_put({"means": means, "count": sums.count}, sharding.replicated(self._mesh))
        scattered = None
        while kept:
            part = self._scatter(*kept.pop(0), **around)
            scattered = part if scattered is None else self._add(scattered, part)
            if self._wait:
                jax.block_until_ready(scattered)
        weights = jax.device_get(self._classifier(variables))
        return collapse.measures(sums, jax.device_get(scattered), means=means, classifier=weights)


def _plain_step(variables: Any, _: Any, batch: dict[str, jax.Array], **fixed: Any) -> tuple[steps.Diagnosis, None]:
    """`steps.eval_step` in the form of `steps.diagnose_step`, with nothing diagnosed and nothing kept."""
    return steps.Diagnosis(steps.eval_step(variables, batch, **fixed), None, None, None), None


if __name__ == "__main__":
    from dgkd_jax import robustness  # a room above this one

    sys.exit(robustness.main(sys.argv[1:]))
