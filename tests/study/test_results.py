"""The document of a study says what the runs' numbers say, and no more."""

import base64
import zlib

import numpy as np
import pytest
from scipy import stats

from dgkd_jax.study import figures, inference, norms, results, rows


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


def test_a_large_difference_on_two_seeds_is_no_verdict_and_no_test():
    one = found(dkd=BASE[:2], better=[0.99, 0.991])
    (verdict,) = results.verdicts([one])
    assert verdict.says == "too few seeds"
    text = results.markdown([one], options="", output="R.md")
    assert "- No comparison has the three seeds that a test needs." in text


def test_only_tests_that_were_made_are_corrected_for_and_say_what_they_would_see():
    """Holm counts two tests, not three; the detectable difference is that of level 0.05/2."""
    study_ = found(dkd=BASE, noise=NOISE, better=BETTER, few=[0.99, 0.991])
    verdicts = {verdict.arm: verdict for verdict in results.verdicts([study_])}
    assert verdicts["better"].corrected == pytest.approx(2 * stats.ttest_rel(BETTER, BASE).pvalue)
    deviation = 100 * np.std(np.array(NOISE) - BASE, ddof=1)
    assert verdicts["noise"].detectable == pytest.approx(inference.smallest_detectable(deviation, 5, tests=2))
    assert verdicts["few"].detectable is None


def test_a_small_difference_that_is_known_to_be_small_is_within_the_bounds():
    near = [b + d for b, d in zip(BASE, (0.0003, -0.0002, 0.0001, -0.0004, 0.0004), strict=True)]
    verdicts = {verdict.arm: verdict.says for verdict in results.verdicts([found(dkd=BASE, near=near, noise=NOISE)])}
    assert verdicts == {"near": "within ± 0.3", "noise": "not shown"}


def test_an_arm_is_pooled_over_the_sets_with_each_set_at_random():
    studies = [found("digits", dkd=BASE, a=BETTER), found("clothes", dkd=BASE, a=NOISE)]
    cells, estimate = results.pooled(results.verdicts(studies))["a"]
    differences = [100 * (np.array(arm) - BASE) for arm in (BETTER, NOISE)]
    assert cells == 2
    assert estimate.mean == pytest.approx(np.mean(differences), abs=1e-6)
    assert estimate.standard_error > np.std(np.concatenate(differences), ddof=1) / 10**0.5
    assert f"| a | 2 | {estimate.mean:+.2f} ± {estimate.standard_error:.2f} |" in results.markdown(
        studies, options="", output="R.md"
    )


def test_the_answer_tells_what_holds_on_every_set_from_what_holds_on_one():
    text = results.markdown(
        [found("digits", dkd=BASE, a=BETTER, b=BETTER), found("clothes", dkd=BASE, a=BETTER, b=NOISE)],
        options=" --seeds=0,1,2,3,4",
        output="R.md",
    )
    assert "- Better than the baseline on every set: a (standard)." in text
    assert "- Better than the baseline on some: b (standard; digits)." in text
    assert "- Worse than the baseline on every set: none." in text
    assert "- 4 of 4 comparisons were tested. Not shown: 1. Within ± 0.3 points: 0. The tests would see " in text
    assert "so to be looked at again" not in text  # a has its verdict, b is not ahead everywhere
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
    assert "so to be looked at again on fresh seeds: a (standard)." in text


def test_what_is_said_of_a_regime_before_all_its_planned_runs_are_done_is_interim():
    study_ = found(dkd=BASE, a=BETTER)  # and one planned run that was never made
    noisy = [row("noisy", "dkd", seed, accuracy) for seed, accuracy in enumerate(BASE)]
    study_ = study_._replace(
        planned=[*study_.planned, *(("noisy", "dkd", seed) for seed in range(5))], rows=[*study_.rows, *noisy]
    )
    text = results.markdown([study_], options="", output="R.md")
    interim = "so what is said of them is interim, and all corrected p-values are."
    assert f"- digits, standard: 10 of 11 planned runs are done, {interim}\n" in text
    assert "digits, noisy" not in text
    complete = study_._replace(planned=[cell for cell in study_.planned if "never" not in cell])
    assert "interim" not in results.markdown([complete], options="", output="R.md")
    assert "interim" not in results.markdown([study_._replace(decides=False)], options="", output="R.md")


