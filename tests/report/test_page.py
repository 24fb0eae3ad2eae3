"""The report: one page that loads nothing, with the right numbers, from whole, damaged and mixed work directories."""

import re
import statistics
from html.parser import HTMLParser

import pytest
from scipy import stats
from synthetic_runs import write_evaluation, write_run

from dgkd_jax.report import __main__ as command
from dgkd_jax.report import compose

SECTIONS = [
    "Results", "Accuracy and loss", "Gradient similarity and norms", "Distance to the teacher", "Calibration",
    "Neural collapse", "Features in two dimensions", "Robustness", "Configurations", "Where the time went",
]  # fmt: skip
ACCURACIES = {
    "dkd": [0.951, 0.957, 0.962, 0.949, 0.960],
    "dgkd": [0.955, 0.958, 0.961, 0.956, 0.964],
    "ce": [0.930, 0.941, 0.935, 0.928, 0.933],
    "kd": [0.950, 0.952, 0.958, 0.953, 0.949],
}


class Page(HTMLParser):
    """Headings, table rows, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.rows, self.ids, self.fetched, self._tag, self._cell = [], [], [], [], "", None
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = self.rows[-1]
        self._tag = tag
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.fetched.append(value)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None
        self._tag = ""

    def handle_data(self, data):
        if self._tag == "h2":
            self.headings.append(data)
        if self._cell is not None:
            self._cell[-1] += data

    def row(self, label, *, table=0):
        """The row of a group in the n-th table that has it."""
        return [row for row in self.rows if row[0] == label][table]


def written(*workdirs, output):
    return Page(compose.write(workdirs, output).read_text())


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """Four methods, five seeds, everything measured."""
    folder = tmp_path_factory.mktemp("twenty")
    write_run(folder, "ce", 0, accuracy=0.98, finished=False).rename(folder / "teacher")
    for method, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            path = write_run(folder, method, seed, accuracy=accuracy)
            if seed == 0:
                for data in ("clean", "noised-8", *(f"contrast-{severity}" for severity in range(1, 6))):
                    write_evaluation(path, data, accuracy=accuracy, examples=100)
    return written(folder, output=folder / "report"), folder / "report"


@pytest.mark.slow
def test_the_page_loads_nothing(twenty):
    page, _ = twenty
    assert "http" not in page.text
    assert "<script" not in page.text
    assert "@import" not in page.text
    assert all(link.startswith(("#", "data:")) for link in page.fetched)
    assert all(target.startswith(("#", "'#")) for target in re.findall(r"url\(([^)]*)\)", page.text))


def test_links_within_the_page_have_targets_and_no_name_is_there_twice(twenty):
    page, _ = twenty
    assert {link[1:] for link in page.fetched if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_every_section_is_there(twenty):
    page, _ = twenty
    assert page.headings == SECTIONS


def test_each_figure_is_beside_the_page_as_png(twenty):
    page, folder = twenty
    names = {path.stem for path in folder.glob("*.png")}
    assert len(names) == page.text.count("<figure ")
    assert {
        "accuracy-eval", "loss-train", "grad_similarity-train", "target_norm-train", "logit_msd-eval", "confusion-0",
        "reliability", "nc1-eval", "nc4-eval", "features-3", "robustness-1", "severity-contrast", "class_accuracy",
    } <= names  # fmt: skip


@pytest.mark.parametrize("method", ACCURACIES)
def test_means_and_deviations_are_those_of_the_runs(twenty, method):
    page, _ = twenty
    last = [100 * value for value in ACCURACIES[method]]
    best = [value + 1 for value in last]
    expected = [f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" for values in (last, best)]
    assert page.row(method)[1:4] == ["5", *expected]


def test_comparisons_are_scipys_corrected_for_their_number(twenty):
    page, _ = twenty
    tests = {name: stats.ttest_rel(ACCURACIES[name], ACCURACIES["dkd"]) for name in ("ce", "kd", "dgkd")}
    by_p = sorted(tests, key=lambda name: tests[name].pvalue)
    previous = 0.0
    for rank, name in enumerate(by_p):
        previous = max(previous, min(1.0, (3 - rank) * tests[name].pvalue))
        differences = [100 * (a - b) for a, b in zip(ACCURACIES[name], ACCURACIES["dkd"], strict=True)]
        error = statistics.stdev(differences) / 5**0.5
        cells = page.row(name)
        assert cells[4] == f"{statistics.mean(differences):+.2f} ± {error:.2f}".replace("-", "−")
        assert cells[6] == "5"
        for cell, p in zip(cells[7:], (tests[name].pvalue, previous), strict=True):
            assert cell == (f"{p:.1g}" if p < 0.001 else f"{p:.3f}")
    assert page.row("dkd")[4] == "baseline"
    assert "corrected for the 3 comparisons" in page.text


def test_best_is_said_to_be_chosen_on_the_evaluation_split(twenty):
    assert "best is chosen on the evaluation split itself" in twenty[0].text


def test_the_teachers_own_run_is_apart(twenty):
    page, folder = twenty
    assert page.row("ce")[1] == "5"  # its configuration is that of the runs by ce
    assert page.row("teacher")[1:3] == ["teacher's own run", "at step 200"]
    assert (folder / "own-run-of-the-teacher-accuracy-eval.png").exists()


def test_what_differs_and_where_the_time_went(twenty):
    page, _ = twenty
    differing = next(row for row in page.rows if "dgkd.epsilon" in row)
    assert "epochs" not in differing
    assert "seed" not in differing
    assert page.row("dkd", table=-1)[:4] == ["dkd", "5", "2.0 s (11 %)", "3.0 s (17 %)"]


def test_one_crashed_run_with_few_metrics(tmp_path):
    path = write_run(tmp_path, "dgkd", 0, accuracy=0.95, finished=False, diagnosed=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 250, "kind": "ev')
    (path / "failure.json").write_text('{"error": "out of <memory>"}')
    page = written(path, output=tmp_path / "out")
    assert page.headings == SECTIONS
    assert page.row("dgkd-seed0")[2] == "failed at step 200"
    assert page.row("dgkd")[1:] == ["0 of 1", "–", "–"]
    assert "out of &lt;memory&gt;" in page.text
    assert "1 damaged line left out" in page.text
    for lacking in ("has grad_similarity, covariance", "has nc1, nc2_norms", "has ece", "has logit_msd, agreement, kl"):
        assert lacking in page.text
    assert page.text.count(f"python -m dgkd_jax.evaluate --workdir={path} --data=clean") == 4


def test_an_unfinished_run_is_in_no_mean(tmp_path):
    for seed, accuracy in enumerate((0.90, 0.94)):
        write_run(tmp_path, "kd", seed, accuracy=accuracy, diagnosed=False)
    write_run(tmp_path, "kd", 2, accuracy=0.1, diagnosed=False, finished=False)
    page = written(tmp_path, output=tmp_path / "out")
    assert page.row("kd")[1:3] == ["2 of 3", "92.00 ± 2.83"]
    assert page.row("kd-seed2")[2] == "unfinished at step 200"


def test_two_pairs_are_too_few(tmp_path):
    for method in ("dkd", "kd"):
        for seed in range(2):
            write_run(tmp_path, method, seed, accuracy=0.9 + 0.01 * seed, diagnosed=False)
    assert written(tmp_path, output=tmp_path / "out").row("kd")[6:] == ["2", "n too small", "–"]


@pytest.mark.slow
def test_each_regime_has_its_own_baseline(tmp_path):
    for regime, epochs, lead in (("short", 4, 0.0), ("long", 8, 0.02)):
        for seed in range(3):
            for method, more in (("dkd", 0.0), ("dgkd", 0.01 * seed)):
                accuracy = 0.9 + lead + more
                write_run(tmp_path / regime, method, seed, accuracy=accuracy, diagnosed=False, epochs=epochs)
    page = written(tmp_path, output=tmp_path / "out")
    for regime in ("short", "long"):
        row = page.row(f"{regime}/dgkd")
        assert row[4].startswith("+1.00 ")
        assert row[-1] == f"{regime}/dkd"


@pytest.mark.slow
def test_data_sets_are_kept_apart_and_it_is_said(tmp_path):
    for data, accuracy in (("mnist5k", 0.9), ("fashion_mnist", 0.8)):
        for seed in range(3):
            write_run(tmp_path / data, "kd", seed, accuracy=accuracy, data=data, diagnosed=False)
    page = written(tmp_path / "mnist5k", tmp_path / "fashion_mnist", output=tmp_path / "out")
    assert "use 2 data sets" in page.text
    assert [heading for heading in page.headings if heading not in SECTIONS] == [
        "Data set: mnist5k",
        "Data set: fashion_mnist",
    ]
    assert [row[2] for row in page.rows if row[0] == "kd" and "±" in row[2]][::2] == ["90.00 ± 0.00", "80.00 ± 0.00"]
    assert len(page.ids) == len(set(page.ids))


def test_a_configuration_that_is_no_html_does_not_become_html(tmp_path):
    write_run(tmp_path, "<b>kd", 0, accuracy=0.9, diagnosed=False)
    assert "<b>" not in written(tmp_path, output=tmp_path / "out").text


@pytest.mark.slow
def test_without_output_the_report_is_in_the_first_folder(tmp_path):
    write_run(tmp_path, "ce", 0, accuracy=0.9, diagnosed=False)
    assert compose.write([tmp_path]) == tmp_path / "report" / "index.html"
    assert compose.write([tmp_path]).exists()  # and is no work directory the next time


@pytest.mark.wrong_input
@pytest.mark.parametrize("damage", ["nothing", "no lines", "no configuration", "no folder"])
def test_where_nothing_is_readable_it_is_one_line_and_exit_code_2(tmp_path, capsys, damage):
    folder = tmp_path / "runs"
    if damage != "no folder":
        folder.mkdir()
    if damage in ("no lines", "no configuration"):
        path = write_run(folder, "kd", 0, accuracy=0.9)
        (path / ("metrics.jsonl" if damage == "no lines" else "config.json")).write_text("{")
    assert command.main([str(folder)]) == 2
    output = capsys.readouterr()
    assert re.fullmatch(r"dgkd_jax: nothing to report: .+\n", output.err)
    assert output.out == ""


@pytest.mark.wrong_input
@pytest.mark.parametrize("arguments", [[], ["x", "--outptu=y"]])
def test_a_wrong_command_line_is_one_line_and_exit_code_2(capsys, arguments):
    assert command.main(arguments) == 2
    assert re.fullmatch(r"dgkd_jax: .+\n", capsys.readouterr().err)


@pytest.mark.wrong_input
def test_a_report_that_cannot_be_written_is_exit_code_2(tmp_path, capsys):
    write_run(tmp_path, "ce", 0, accuracy=0.9, diagnosed=False)
    (tmp_path / "file").write_text("")
    assert command.main([str(tmp_path), f"--output={tmp_path}/file"]) == 2
    assert "cannot be written" in capsys.readouterr().err
