"""log.csv: the columns people's notebooks read, whatever interrupts the run."""

import csv

from dgkd_jax.training.monitor.epoch_log import EpochLog

HEADER = (
    "epochs,train_loss,train_acc,test_acc,avg_grad_similarity,target_norm,nontarget_norm,target_gradmag,"
    "nontarget_gradmag,covariance"
)
MEANS = {
    "loss": 1.5, "accuracy": 0.25, "grad_similarity": -0.5, "target_norm": 7.0, "nontarget_norm": 8.0,
    "target_gradmag": 0.125, "nontarget_gradmag": 2.5e-8, "covariance": 0.0625, "agreement": 0.75,
}  # fmt: skip


def test_columns_are_those_of_the_repository_in_its_order_and_units(tmp_path):
    log = EpochLog(tmp_path, epoch=0)
    log.write(1, MEANS, test_accuracy=None)
    log.write(2, MEANS, test_accuracy=1 / 3)
    assert (tmp_path / "log.csv").read_text() == (
        f"{HEADER}\n"
        "1,1.5,25,,-0.5,7,8,0.125,2.5e-08,0.0625\n"
        "2,1.5,25,33.3333333,-0.5,7,8,0.125,2.5e-08,0.0625\n"
    )  # fmt: skip


def test_columns_that_need_a_teacher_are_empty_without_one(tmp_path):
    EpochLog(tmp_path, epoch=0).write(1, {"loss": 2.0, "accuracy": 0.5, "ce": 2.0}, test_accuracy=0.5)
    with (tmp_path / "log.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert ",".join(row) == HEADER
    assert list(row.values()) == ["1", "2", "50", "50", "", "", "", "", "", ""]


def test_rows_beyond_the_restored_state_are_dropped_at_once(tmp_path):
    log = EpochLog(tmp_path, epoch=0)
    for epoch in (1, 2, 3):
        log.write(epoch, MEANS | {"loss": float(epoch)}, test_accuracy=0.5)
    written = (tmp_path / "log.csv").read_text()
    log = EpochLog(tmp_path, epoch=1)
    assert (tmp_path / "log.csv").read_text().splitlines() == written.splitlines()[:2]
    for epoch in (2, 3):
        log.write(epoch, MEANS | {"loss": float(epoch)}, test_accuracy=0.5)
    assert (tmp_path / "log.csv").read_text() == written
    EpochLog(tmp_path, epoch=0)
    assert (tmp_path / "log.csv").read_text() == HEADER + "\n"


def test_values_that_are_not_finite_are_named_as_such(tmp_path):
    EpochLog(tmp_path, epoch=0).write(1, {"loss": float("nan"), "accuracy": 0.5}, test_accuracy=0.5)
    assert (tmp_path / "log.csv").read_text().splitlines()[1].startswith("1,nan,50,50,")
