"""What the pictures show, against loops written out; and that figures become self-contained SVG."""

import numpy as np
import pytest
from etils import epath

from dgkd_jax.evaluate import calibration
from dgkd_jax.report import figures, grouping, pictures, work_directories


def test_bins_of_the_reliability_diagram_are_open_below_and_closed_above():
    confidence = np.array([1 / 15, 1 / 15 + 1e-6, 1.0, 0.999, 0.0])
    bins = calibration.reliability(confidence, np.array([True, False, True, False, False]))
    assert bins["share"][[0, 1, 14]].tolist() == [0.4, 0.2, 0.4]
    assert bins["accuracy"][[0, 1, 14]].tolist() == [0.5, 0.0, 0.5]
    assert np.isnan(bins["accuracy"][5])
    assert bins["confidence"][14] == pytest.approx(0.9995, abs=1e-12)


def test_calibration_error_is_the_weighted_mean_gap():
    random = np.random.default_rng(0)
    confidence, correct = random.uniform(0.1, 1, 500), random.uniform(size=500) < 0.7
    expected = 0.0
    for m in range(15):
        members = [i for i in range(500) if m / 15 < confidence[i] <= (m + 1) / 15]
        if members:
            gap = np.mean([correct[i] for i in members]) - np.mean([confidence[i] for i in members])
            expected += len(members) / 500 * abs(gap)
    assert calibration.calibration_error(confidence, correct) == pytest.approx(expected, rel=1e-12)  # order of a sum


def test_confusion_counts_teachers_in_rows_and_students_in_columns():
    counts = pictures.confusion(student=np.array([0, 2, 2, 1]), teacher=np.array([0, 1, 1, 1]))
    assert counts.tolist() == [[1, 0, 0], [0, 1, 2], [0, 0, 0]]


def test_a_family_is_a_corruption_with_all_five_severities():
    names = ["clean", *(f"contrast-{s}" for s in (5, 3, 1, 2, 4)), "noised-8", "scrambled-4", "fog-1", "fog-2"]
    assert pictures.families(names) == {"contrast": [f"contrast-{severity}" for severity in range(1, 6)]}


def test_a_figure_in_the_page_loads_nothing_and_takes_the_pages_ink(tmp_path):
    with figures.look():
        figure = pictures.feature_picture("dgkd", np.random.default_rng(0).normal(size=(50, 2)), np.arange(50) % 10)
        svg = figures.embed(figure, "set1/features", epath.Path(tmp_path))
    assert (tmp_path / "set1_features.png").read_bytes().startswith(b"\x89PNG")
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>\n")
    assert "currentColor" in svg
    assert figures.INK not in svg
    assert "http" not in svg
    assert 'href="data:image/png' in svg  # the points are one image
    assert all(part.startswith("set1_features-") for part in svg.split('id="')[1:])


def test_long_curves_are_averaged_and_short_ones_are_not():
    steps = np.arange(1000.0)
    few_steps, few = figures._thinned(steps, 2 * steps)
    assert len(few) == 300
    np.testing.assert_allclose(few, 2 * few_steps, rtol=1e-12)
    assert figures._thinned(steps[:300], steps[:300])[0] is not None
    np.testing.assert_array_equal(figures._thinned(steps[:300], steps[:300])[1], steps[:300])


def test_the_mean_curve_is_over_common_steps_of_finished_runs():
    def run(seed, values, finished=True):
        lines = [{"step": step, "kind": "eval", "accuracy": value} for step, value in values.items()]
        result = {"student": {}} if finished else None
        return work_directories.Run(
            epath.Path(f"/x/kd-seed{seed}"), {"seed": seed}, result, [], lines, None, {}, None, ()
        )

    group = grouping.Group(
        "kd",
        [run(0, {10: 0.5, 20: 0.7, 30: 0.9}), run(1, {10: 0.7, 20: 0.8}), run(2, {10: 0.0, 20: 0.1}, finished=False)],
    )
    what = figures.Curve("accuracy", "eval", "Accuracy", "accuracy [%]", 100)
    with figures.look():
        figure = figures.curves([group], what)
    thick = [line for line in figure.axes[0].lines if line.get_label() == "kd (mean of 2)"]
    assert len(thick) == 1
    np.testing.assert_array_equal(thick[0].get_xdata(), [10, 20])
    np.testing.assert_allclose(thick[0].get_ydata(), [60.0, 75.0], rtol=1e-12)
    assert len(figure.axes[0].lines) == 1 + 3 + 1  # mean, three runs, the cross of the unfinished one
    assert figures.curves([group], what._replace(key="ece")) is None