def test_the_hours_of_each_machine_are_told_apart():
    study_ = found(dkd=BASE)
    assert "5 of 6 planned runs are done, 0 failed; 0.05 hours of training on 1 × cpu (jax 0, flax 0).\n" in (
        results.markdown([study_], options="", output="R.md")
    )
    gpu = {"devices": 1, "device": "gpu", "jax": "0", "flax": "0"}
    both = [*study_.rows[:3], *(one | {"machine": gpu} for one in study_.rows[3:])]
    assert (
        "0 failed; 0.03 hours of training in 3 runs on 1 × cpu (jax 0, flax 0); "
        "0.02 hours of training in 2 runs on 1 × gpu (jax 0, flax 0).\n"
    ) in results.markdown([study_._replace(rows=both)], options="", output="R.md")


def test_failed_runs_are_named_and_in_no_mean():
    study_ = found(dkd=BASE, a=BETTER[:4])
    failed = {"regime": "standard", "arm": "a", "seed": 4, "workdir": "w", "status": "failed", "error": "lost"}
    text = results.markdown([study_._replace(rows=[*study_.rows, failed])], options="", output="R.md")
    assert "- failed: standard / a, seed 4: lost" in text
    assert "| a | 4 |" in text


def test_rows_that_know_the_wrong_images_give_an_interval_with_images_and_teachers():
    random = np.random.default_rng(0)
    difficulty = random.uniform(size=2000)
    study_ = found(dkd=BASE, a=BETTER)
    for each in study_.rows:
        wrong = random.uniform(size=2000) < difficulty * (1 - each["student"]["last_accuracy"]) * 2
        bits = base64.b85encode(zlib.compress(np.packbits(wrong).tobytes())).decode()
        each |= {"wrong": {"examples": 2000, "bits": bits}, "teacher_seed": each["seed"] % 3}
    text = results.markdown([study_], options="", output="R.md")
    assert "| verdict | 95 % with teachers and test images |" in text
    ours, theirs = (
        np.stack([rows.wrong_examples(each) for each in study_.rows if each["arm"] == arm]) for arm in ("a", "dkd")
    )
    low, high = inference.with_test_images(ours, theirs, [0, 1, 2, 0, 1]).interval
    assert f"| {low:+.2f} … {high:+.2f} |" in text


def test_a_study_that_only_looks_is_neither_tested_nor_counted():
    looking = found("screening", dkd=BASE, a=BETTER)._replace(decides=False)
    verdicts = {(v.study, v.arm): v for v in results.verdicts([found(dkd=BASE, a=BETTER), looking])}
    assert verdicts["digits", "a"].corrected == pytest.approx(stats.ttest_rel(BETTER, BASE).pvalue)  # Holm: of one
    assert verdicts["screening", "a"].says == "not tested"
    assert verdicts["screening", "a"].comparison.interval is not None
    text = results.markdown([found(dkd=BASE, a=BETTER), looking], options="", output="R.md")
    assert "- Better than the baseline: a (standard).\n- Worse than the baseline: none.\n" in text
    assert "- 1 of 2 comparisons were tested; the others have" in text
    alone = results.markdown([looking], options="", output="R.md")
    assert "## The answer\n\n- Nothing is tested: this only looks." in alone
    assert "Better than the baseline" not in alone


def test_the_answer_says_how_many_seeds_would_see_a_small_difference():
    text = results.markdown([found(dkd=BASE, noise=NOISE, a=BETTER)], options="", output="R.md")
    deviation = 100 * np.std(np.array(NOISE) - BASE, ddof=1)  # the larger one
    needed = inference.pairs_needed(deviation, 0.3, tests=2)
    assert f"is {deviation:.2f} points: to see 0.3 points with 80 % power in each takes {needed} seeds." in text


def test_the_same_seed_on_another_machine_is_another_teacher():
    one, other, again = (
        {"teacher_seed": 1, "teacher": {"fingerprint": print_}} for print_ in ("952e1608", "11111111", "952e1608")
    )
    assert results._teacher(one) == results._teacher(again)
    assert results._teacher(one) != results._teacher(other)
    assert results._teacher({"teacher_seed": 1, "teacher": None}) != results._teacher(one)


# -- gradients along the training, and sweeps --------------------------------------------------------------------------


def with_norms(accuracies):
    """A study of one seed whose arm i has gradients of norm 3(i + 1) and 4(i + 1) at the end."""
    study_ = found(**{arm: [accuracy] for arm, accuracy in accuracies.items()})
    for index, each in enumerate(study_.rows, start=1):
        each["curves"] = {"step": [5, 10], "target_gradmag": [9, 3 * index], "nontarget_gradmag": [8, 4 * index]}
    return study_._replace(comparable=frozenset(("standard", arm) for arm in accuracies))


