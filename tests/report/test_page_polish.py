"""What a reader meets on the page: teachers, epochs, keys that differ, commands for what is missing, dark mode."""

import html
import json
import re

import numpy as np
import pytest
from etils import epath
from matplotlib import colors
from synthetic_runs import write_evaluation, write_run

from dgkd_jax.report import compose, figures, grouping, page, per_example, pictures, sections, tables, work_directories


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(figures, "embed", lambda figure, name, folder: f"<svg>{name}</svg>")
    monkeypatch.setattr(per_example, "_MOST_PICTURES", 1)


def read(path):
    return work_directories.read(epath.Path(path))


def told(path, **teacher):
    """Lets result.json describe this teacher."""
    content = json.loads((path / "result.json").read_text())
    (path / "result.json").write_text(json.dumps(content | {"teacher": teacher}))


def own_run(folder, *, epochs_logged=None, accuracy=0.98):
    """A teacher's own run: no result.json; log.csv with so many rows."""
    path = write_run(folder, "ce", 0, accuracy=accuracy, finished=False).rename(folder / "teacher")
    config = json.loads((path / "config.json").read_text())
    config["student"]["model"] = "small_cnn_w24"
    (path / "config.json").write_text(json.dumps(config))
    if epochs_logged is not None:
        rows = "".join(f"{epoch},1.0,50,\n" for epoch in range(1, epochs_logged + 1))
        (path / "log.csv").write_text("epochs,train_loss,train_acc,test_acc\n" + rows)
    return path


