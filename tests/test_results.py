"""The document of a study says what the runs' numbers say, and no more."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from configs.study import fashion_mnist, mnist5k
from dgkd_jax import study
from dgkd_jax.analysis import results


def row(regime, arm, seed, accuracy, **last):
    return {
        "regime": regime, "arm": arm, "seed": seed, "status": "done", "last": last,
        "student": {"last_accuracy": accuracy, "seconds": 36.0}, "teacher": None,
        "machine": {"devices": 1, "device": "cpu", "jax": "0", "flax": "0"},
    }  # fmt: skip


def found(name="digits", **accuracies):
    rows = [row("standard", arm, seed, a) for arm, values in accuracies.items() for seed, a in enumerate(values)]
    planned = [(r["regime"], r["arm"], r["seed"]) for r in rows] + [("standard", "never", 0)]
    return results.Found(name, f"configs/study/{name}.py", "About it.", "dkd", planned, rows)


BASE = [0.950, 0.952, 0.948, 0.951, 0.949]
BETTER = [b + 0.010 + d for b, d in zip(BASE, (0, 0.001, -0.001, 0.0005, -0.0005), strict=True)]
NOISE = [b + d for b, d in zip(BASE, (0.004, -0.003, 0.002, -0.005, 0.001), strict=True)]


def test_verdicts_are_paired_by_seed_and_corrected():
    study_ = found(dkd=BASE, better=BETTER, worse=[2 * b - x for b, x in zip(BASE, BETTER, strict=True)], noise=NOISE)
    verdicts = {verdict.arm: verdict for verdict in results.verdicts([study_])}
    assert {arm: verdict.says for arm, verdict in verdicts.items()} == {
        "better": "better", "worse": "worse", "noise": "not shown",
    }  # fmt: skip
    assert verdicts["better"].comparison.mean == pytest.approx(1.0)
    p = stats.ttest_rel(BETTER, BASE).pvalue
    assert verdicts["better"].corrected == pytest.approx(3 * p)  # Holm: the smallest of three


def test_a_large_difference_on_two_seeds_is_no_verdict():
    (verdict,) = results.verdicts([found(dkd=BASE[:2], better=[0.99, 0.991])])
    assert verdict.says == "not shown"


def test_the_answer_tells_what_holds_on_every_set_from_what_holds_on_one():
    text = results.markdown(
        [found("digits", dkd=BASE, a=BETTER, b=BETTER), found("clothes", dkd=BASE, a=BETTER, b=NOISE)],
        options=" --seeds=0,1,2,3,4",
        output="R.md",
    )
    assert "- Better than the baseline on every set: a (standard)." in text
    assert "- Better than the baseline on some: b (standard; digits)." in text
    assert "- Worse than the baseline on every set: none." in text
    assert "Of 4 comparisons, 1 show no difference" in text
    deviation = np.std(np.array(BETTER) * 100, ddof=1)
    error = np.std((np.array(BETTER) - BASE) * 100, ddof=1) / 5**0.5
    assert f"| a | 5 | 96.00 ± {deviation:.2f} | +1.00 ± {error:.2f} |" in text
    assert "Planned and not run, so nothing can be said of them: standard: never." in text
    both = "--config=configs/study/digits.py --config=configs/study/clothes.py"
    assert f"`python -m dgkd_jax.study {both} --seeds=0,1,2,3,4 --results=R.md`" in text
    assert "    python -m dgkd_jax.study --config=configs/study/digits.py --seeds=0,1,2,3,4\n" in text


def test_who_is_ahead_everywhere_without_a_verdict_is_named_as_a_candidate():
    ahead = [b + d for b, d in zip(BASE, (0.001, 0.002, 0.0004, -0.0002, 0.0012), strict=True)]  # t = 2.4, p = 0.08
    text = results.markdown(
        [found("digits", dkd=BASE, a=ahead, b=ahead), found("clothes", dkd=BASE, a=ahead, b=NOISE)],
        options="",
        output="R.md",
    )
    assert "- Better than the baseline on some: none." in text
    assert "before any correction, so to be looked at again on fresh seeds: a (standard)." in text


def test_failed_runs_are_named_and_in_no_mean():
    study_ = found(dkd=BASE, a=BETTER[:4])
    failed = {"regime": "standard", "arm": "a", "seed": 4, "workdir": "w", "status": "failed", "error": "lost"}
    text = results.markdown([study_._replace(rows=[*study_.rows, failed])], options="", output="R.md")
    assert "- failed: standard / a, seed 4: lost" in text
    assert "| a | 4 |" in text


# -- the command -------------------------------------------------------------------------------------------------------

STUDY = """
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
    )
