"""Whatever stands in a run's files, there is a page, every section of it, and bounded memory.

Each page is about many runs, each with one damaged value in another place.
"""

import copy
import itertools
import json
import math
import os

import numpy as np
import pytest
from etils import epath
from synthetic_runs import write_evaluation, write_run

from dgkd_jax.report import (
    compose,
    evaluations,
    figures,
    grouping,
    metric_lines,
    per_example,
    sections,
    tables,
    work_directories,
)

DEEP = "[" * 900 + "]" * 900
VALUES = {
    "huge": 10**400, "negative huge": -(10**400), "longer than Python reads": "RAW" + "9" * 5000, "1e308": 1e308,
    "beyond floats": "RAW1e999", "minus one": -1, "zero": 0, "large": 10**18, "half": 0.5, "true": True, "null": None,
    "text": "text", "no text": "", "NaN as text": "NaN", "NaN": math.nan, "infinity": -math.inf, "formula": "$x^$",
    "half a character": "\ud800", "control": "a\x00\n\x1b[31mb", "long text": "x" * 50_000, "list": [1, 2],
    "empty list": [], "list of texts": ["a", None], "nested": {"a": {"b": [{}]}}, "empty": {}, "deep": "RAW" + DEEP,
}  # fmt: skip
# (file, which of its lines, keys down to the value).
PLACES = [
    *(("config.json", 0, keys) for keys in (
        ["method"], ["seed"], ["name"], ["epochs"], ["eval_every"], ["data"], ["data", "name"], ["data", "mock"],
        ["student"], ["student", "model"], ["teacher"], ["teacher", "model"], ["dkd"], ["dkd", "alpha"], ["dgkd"],
        ["another"])),
    *(("metrics.jsonl", line, [key]) for line, keys in (
        (0, ["step", "kind", "loss", "accuracy", "tckd", "other"]),
        (7, ["step", "kind", "accuracy", "ce", "class_accuracy", "nc1", "ece"]),
        (8, ["step", "kind", "training", "other"])) for key in keys),
    *(("result.json", 0, keys) for keys in (
        ["evaluation"], ["evaluation", "examples"], ["teacher"], ["teacher", "last_accuracy"], ["teacher", "model"],
        ["teacher", "parameters"], ["student"], *(["student", key] for key in (
            "last_accuracy", "best_accuracy", "best_epoch", "parameters", "seconds", "model")))),
    *(("evaluations/clean.json", 0, keys) for keys in (
        ["data"], ["student"], ["student", "accuracy"], ["teacher"], ["teacher", "accuracy"],
        ["restricted_to_classes"])),
    ("failure.json", 0, ["error"]),
    ("log.csv", 0, []),
]  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Of curves only the numbers are made, of other figures all but the drawing, and of pictures of a group two."""

    def numbers(groups, what, *, reference=None):
        for group in groups:
            for _, (steps, values) in figures._series(group, what, by_epochs=figures.in_epochs(groups)):
                assert np.isfinite(steps).all()
                assert np.isfinite(values).all()

    monkeypatch.setattr(figures, "curves", numbers)
    monkeypatch.setattr(figures, "embed", lambda figure, name, folder: f"<svg>{name}</svg>")
    monkeypatch.setattr(per_example, "_MOST_PICTURES", 2)


def damage(path, file, number, keys, value):
    """Replace one value in a work directory's file."""
    target = path / file
    if file == "failure.json":
        (path / "result.json").unlink()
        target.write_text('{"error": 1}')
    if file == "log.csv":
        target.write_bytes(f"epochs\n{value},1\n".encode(errors="surrogatepass"))
        return
    texts = target.read_text().splitlines() if target.suffix == ".jsonl" else [target.read_text()]
    content = json.loads(texts[number])
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    raw = isinstance(value, str) and value.startswith("RAW")
    text = json.dumps(content)
    texts[number] = text.replace(json.dumps(value), value.removeprefix("RAW")) if raw else text
    target.write_text("\n".join(texts) + "\n")


def whole_page(*workdirs, output):
    text = compose.write(workdirs, output).read_text()
    assert text.count("<section ") % 10 == 0
    assert "could not be made" not in text, text[text.index("could not be made") :][:400]
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = write_run(tmp_path_factory.mktemp("whole"), "dgkd", 0, accuracy=0.9)
    write_evaluation(path, "clean", accuracy=0.9, examples=40)
    return path


def copied(whole, to):
    to.mkdir(parents=True)
    for file in whole.rglob("*"):
        if file.is_file():
            (to / file.relative_to(whole)).parent.mkdir(exist_ok=True)
            (to / file.relative_to(whole)).write_bytes(file.read_bytes())
    return to


# The rest of them with make test-faults: each makes a page of some fifty runs, which takes seconds.
USUAL = ("huge", "minus one", "null", "text", "NaN", "formula", "list", "nested")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in USUAL else pytest.mark.faults) for kind in VALUES]
)
def test_one_damaged_value_anywhere_still_gives_the_page(whole, quick, tmp_path, kind):
    for seed, (file, number, keys) in enumerate(PLACES):
        path = copied(whole, tmp_path / "runs" / f"dgkd-seed{seed}")
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(content | {"seed": seed}))
        damage(path, file, number, keys, copy.deepcopy(VALUES[kind]))
    text = whole_page(tmp_path / "runs", output=tmp_path / "out")
    undamaged = sum(f"dgkd-seed{seed}" in text for seed in range(len(PLACES)))
    assert undamaged == len(PLACES)  # each is on the page: in the tables, or in a sentence that says why not