def rows_of(text):
    """The cells' texts, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [
        [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in rows
    ]


# ----------------------------------------------------------------------------------------------------------- teachers


def test_a_teacher_with_all_its_epochs_is_finished_and_has_what_a_student_tells_of_it(tmp_path):
    teacher = read(own_run(tmp_path, epochs_logged=4))
    path = write_run(tmp_path, "kd", 0, accuracy=0.9)
    told(path, model="small_cnn_w24", parameters=121186, seconds=17.0, last_accuracy=0.98, best_accuracy=0.99)
    groups, _ = grouping.group([read(path)])
    row = rows_of(tables.runs_table(groups, [teacher]))[-1]
    assert row == ["teacher", "teacher's own run", "finished", "small_cnn_w24", "121,186", "98.00", "99.00", "0:17"]


@pytest.mark.parametrize("epochs_logged", [None, 0, 3])
def test_a_teacher_without_all_its_epochs_is_at_a_step(tmp_path, epochs_logged):
    teacher = read(own_run(tmp_path, epochs_logged=epochs_logged))
    assert tables.state(teacher) == "at step 200"
    groups, _ = grouping.group([read(write_run(tmp_path, "kd", 0, accuracy=0.9))])
    assert rows_of(tables.runs_table(groups, [teacher]))[-1][4] == "–"  # the student tells of another teacher


def test_the_teacher_has_a_row_in_the_results_and_at_the_last_evaluation(tmp_path):
    teacher = read(own_run(tmp_path, epochs_logged=4))
    runs = [write_run(tmp_path, method, 0, accuracy=0.9) for method in ("kd", "dkd")]
    for path in runs:
        told(path, model="small_cnn_w24", last_accuracy=0.98, best_accuracy=0.99)
    groups, _ = grouping.group([read(path) for path in runs])
    for own in ([], [teacher]):
        table = rows_of(tables.groups_table(groups, tables.compare(groups), own))
        assert [row[:4] for row in table if "teacher" in row[0]] == [
            ["the teacher, small_cnn_w24", "", "98.00", "99.00"]
        ]
        assert len({len(row) for row in table}) == 1
    last = rows_of(tables.last_evaluation(groups, [teacher]))
    assert last[-1][:3] == ["the teacher, small_cnn_w24", "98.00", "0.1000"]
    assert "teacher" not in "".join(row[0] for row in rows_of(tables.last_evaluation(groups)))


# ------------------------------------------------------------------------------------------------------------- epochs


@pytest.mark.parametrize(
    ("changes", "finished", "steps"),
    [
        ({}, True, 50),  # 200 steps in 4 epochs
        ({"epochs": 3}, True, None),  # 200 is no multiple of 3
        ({"epochs": "4"}, True, None),
        ({}, False, 50),  # evaluated every epoch, for the first time at step 50
        ({"eval_every": 2.0}, False, None),  # 25 steps an epoch would end at step 100
        ({"eval_every": 0.5}, False, None),
        ({"eval_every": 2.0, "epochs": 8}, False, 25),
        ({"eval_every": 3.0, "epochs": 99}, False, None),
        ({"eval_every": None}, False, None),
    ],
)
def test_steps_per_epoch_are_known_or_not(tmp_path, changes, finished, steps):
    path = write_run(tmp_path, "kd", 0, accuracy=0.9, finished=finished)
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))
    assert read(path).steps_per_epoch == steps


def test_curves_are_over_epochs_where_these_are_known_of_all_runs(tmp_path):
    known = write_run(tmp_path / "a", "kd", 0, accuracy=0.9)
    unknown = write_run(tmp_path / "b", "dkd", 0, accuracy=0.9)
    (unknown / "config.json").write_text(json.dumps(json.loads((unknown / "config.json").read_text()) | {"epochs": 3}))
    for paths, label, steps in (
        ([known], "epoch", [1, 2, 3, 4]),
        ([known, unknown], "training step", [50, 100, 150, 200]),
    ):
        groups, _ = grouping.group([read(path) for path in paths])
        with figures.look():
            axes = figures.curves(groups, sections._ACCURACY[0]).axes[0]
        assert axes.get_xlabel() == label
        assert axes.lines[0].get_xdata().tolist() == steps


# --------------------------------------------------------------------------------------------------- keys that differ


def test_keys_that_only_some_methods_read_are_apart_and_long_values_are_short(tmp_path):
    runs = []
    for method in ("ce", "kd", "dgkd"):
        path = write_run(tmp_path, method, 0, accuracy=0.9)
        content = json.loads((path / "config.json").read_text())
        content["epochs"] = 4 if method == "kd" else 8
        content["another"] = f"{method} " * 30
        (path / "config.json").write_text(json.dumps(content))
        runs.append(read(path))
    text = tables.differences(grouping.group(runs)[0])
    wide, narrow = text.split("<details>")
    assert rows_of(wide)[0] == ["group", "method", "epochs", "another"]
    assert all(len(cell) <= 24 for row in rows_of(wide) for cell in row)
    assert f'title="{"kd " * 30}"' in wide
    assert ["dgkd.epsilon", "0.1", "dgkd"] in rows_of(narrow)
    assert ["teacher.model", "small_cnn_w24", "kd, dgkd"] in rows_of(narrow)


def test_nothing_that_differs_is_no_table(tmp_path):
    groups, _ = grouping.group([read(write_run(tmp_path, "kd", 0, accuracy=0.9))])
    assert tables.differences(groups) == ""


# ------------------------------------------------------------------------------------------------ what else is on it


def test_neural_collapse_is_explained_where_it_first_stands(tmp_path):
    groups, _ = grouping.group([read(write_run(tmp_path, "kd", 0, accuracy=0.9))])
    text = tables.last_evaluation(groups)
    assert "NC1 to NC4 measure neural collapse" in text
    assert '<abbr title="neural collapse 1: ' in text
    plain, _ = grouping.group([read(write_run(tmp_path / "b", "kd", 0, accuracy=0.9, diagnosed=False))])
    assert "collapse" not in tables.last_evaluation(plain)


def test_the_command_for_what_is_missing_covers_the_runs_that_lack_it(tmp_path, undrawn):
    paths = [write_run(tmp_path / "my runs", method, 0, accuracy=0.9) for method in ("kd", "dkd", "dgkd")]
    for name in ("clean", "noised-8"):
        write_evaluation(paths[0], name, accuracy=0.8)
    write_evaluation(paths[1], "clean", accuracy=0.8)
    text = compose.write([tmp_path], tmp_path / "out").read_text()
    robustness = text[text.index('id="robustness"') : text.index('id="configurations"')]
    assert "of 2 of 3 runs (dkd-seed0, dgkd-seed0)" in robustness
    assert f"for run in &#x27;{paths[1]}&#x27; &#x27;{paths[2]}&#x27;; do python -m dgkd_jax.evaluate" in robustness
    assert str(paths[0]) not in robustness


def test_every_table_is_in_a_box_that_scrolls_and_shows_it(tmp_path, undrawn):
    write_run(tmp_path, "kd", 0, accuracy=0.9)
    text = compose.write([tmp_path], tmp_path / "out").read_text()
    assert text.count("<table>") == text.count('<div class="scroll" tabindex="0"><table>') > 3
    assert "no-repeat local" in page._CSS  # the shadows at the edges
    assert page._CSS.count("--shadow:") == 2  # of a light and of a dark page


def test_heat_maps_let_the_page_show_through():
    student = np.array([0, 1, 1, 2])
    with figures.look():
        figure = pictures.confusion_picture("kd", student, np.array([0, 1, 2, 2]))
    image = figure.axes[0].images[0]
    rgba = image.cmap(image.norm(np.array([0.0, 100.0])))
    assert rgba[:, 3].tolist() == [0.0, 1.0]
    texts = {text.get_color() for text in figure.axes[0].texts}
    assert texts <= {"white", figures.INK}
    assert colors.to_hex(rgba[1]) == "#0f5ca8"


def test_a_long_report_says_that_it_goes_on(tmp_path, undrawn, monkeypatch, capsys):
    write_run(tmp_path, "kd", 0, accuracy=0.9)
    compose.write([tmp_path], tmp_path / "out")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(compose, "_QUIET_S", 0.0)
    compose.write([tmp_path], tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "report: reading run 1 of 1"
    assert re.fullmatch(r"report: \d+ figures drawn", lines[-1])


def test_a_section_that_cannot_be_made_does_not_end_the_page(tmp_path, undrawn, monkeypatch):
    write_run(tmp_path, "kd", 0, accuracy=0.9)

    def broken(*_):
        raise KeyError("surprise")

    monkeypatch.setattr(sections, "_time", broken)
    text = compose.write([tmp_path], tmp_path / "out").read_text()
    assert "This section could not be made (KeyError: &#x27;surprise&#x27;)" in text
    assert "At the last evaluation" in text