"""


def test_a_study_runs_what_is_missing_and_a_failed_run_is_a_row(tmp_path, capsys, monkeypatch):
    file = tmp_path / "tiny.py"
    file.write_text(STUDY)
    monkeypatch.setenv("XLA_FLAGS", "")  # of the workers: one device
    command = [f"--config={file}", f"--output={tmp_path}"]
    assert study.main([*command, "--arms=dkd"]) == 0
    capsys.readouterr()
    before = (tmp_path / "tiny" / "standard" / "dkd-seed0" / "result.json").stat().st_mtime_ns

    assert study.main([*command, "--cache-teacher"]) == 0
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

    assert study.main([*command, f"--results={tmp_path / 'results.md'}"]) == 0
    text = (tmp_path / "results.md").read_text()
    assert "2 of 3 planned runs are done, 1 failed" in text


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [
        ({0, 1}, 2, [{0}, {1}]),
        ({2, 3, 5, 8, 9}, 2, [{2, 5, 9}, {3, 8}]),
        ({4}, 1, [{4}]),
        ({0, 1}, 3, [set(), set(), set()]),  # more workers than cores: the system shares them out
    ],
)
def test_workers_share_the_cores_out(monkeypatch, cores, workers, expected):
    monkeypatch.setattr(study.os, "sched_getaffinity", lambda process: cores, raising=False)
    assert study._own_cores(workers) == expected


def test_each_teacher_and_each_cache_is_made_by_one_run_before_others_need_it(tmp_path):
    planned = mnist5k.get_study()
    everything = {"regimes": planned.regimes, "arms": planned.arms}
    runs = study.runs_of(planned, output=str(tmp_path), seeds=(0, 1, 2), **everything)
    plain = [[run.workdir for run in phase] for phase, _ in study._phases(runs)]
    cached = [
        ([run.workdir for run in phase], made) for phase, made in study._phases(list(map(study.with_cache, runs)))
    ]
    # Without caches: one run for each teacher, then all others.
    by_workdir = {run.workdir: study.with_cache(run).config for run in runs}
    teachers = {config.teacher.workdir for config in by_workdir.values()}
    assert len(plain[0]) == len(teachers) > 1
    assert plain[1] == []
    for phases in (plain, [phase for phase, _ in cached]):
        assert sorted(itertools.chain(*phases)) == sorted(by_workdir)
    # With them: besides, one for each teacher, seed, images and number of epochs.
    makers = [by_workdir[workdir].teacher.cache for phase, made in cached if made for workdir in phase]
    assert cached[0][0] == plain[0]
    assert len(makers) == len(set(makers))
    assert set(makers) == {config.teacher.cache for config in by_workdir.values() if config.method != "ce"}
    assert not cached[2][1]
    for config in by_workdir.values():
        others = [each for each in by_workdir.values() if each.teacher.cache == config.teacher.cache != ""]
        assert {(each.seed, each.epochs, each.teacher.workdir) for each in others} <= {
            (config.seed, config.epochs, config.teacher.workdir)
        }
    assert {config.teacher.cache for config in by_workdir.values() if config.method == "ce"} == {""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
        (["--config=configs/mnist5k.py"], "it defines no get_study()"),
        (["--config=configs/study/mnist5k.py", "--arms=dkg"], "no 'dkg'; did you mean 'dkd'?"),
        (["--config=configs/study/mnist5k.py", "--seeds=a"], "'a' is no number"),
        (["--config=configs/study/mnist5k.py", "--workers=0"], "--workers=0: 1 or more"),
        (["--config=a", "--config=b"], "several --config go with --results only"),
        (["--config=configs/study/mnist5k.py", "--output=empty", "--results=r.md"], "no run of"),
        ([], "--config"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(arguments, message, capsys):
    assert study.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("module", [mnist5k, fashion_mnist])
def test_studies_are_valid_and_seeds_share_their_teachers(module, tmp_path):
    planned = module.get_study()
    runs = study.runs_of(planned, output=str(tmp_path), seeds=planned.seeds, regimes=planned.regimes, arms=planned.arms)
    assert len({run.workdir for run in runs}) == len(runs)
    teachers = {run.regime: set() for run in runs}
    for run in runs:
        teachers[run.regime].add(run.config.teacher.workdir)
    assert all(len(found) == 1 for found in teachers.values())
    assert teachers["standard"] == teachers["T = 1"] != teachers["noisy labels"]
