"""Reading work directories, whole and damaged, and which runs belong together."""

import json

import pytest
from etils import epath
from synthetic_runs import write_evaluation, write_run

from configs import default
from dgkd_jax.report import evaluations, grouping, work_directories


def read(path):
    return work_directories.read(epath.Path(path))


def test_work_directories_are_found_at_any_depth_and_once(tmp_path):
    first = write_run(tmp_path / "study" / "few_images", "kd", 0, accuracy=0.9)
    second = write_run(tmp_path / "study" / "all_images", "kd", 1, accuracy=0.9)
    found, notes = work_directories.find([tmp_path, first])
    assert sorted(map(str, found)) == sorted(map(str, [first, second]))
    assert notes == []


def test_folders_that_are_no_work_directories_are_named(tmp_path):
    path = write_run(tmp_path, "kd", 0, accuracy=0.9)
    (path / "metrics.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    _, notes = work_directories.find([tmp_path, tmp_path / "empty", tmp_path / "nowhere"])
    assert [note.split(": ", 1)[1] for note in notes] == [
        "left out, it has no metrics.jsonl",
        "no work directory (config.json and metrics.jsonl) in it or beneath it",
        "no such folder",
    ]


def test_a_half_written_line_is_left_out_and_said(tmp_path):
    path = write_run(tmp_path, "kd", 0, accuracy=0.9, finished=False)
    whole = read(path)
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 250, "kind": "train", "loss": 0.\xc3')  # cut within a character
    run = read(path)
    assert run._replace(notes=()) == whole
    assert run.notes == (f"{path}/metrics.jsonl: 1 damaged line left out",)
    assert not run.finished
    assert run.last_step == 200


@pytest.mark.parametrize("line", ["[]", "3", '{"kind": "train"}', '{"step": "x", "kind": "eval"}', "null"])
def test_lines_of_another_form_are_left_out(tmp_path, line):
    path = write_run(tmp_path, "kd", 0, accuracy=0.9)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert read(path).notes == (f"{path}/metrics.jsonl: 1 damaged line left out",)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_damaged_result_makes_the_run_unfinished_and_is_said(tmp_path, content):
    path = write_run(tmp_path, "kd", 0, accuracy=0.9)
    (path / "result.json").write_text(content)
    run = read(path)
    assert not run.finished
    assert run.notes == (f"{path}/result.json: unreadable",)


def test_a_damaged_configuration_makes_the_run_unreadable(tmp_path):
    path = write_run(tmp_path, "kd", 0, accuracy=0.9)
    (path / "config.json").write_text('{"method": ')
    assert read(path) is None


def test_values_that_were_not_finite_are_gaps_in_a_curve():
    lines = [{"step": 1, "ce": 0.5}, {"step": 2, "ce": None}, {"step": 3}, {"step": 4, "ce": 0.25}]
    steps, values = work_directories.curve(lines, "ce")
    assert (steps.tolist(), values.tolist()) == ([1, 4], [0.5, 0.25])
    assert len(work_directories.curve(lines, "ece")[0]) == 0


def test_evaluations_are_read_by_the_name_of_their_data_and_damaged_arrays_are_none(tmp_path):
    path = write_run(tmp_path, "kd", 0, accuracy=0.9)
    write_evaluation(path, "noised-8", accuracy=0.8)
    evaluation = read(path).evaluations["noised-8"]
    assert evaluation.summary["student"]["accuracy"] == 0.8
    assert len(evaluations.arrays(evaluation)["label"]) == 400
    (path / "evaluations" / "noised-8.npz").write_bytes(b"PK\x03\x04 cut")
    assert evaluations.arrays(evaluation) == {}


def test_runs_that_differ_in_seed_and_places_are_one_group(tmp_path):
    """`write_run` gives every seed another data.dir, teacher.cache and eval_every."""
    found = [read(write_run(tmp_path, method, seed, accuracy=0.9)) for method in ("dkd", "ce") for seed in (2, 0, 1)]
    groups, notes = grouping.group(found)
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("ce", [0, 1, 2]),
        ("dkd", [0, 1, 2]),
    ]
    assert notes == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [(None, "diagnose", False), (None, "eval_batch_size", 77), ("optimizer", "momentum", 0.5)],
)
def test_runs_that_differ_in_what_decides_nothing_are_one_group(tmp_path, section, key, value):
    """As two runs are the same run: `runs.config.deciding`."""
    found = []
    for seed in (0, 1):
        path = write_run(tmp_path, "dkd", seed, accuracy=0.9)
        content = default.get_config().to_dict() | json.loads((path / "config.json").read_text())
        if seed:
            (content[section] if section else content)[key] = value
        (path / "config.json").write_text(json.dumps(content))
        found.append(read(path))
    decides_nothing = key in ("diagnose", "eval_batch_size")
    groups, _ = grouping.group(found)
    found = sorted([run.seed for run in group.runs] for group in groups)
    assert found == ([[0, 1]] if decides_nothing else [[0], [1]])


def test_only_what_the_method_reads_tells_groups_apart(tmp_path):
    def groups_of(method):
        found = [
            read(write_run(tmp_path / method / str(epsilon), method, 0, accuracy=0.9, epsilon=epsilon))
            for epsilon in (0.1, 0.3)
        ]
        return grouping.group(found)

    groups, notes = groups_of("dgkd")
    assert [group.label for group in groups] == ["0.1/dgkd", "0.3/dgkd"]
    assert notes == []
    groups, notes = groups_of("dkd")  # does not read epsilon: the same run twice
    assert len(groups) == 1
    assert "has the same configuration and seed" in notes[0]


def test_without_telling_folders_the_label_is_what_differs(tmp_path):
    found = []
    for number, epsilon in enumerate((0.1, 0.3)):
        path = write_run(tmp_path / str(number), "dgkd", 0, accuracy=0.9, epsilon=epsilon)
        found.append(read(path.rename(tmp_path / str(number) / "seed0")))
    assert [group.label for group in grouping.group(found)[0]] == ["dgkd, epsilon 0.1", "dgkd, epsilon 0.3"]


def test_of_two_runs_with_one_seed_the_finished_one_counts(tmp_path):
    crashed = read(write_run(tmp_path / "a", "kd", 0, accuracy=0.5, finished=False))
    whole = read(write_run(tmp_path / "b", "kd", 0, accuracy=0.9))
    for order in ([crashed, whole], [whole, crashed]):
        groups, notes = grouping.group(order)
        assert groups[0].runs == [whole]
        assert notes == [f"{crashed.path}: left out, {whole.path} has the same configuration and seed"]


def test_keys_that_differ():
    first, second = {"a": 1, "b": [1], "c": 0}, {"a": 1, "b": [2], "d": 0}
    assert grouping.differing([first, second]) == ["b", "c", "d"]
    assert grouping.differing([first]) == []


def test_the_newest_account_of_the_time_counts(tmp_path):
    path = write_run(tmp_path, "kd", 0, accuracy=0.9)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 200, "kind": "goodput", "training": 99.0, "save": None}) + "\n")
    assert read(path).goodput == {"training": 99.0}
