"""Writes `log.csv`: one row per epoch, with the columns of the DGKD repository's logs, for notebooks that read those.

As in that repository, epochs count from 1, accuracies are in percent, and the other columns are means over the epoch's
training steps. The columns from `avg_grad_similarity` on compare the student with a teacher and are empty without one.
`test_acc` is empty where the epoch's last step was not evaluated.
"""

import jax
from etils import epath

from dgkd_jax.errors import StorageFailure
from dgkd_jax.runs.files import write_whole

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
    """Writes to a work directory and continues the file that is there. Only the first process writes.

    Args:
        workdir: an existing folder.
        epoch: whole epochs done in the state that the run continues from. Later rows were written before an
            interruption and will be written again; they are dropped, so an interrupted run leaves the same bytes as an
            uninterrupted one.
    """

    def __init__(self, workdir: epath.Path, *, epoch: int):
        self._path = workdir / "log.csv"
        self._rows = _rows(self._path, epoch)
        self._save()

    def write(self, epoch: int, means: dict[str, float], *, test_accuracy: float | None) -> None:
        """Add the row of one epoch.

        Args:
            epoch: counted from 1.
            means: over the epoch: `loss`, `accuracy` in [0, 1], and with a teacher `losses.comparison.DIAGNOSTICS`.
            test_accuracy: in [0, 1], of the parameters at the end of the epoch; None if not evaluated.
        """
        values = [means["loss"], 100 * means["accuracy"], None if test_accuracy is None else 100 * test_accuracy]
        values += [means.get(name) for name in _MEANS.values()]
        # Nine digits distinguish any two float32 values.
        self._rows.append(",".join([str(epoch), *("" if value is None else f"{value:.9g}" for value in values)]))
        self._save()

    def _save(self) -> None:
        if jax.process_index() != 0:
            return
        # The whole file each time: it has a few hundred short rows, and is then never half-written.
        try:
            write_whole(self._path, "\n".join([",".join(COLUMNS), *self._rows]) + "\n")
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
