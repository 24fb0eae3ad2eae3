"""The command of studies: it runs what is missing, ends in a report, and tells mistakes in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dgkd_jax.errors import BadInput
from dgkd_jax.study import __main__ as command
from dgkd_jax.study import rows

STUDY = """
import os
from configs import mnist5k
from dgkd_jax.study import Study

def get_study():
    base = mnist5k.get_config()
    base.update_from_flattened_dict({
        "data.mock": True, "data.image_size": 16, "data.mock_train_examples": 32, "data.mock_eval_examples": 16,
        "batch_size": 16, "eval_batch_size": 16, "epochs": 1, "teacher.epochs": 1,
        "student.model": "small_cnn_w8", "teacher.model": "small_cnn_w8",
    })
    return Study(
        name="tiny", about="Generated images.", base=base, seeds=(0,), baseline="dkd",
        arms={"dkd": {"method": "dkd"}, "broken": {"method": "kd", "batch_size": 48}, "kd": {"method": "kd"}},
        regimes={"standard": ({}, ("dkd", "broken", "kd"))},
        rows=os.path.join(os.path.dirname(__file__), "kept", "tiny.jsonl"),
    )
"""


@pytest.mark.slow
def test_a_study_runs_what_is_missing_and_a_failed_run_is_a_row(tmp_path, capsys, monkeypatch):
    file = tmp_path / "tiny.py"
    file.write_text(STUDY)
    monkeypatch.setenv("XLA_FLAGS", "")  # of the workers: one device
    arguments = [f"--config={file}", f"--output={tmp_path}"]
    assert command.main([*arguments, "--arms=dkd"]) == 0
    capsys.readouterr()
    before = (tmp_path / "tiny" / "standard" / "dkd-seed0" / "result.json").stat().st_mtime_ns

    assert command.main([*arguments, "--cache-teacher"]) == 0
    captured = capsys.readouterr()
    assert "1 of 3 runs are done already" in captured.err
    assert "dkd (baseline)" in captured.out
    assert (tmp_path / "tiny" / "standard" / "dkd-seed0" / "result.json").stat().st_mtime_ns == before
    assert (tmp_path / "tiny" / "report" / "index.html").exists()
    (failure,) = (tmp_path / "tiny" / "standard").glob("*/failure.json")
    assert "config.batch_size=48 is larger than the training split" in json.loads(failure.read_text())["error"]
    assert failure.parent.name == "broken-seed0"
    assert len({path.name.partition("-logits")[0] for path in (tmp_path / "tiny").glob("teacher-*")}) == 1  # shared
    # The second run, and only that, took the teacher's logits from a cache.
    (manifest,) = (tmp_path / "tiny").glob("teacher-*-logits-*/manifest.json")
    for arm, cache in (("dkd", ""), ("kd", str(manifest.parent))):
        config = json.loads((tmp_path / "tiny" / "standard" / f"{arm}-seed0" / "config.json").read_text())
        assert config["teacher"]["cache"] == cache

    assert command.main([*arguments, f"--results={tmp_path / 'results.md'}"]) == 0
    text = (tmp_path / "results.md").read_text()
    assert "2 of 3 planned runs are done, 1 failed" in text

    # The rows stand for work directories that are lost.
    kept = rows.read(str(tmp_path / "kept" / "tiny.jsonl"))
    assert [(row["arm"], row["status"], row["teacher_seed"]) for row in kept] == [("dkd", "done", 0), ("kd", "done", 0)]
    with np.load(tmp_path / "tiny" / "standard" / "dkd-seed0" / "evaluations" / "clean.npz") as evaluated:
        wrong = evaluated["student_prediction"] != evaluated["label"]
    np.testing.assert_array_equal(rows.wrong_examples(kept[0]), wrong)
    assert kept[0]["student"]["last_accuracy"] == 1 - wrong.mean()
    assert kept[0]["curves"]["step"][-1] == 2
    shutil.rmtree(tmp_path / "tiny")
    assert command.main([*arguments, "--arms=dkd,kd"]) == 0
    assert "2 of 2 runs are done already" in capsys.readouterr().err
    assert command.main([*arguments, f"--results={tmp_path / 'again.md'}"]) == 0
    assert "2 of 3 planned runs are done, 0 failed" in (tmp_path / "again.md").read_text()
    # Against another arm than the planned one it only looks.
    assert "| − dkd |" in (tmp_path / "again.md").read_text()
    assert command.main([*arguments, f"--results={tmp_path / 'other.md'}", "--baseline=kd"]) == 0
    other = (tmp_path / "other.md").read_text()
    assert "| − kd |" in other
    assert "Nothing is tested" in other
    assert "--baseline=kd" in other.splitlines()[2]
    # An arm that has become another one has no row.
    file.write_text(STUDY.replace('"dkd": {"method": "dkd"}', '"dkd": {"method": "dkd", "dkd.beta": 3.0}'))
    assert command.main([*arguments, f"--results={tmp_path / 'again.md'}"]) == 0
    assert "1 of 3 planned runs are done" in (tmp_path / "again.md").read_text()


@pytest.mark.slow
def test_ctrl_c_ends_a_study_with_one_line_and_its_work_saved(tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(STUDY.replace('"epochs": 1, ', '"epochs": 10_000, "dkd.warmup_epochs": 1.0, '))
    arguments = [f"--config={file}", f"--output={tmp_path}", "--arms=dkd"]
    study = subprocess.Popen(
        [sys.executable, "-m", "dgkd_jax.study", *arguments],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / "tiny" / "standard" / "dkd-seed0" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            assert study.poll() is None, study.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(study.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        _, shown = study.communicate(timeout=120)
    finally:
        if study.poll() is None:
            os.killpg(study.pid, signal.SIGKILL)
    assert study.returncode == 143
    assert "Traceback" not in shown
    assert "interrupted; saving the runs (Ctrl-C again: end at once)" in shown
    assert shown.splitlines()[-1] == "dgkd_jax: interrupted; the same command goes on from there"
    saved = [int(step.name) for step in (metrics.parent / "checkpoints").iterdir() if step.name.isdecimal()]
    assert max(saved) > 0


@pytest.mark.wrong_input
@pytest.mark.parametrize("line", ["{", "[]", '{"arm": "dkd"}'])
def test_a_damaged_line_among_the_rows_is_named(line, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{line}\n")
    with pytest.raises(BadInput, match=r"rows.jsonl, line 1 is no row of a study; mend or remove it"):
        rows.read(str(tmp_path / "rows.jsonl"))


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
        (["--config=configs/mnist5k.py"], "it defines no get_study()"),
        (["--config=configs/study/mnist5k.py", "--arms=dkg"], "no 'dkg'; did you mean 'dkd'?"),
        (["--config=configs/study/mnist5k.py", "--baseline=dkg"], "--baseline=dkg: no 'dkg'; did you mean 'dkd'?"),
        (["--config=configs/study/mnist5k.py", "--seeds=a"], "'a' is no number"),
        (["--config=configs/study/mnist5k.py", "--workers=0"], "--workers=0: 1 or more"),
        (["--config=a", "--config=b"], "several --config go with --results only"),
        (["--config=configs/study/mnist5k.py", "--output=empty", "--results=r.md"], "no run of"),
        ([], "--config"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(arguments, message, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
