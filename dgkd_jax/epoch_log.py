"""`log.csv`: one row per epoch, with the columns of the DGKD repository's logs, which people's notebooks read.

As there, epochs count from 1, accuracies are percentages, and the rest are means over the epoch's training steps. The
columns from `avg_grad_similarity` on compare the student with a teacher: without one they are empty. `test_acc` is
empty for an epoch after whose last step nothing was evaluated.
"""

import jax
from etils import epath

from dgkd_jax.errors import StorageFailure

# Column -> name of the training metric.
_MEANS = {
    "avg_grad_similarity": "grad_similarity",
    "target_norm": "target_norm",
    "nontarget_norm": "nontarget_norm",
    "target_gradmag": "target_gradmag",
    "nontarget_gradmag": "nontarget_gradmag",
    "covariance": "covariance",
}
COLUMNS = ("epochs", "train_loss", "train_acc", "test_acc", *_MEANS)


class EpochLog:
    """Writes to a work directory, continuing what is there. Only the first process writes.

    Args:
        workdir: an existing folder.
        epoch: number of whole epochs in the state that the run continues from. Rows beyond it, written before an
            interruption and about to be written again, are dropped, so that an interrupted run leaves the same bytes as
            an uninterrupted one.
    """

    def __init__(self, workdir: epath.Path, *, epoch: int):
        self._path = workdir / "log.csv"
        self._rows = _rows(self._path, epoch)
        self._save()

    def write(self, epoch: int, means: dict[str, float], *, test_accuracy: float | None) -> None:
        """Add the row of an epoch.

        Args:
            epoch: counted from 1.
            means: over the epoch: `loss`, `accuracy` in [0, 1], and where there is a teacher the names of
                `losses.diagnostics`.
            test_accuracy: in [0, 1], of the parameters at the end of the epoch; None if they were not evaluated.
        """
        values = [means["loss"], 100 * means["accuracy"], None if test_accuracy is None else 100 * test_accuracy]
        values += [means.get(name) for name in _MEANS.values()]
        # Nine digits tell any two float32 apart.
        self._rows.append(",".join([str(epoch), *("" if value is None else f"{value:.9g}" for value in values)]))
        self._save()

    def _save(self) -> None:
        if jax.process_index() != 0:
            return
        # Written whole and renamed: a few hundred short rows, and never half a row.
        temporary = self._path.with_name("log.csv.tmp")
        try:
            temporary.write_text("\n".join([",".join(COLUMNS), *self._rows]) + "\n")
            temporary.replace(self._path)
        except OSError as failure:
            raise StorageFailure(
                f"{self._path} could not be written: {failure}. Make room or mend the storage, then give the same "
                "command again; it goes on from the newest checkpoint."
            ) from failure


def _rows(path: epath.Path, epoch: int) -> list[str]:
    if not epoch or not path.exists():
        return []
    rows = [line for line in path.read_text().splitlines() if line.split(",")[0].isdigit()]
    return [row for row in rows if int(row.split(",")[0]) <= epoch]