def test_norms_at_the_end_are_ranked_against_the_accuracies():
    study_ = with_norms({"dkd": 0.9, "a": 0.8, "b": 0.85, "c": 0.7})
    (arms,) = results.norms_of(study_).values()
    assert [arm.last for arm in arms] == [5, 10, 15, 20]  # 3, 4, 5
    assert arms[0].progress.tolist() == [0.5, 1.0]
    rho = stats.spearmanr([5, 10, 15, 20], [0.9, 0.8, 0.85, 0.7]).statistic
    assert norms.rank_correlation(arms) == pytest.approx(rho)
    text = results.markdown([study_], options="", output="R.md")
    assert f"with the accuracy, over arms: standard {rho:+.2f} (4 arms)." in text
    assert "(figures/R_digits_norms.png)" in text


def test_norms_of_several_seeds_are_averaged():
    study_ = found(dkd=[0.9, 0.8], a=[0.7, 0.7])
    for each in study_.rows:
        each["curves"] = {"step": [4, 8], "target_gradmag": [1.0, each["seed"]], "nontarget_gradmag": [2.0, 0.0]}
    (arms,) = results.norms_of(study_._replace(comparable=frozenset({("standard", "dkd"), ("standard", "a")}))).values()
    assert arms[0].norms["target_gradmag"].tolist() == [1.0, 0.5]
    assert arms[0].accuracy == pytest.approx(85)


def test_a_run_whose_log_lost_lines_is_not_among_the_norms():
    study_ = found(dkd=[0.9, 0.9, 0.6], a=[0.7, 0.7, 0.7])
    for each in study_.rows:
        each["curves"] = {"step": [4, 8], "target_gradmag": [1.0, 3.0], "nontarget_gradmag": [2.0, 0.0]}
    study_.rows[0]["curves"] = {"step": [7, 8], "target_gradmag": [9.0, 9.0], "nontarget_gradmag": [9.0, 9.0]}
    (arms,) = results.norms_of(study_._replace(comparable=frozenset({("standard", "dkd"), ("standard", "a")}))).values()
    assert arms[0].progress.tolist() == [0.5, 1.0]
    assert arms[0].norms["target_gradmag"].tolist() == [1.0, 3.0]
    assert arms[0].accuracy == pytest.approx(80)


def test_arms_at_another_temperature_or_without_curves_are_left_out():
    study_ = with_norms({"dkd": 0.9, "a": 0.8, "b": 0.85, "c": 0.7})
    del study_.rows[1]["curves"]
    study_ = study_._replace(comparable=study_.comparable - {("standard", "b")})
    (arms,) = results.norms_of(study_).values()
    assert [arm.arm for arm in arms] == ["dkd", "c"]
    assert norms.rank_correlation(arms) is None
    assert results.norms_of(study_._replace(comparable=frozenset())) == {}


def test_arms_that_are_numbers_are_a_sweep_in_order():
    study_ = found(**{"dkd": BASE, "1": BETTER, "-3": NOISE, "0.3": NOISE})
    points = results.sweep_of(results.verdicts([study_]))["standard"]
    assert [setting for setting, _ in points] == [-3, 0.3, 1]
    assert points[2][1].comparison.mean == pytest.approx(1.0)
    assert results.sweep_of(results.verdicts([found(**{"dkd": BASE, "1": BETTER, "b": NOISE})])) == {}
    assert "(figures/R_digits_sweep.png)" in results.markdown([study_], options="", output="R.md")


def test_the_pictures_show_every_arm(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    figures.norms(results.norms_of(with_norms({"dkd": 0.9, "a": 0.8, "b": 0.85, "c": 0.1})), tmp_path / "norms.png")
    curves, more_curves, ends, bar = drawn[0].axes
    assert [len(axis.lines) for axis in (curves, more_curves)] == [4, 4]
    assert bar.get_ylim()[0] > 70  # c has failed and does not take the others' colours
    assert len(ends.collections[0].get_offsets()) == 3
    # Each end has the colour of its line.
    assert ends.collections[0].get_facecolor()[1].tolist() == list(curves.lines[1].get_color())
    study_ = found(**{"dkd": BASE, "1": BETTER, "-3": NOISE})
    figures.sweep(results.sweep_of(results.verdicts([study_])), tmp_path / "sweep.png")
    (panel,) = drawn[1].axes
    assert panel.lines[1].get_xdata().tolist() == [-3, 1]
    assert panel.lines[1].get_ydata()[1] == pytest.approx(1.0)


def test_a_forest_is_linear_unless_an_arm_is_far_off(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    for studies in ([found(dkd=BASE, a=BETTER)], [found(dkd=BASE, a=BETTER, b=[0.1] * 5)]):
        figures.forest(results.verdicts(studies), tmp_path / "forest.png")
    assert [figure.axes[-1].get_xscale() for figure in drawn] == ["linear", "symlog"]
    assert [("logarithmic" in figure.axes[-1].get_xlabel()) for figure in drawn] == [False, True]