ARRAYS = {
    "floats": lambda a: a.astype(np.float32) + 0.5,
    "negative": lambda a: -1 - a,
    "large": lambda a: a + 10**12,
    "shorter": lambda a: a[:-1],
    "none": lambda a: a[:0],
    "two axes": lambda a: np.stack([a, a]),
    "scalar": lambda a: a[0],
    "texts": lambda a: a.astype(str),
    "NaN": lambda a: np.full(a.shape, np.nan),
    "bool": lambda a: a.astype(bool),
    "complex": lambda a: a.astype(complex),
    "bytes": lambda a: a.astype(np.uint8),
    "missing": None,
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_one_damaged_array_still_gives_the_page(whole, quick, tmp_path, kind):
    with np.load(whole / "evaluations" / "clean.npz") as stored:
        arrays = dict(stored)
    for number, name in enumerate(arrays):
        path = copied(whole, tmp_path / "runs" / str(number) / "dgkd-seed0")
        content = json.loads((path / "config.json").read_text())
        content["dgkd"]["epsilon"] = number / 100  # so that each is a group, whose arrays are read
        (path / "config.json").write_text(json.dumps(content))
        changed = {key: array for key, array in arrays.items() if key != name}
        if ARRAYS[kind] is not None:
            changed[name] = ARRAYS[kind](arrays[name])
        np.savez(path / "evaluations" / "clean.npz", **changed)
    whole_page(tmp_path / "runs", output=tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive", "flags", "unfolds"])
def test_arrays_that_are_no_archive_are_none(whole, quick, tmp_path, content):
    path = copied(whole, tmp_path / "dgkd-seed0")
    file = path / "evaluations" / "clean.npz"
    if content == "flags":
        content = bytearray(file.read_bytes())
        content[content.index(b"PK\x01\x02") + 8] |= 1
    elif content == "unfolds":
        content = bytearray(file.read_bytes())
        at = content.index(b"PK\x01\x02")
        content[at + 24 : at + 28] = b"\xf0\xff\xff\xff"
    file.write_bytes(content)
    assert evaluations.arrays(work_directories.read(epath.Path(path)).evaluations["clean"]) == {}
    whole_page(path, output=tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["$x^$", "$", "a$b$c$", "\\$x", "_hidden", "a\nb", "\x1b[31m", "<b>&amp;", "%s {0}", "日本語 🎈", "x" * 200,
             "99999999999999999999999" * 8, os.fsdecode(b"\xff\xfe")]
)  # fmt: skip
def test_folders_may_have_any_name(whole, quick, tmp_path, name):
    for seed in (0, 1):
        path = copied(whole, tmp_path / "runs" / f"{name}-seed{seed}")
        content = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(content | {"seed": seed}))
        (path / "evaluations" / "clean.json").write_text(
            json.dumps(json.loads((path / "evaluations" / "clean.json").read_text()) | {"data": f"{name}-3"})
        )
    whole_page(tmp_path / "runs", output=tmp_path / "out")


def test_a_name_that_looks_like_a_formula_is_drawn_as_it_is(whole, tmp_path):
    """With the real figures, whose texts are laid out."""
    path = copied(whole, tmp_path / "runs" / "$x^$")
    groups, _ = grouping.group([work_directories.read(epath.Path(path))])
    with figures.look():
        figure = figures.curves(groups, figures.Curve("loss", "train", "Loss", "loss"))
        svg = figures.embed(figure, "loss", epath.Path(tmp_path))
    assert "<svg" in svg
    assert figure.legends[0].get_texts()[0].get_text() == r"\$x^\$"  # which matplotlib shows as $x^$


@pytest.mark.parametrize("values", [(1e99, 1e-99, 1.0), (-1e99, 1e99, 0.0), (0.0, 0.0, 0.0), (1e-99, 3e38, 1.0)])
@pytest.mark.parametrize("steps", [(0, 1, 2), (0, 10**15, 10**15 - 1)])
def test_extreme_numbers_are_drawn(tmp_path, values, steps):
    """With the real figures."""
    lines = [{"step": step, "loss": value} for step, value in zip(steps, values, strict=True)]
    run = work_directories.Run(epath.Path("/x/kd"), {"seed": 0}, {}, lines, [], None, {}, None, ())
    with figures.look():
        figure = figures.curves([grouping.Group("kd", [run])], figures.Curve("loss", "train", "Loss", "loss", 100))
        assert "<svg" in figures.embed(figure, "loss", epath.Path(tmp_path))


def test_a_label_that_begins_with_an_underscore_is_in_the_legend(whole, tmp_path):
    groups, _ = grouping.group([work_directories.read(epath.Path(copied(whole, tmp_path / "_x-seed0")))])
    with figures.look():
        figure = figures.curves(groups, figures.Curve("loss", "train", "Loss", "loss"))
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_x"]


@pytest.mark.parametrize(
    "file", ["config.json", "result.json", "metrics.jsonl", "failure.json", "log.csv", "evaluations"]
)
@pytest.mark.parametrize("what", ["empty", "folder", "noise", "zeros", "utf-16", "list", "deep"])
def test_one_damaged_file_beside_a_whole_run(whole, quick, tmp_path, file, what):
    copied(whole, tmp_path / "runs" / "kd-seed0")
    path = copied(whole, tmp_path / "runs" / "dgkd-seed0")
    if file == "evaluations":
        for each in (path / file).iterdir():
            each.unlink()
        (path / file).rmdir()
    (path / file).unlink(missing_ok=True)
    if what == "folder":
        (path / file).mkdir()
    else:
        content = {"empty": b"", "noise": bytes(range(256)) * 9, "zeros": bytes(4096), "list": b"[1, 2]\n",
                   "utf-16": "{}".encode("utf-16"), "deep": DEEP.encode() * 200}[what]  # fmt: skip
        (path / file).write_bytes(content)
    assert "kd-seed0" in whole_page(tmp_path / "runs", output=tmp_path / "out")


def test_folders_that_hold_themselves_are_visited_once(whole, quick, tmp_path):
    copied(whole, tmp_path / "runs" / "kd-seed0")
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs", target_is_directory=True)
    found, notes = work_directories.find([tmp_path / "runs"])
    assert (len(found), notes) == (1, [])


# -------------------------------------------------------------------------------------------------------- long files


def lines_of(path, count, *, kind="train"):
    with (path / "metrics.jsonl").open("w") as file:
        file.writelines(
            f'{{"step": {step}, "kind": "{kind}", "loss": {1 / step}, "accuracy": {0.5 if step != 777 else 0.9}, '
            f'"images_per_second": 1.0}}\n'
            for step in range(1, count + 1)
        )
    return work_directories.read(epath.Path(path))


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("count", [metric_lines.MOST_LINES - 2, 20_000])
def test_of_a_long_file_some_thousands_of_lines_are_kept_evenly(whole, tmp_path, kind, count):
    run = lines_of(copied(whole, tmp_path / "dgkd-seed0"), count, kind=kind)
    kept = run.train if kind == "train" else run.evals
    steps = [line["step"] for line in kept]
    assert (steps[0], steps[-1]) == (1, count)
    assert steps == sorted(set(steps))
    assert set(kept[0]) == {"step", "loss", "accuracy"}
    assert run.thinned == count - len(kept)
    if count < metric_lines.MOST_LINES:
        assert run.thinned == 0
        return
    assert metric_lines.MOST_LINES / 2 - 1 <= len(kept) <= metric_lines.MOST_LINES
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 2 * count / (metric_lines.MOST_LINES / 2)
    assert max(line["accuracy"] for line in kept) == 0.9
    assert run.last_step == count


def test_lines_that_were_not_kept_are_said_on_the_page(whole, quick, tmp_path):
    path = copied(whole, tmp_path / "dgkd-seed0")
    run = lines_of(path, 10_000)
    text = whole_page(path, output=tmp_path / "out")
    assert f"{path}: {run.thinned:,} of its lines in metrics.jsonl are not in the curves" in text
    assert f"up to {metric_lines.MOST_LINES:,}" in text


def test_a_repeated_step_counts_as_it_was_written_last(whole, tmp_path):
    path = copied(whole, tmp_path / "dgkd-seed0")
    count = 10_000
    with (path / "metrics.jsonl").open("w") as file:
        for value in (1.0, 2.0):
            file.writelines(f'{{"step": {s}, "kind": "train", "loss": {value}}}\n' for s in range(1, count + 1))
    run = work_directories.read(epath.Path(path))
    assert {line["loss"] for line in run.train} == {2.0}
    assert len(run.train) <= metric_lines.MOST_LINES


def test_a_line_of_megabytes_is_one_damaged_line(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(metric_lines, "_LONGEST_LINE", 1000)
    path = copied(whole, tmp_path / "dgkd-seed0")
    before = work_directories.read(epath.Path(path))
    content = (path / "metrics.jsonl").read_text().splitlines()
    long = json.dumps({"step": 3, "kind": "train", "loss": 1.0, "more": "x" * 5000})
    short = [line for line in content if len(line) < 990]
    (path / "metrics.jsonl").write_text("\n".join([long, *short, long]) + "\n")
    run = work_directories.read(epath.Path(path))
    assert any("2 damaged lines left out" in note for note in run.notes)
    assert run.train == before.train


def test_what_is_kept_of_a_line_is_what_the_page_shows():
    drawn = [
        curve.key
        for curves in (sections._ACCURACY, sections._PARTS, sections._GRADIENTS, sections._TEACHER, sections._ECE,
                       sections._COLLAPSE)
        for curve in curves
    ]  # fmt: skip
    assert {*drawn, *(key for key, *_ in tables._LAST)} == metric_lines.METRICS
