"""The evaluation command: a run's student beside its teacher on its own and on other sets; and every mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from configs import mnist5k
from dgkd_jax.data.open import open_source
from dgkd_jax.errors import BadInput
from dgkd_jax.evaluate import __main__ as evaluate_command
from dgkd_jax.evaluate import corruptions, foreign_sets
from dgkd_jax.runs import config as rules
from dgkd_jax.runs.student import read
from dgkd_jax.training.run import run as train

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "student.model": "small_cnn_w8",
    "teacher.model": "small_cnn_w24",
    "teacher.epochs": 2,
    "data.mock": True,
    "data.image_size": 16,
    "data.mock_train_examples": 64,
    "data.mock_eval_examples": 37,  # no multiple of anything
    "batch_size": 16,
    "eval_batch_size": 16,
    "epochs": 2,
    "eval_every": 1.0,
    "keep_checkpoints": 2,
    "compilation_cache": "",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of every kind: dgkd, and ce without a teacher; and what training returned of them."""
    root = tmp_path_factory.mktemp("runs")
    results = {}
    for method in ("dgkd", "ce"):
        config = mnist5k.get_config()
        config.update_from_flattened_dict(SETTINGS | {"method": method, "teacher.workdir": str(root / "teacher")})
        rules.validate(config)
        (results[method],) = train(config, str(root / method))
    return root, results


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the run, to be changed; its teacher stays where it is."""
    shutil.copytree(runs[0] / "dgkd", tmp_path / "dgkd")
    return tmp_path / "dgkd"


def command(capsys, *arguments):
    code = evaluate_command.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def evaluation(folder, name):
    with np.load(folder / f"{name}.npz") as arrays:
        return json.loads((folder / f"{name}.json").read_text()), dict(arrays)


@pytest.mark.slow
def test_training_leaves_the_clean_evaluation(runs):
    root, results = runs
    for method, result in results.items():
        values, rows = evaluation(root / method / "evaluations", "clean")
        assert values["student"]["accuracy"] == result["student"]["last_accuracy"]
        assert (values["data"], values["examples"], values["checkpoint_step"]) == ("clean", 37, 8)
        assert len(rows["label"]) == 37
    values, _ = evaluation(root / "dgkd" / "evaluations", "clean")
    assert values["teacher"]["accuracy"] == results["dgkd"]["teacher"]["last_accuracy"]
    values, rows = evaluation(root / "ce" / "evaluations", "clean")
    assert (values["teacher"], values["agreement"], values["logit_msd"]) == (None, None, None)
    assert not any(name.startswith(("teacher", "logit")) for name in rows)


@pytest.mark.slow
def test_the_command_repeats_it_exactly(runs, run, capsys):
    shutil.rmtree(run / "evaluations")
    code, out, err = command(capsys, f"--workdir={run}", "--data=clean")
    assert (code, err) == (0, "")
    expected_values, expected = evaluation(runs[0] / "dgkd" / "evaluations", "clean")
    values, rows = evaluation(run / "evaluations", "clean")
    assert values == expected_values
    assert rows.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(rows[name], array, err_msg=name)
    assert f"{100 * values['student']['accuracy']:.2f} %" in out
    assert sorted(path.name for path in (run / "evaluations").iterdir()) == ["clean.json", "clean.npz"]


def test_figures_follow_from_the_arrays(runs):
    values, rows = evaluation(runs[0] / "dgkd" / "evaluations", "clean")
    assert {name: (str(array.dtype), array.shape) for name, array in rows.items()} == {
        "label": ("int32", (37,)),
        **{f"{who}_prediction": ("int32", (37,)) for who in ("student", "teacher")},
        **{f"{who}_confidence": ("float32", (37,)) for who in ("student", "teacher")},
        **{f"{who}_nll": ("float32", (37,)) for who in ("student", "teacher")},
        "logit_distance": ("float32", (37,)),
        "embedding": ("float32", (37, 2)),
        "embedding_label": ("int32", (37,)),
    }
    for who in ("student", "teacher"):
        correct = rows[f"{who}_prediction"] == rows["label"]
        assert values[who]["accuracy"] == correct.mean()
        assert values[who]["ce"] == pytest.approx(rows[f"{who}_nll"].mean(), rel=1e-6)  # a float32 mean
        # Whoever is right with confidence c has a loss of −log c.
        confidence = rows[f"{who}_confidence"]
        np.testing.assert_allclose(np.exp(-rows[f"{who}_nll"][correct]), confidence[correct], rtol=1e-5)
    assert values["agreement"] == (rows["student_prediction"] == rows["teacher_prediction"]).mean()
    assert values["logit_msd"] == pytest.approx((rows["logit_distance"] ** 2).mean(), rel=1e-6)
    np.testing.assert_array_equal(rows["embedding_label"], rows["label"])


def test_the_rows_are_those_of_the_split_in_its_order(runs):
    config = mnist5k.get_config()
    config.update_from_flattened_dict(SETTINGS)
    (batch,) = open_source(config.data).eval_batches(batch_size=40)
    _, rows = evaluation(runs[0] / "dgkd" / "evaluations", "clean")
    np.testing.assert_array_equal(rows["label"], batch["label"][batch["mask"]])


@pytest.mark.slow
def test_a_finished_run_is_not_evaluated_again(runs, run, monkeypatch):
    config = mnist5k.get_config()
    config.update_from_flattened_dict(SETTINGS | {"method": "dgkd", "teacher.workdir": str(runs[0] / "teacher")})
    written = run / "evaluations" / "clean.json"
    before = written.stat().st_mtime_ns
    train(config, str(run))
    assert written.stat().st_mtime_ns == before

    whole = written.read_text()
    written.write_text(whole[:50])  # half-written
    train(config, str(run))
    assert written.read_text() == whole
    other = json.loads(whole) | {"checkpoint_step": 4}  # of another checkpoint
    written.write_text(json.dumps(other))
    train(config, str(run))
    assert written.read_text() == whole


@pytest.mark.slow
def test_corruptions_are_measured_on_corrupted_images(runs, run, capsys):
    """Against the student on images that were corrupted before; and any other batch size gives the same."""
    names = "contrast,jpeg_compression-5,noised-6,noised-6-wrapped,scrambled-4"
    code, out, _ = command(capsys, f"--workdir={run}", f"--data={names}")
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines()[2:-1]] == [
        *(f"contrast-{severity}" for severity in range(1, 6)), "contrast: mean",
        "jpeg_compression-5", "noised-6", "noised-6-wrapped", "scrambled-4",
    ]  # fmt: skip
    five = [evaluation(run / "evaluations", f"contrast-{s}")[0]["student"]["accuracy"] for s in range(1, 6)]
    assert f"{100 * np.mean(five):.2f} %" in out.splitlines()[7]

    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"eval_batch_size": 37}))
    other = run.parent / "elsewhere"
    assert command(capsys, f"--workdir={run}", f"--data={names}", f"--output={other}")[0] == 0
    for path in sorted(other.glob("*.npz")):
        _, rows = evaluation(other, path.stem)
        _, expected = evaluation(run / "evaluations", path.stem)
        for who in ("student", "teacher"):
            # Batches of another size are other matrix products: float32 rounding.
            np.testing.assert_allclose(rows[f"{who}_nll"], expected[f"{who}_nll"], rtol=1e-4, atol=1e-5)

    (batch,) = open_source(mnist_section()).eval_batches(batch_size=40)
    images = np.asarray(corruptions.scramble_patches(batch["image"], np.arange(40, dtype=np.int32), side=4))
    logits = logits_of(run, images)[:37]
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(37), batch["label"][:37]]
    _, rows = evaluation(run / "evaluations", "scrambled-4")
    np.testing.assert_allclose(rows["student_nll"], nll, rtol=1e-4, atol=1e-5)  # float32 against float64


def logits_of(run, images):
    """Of the run's student, by hand."""
    student = read(run)
    pixels = (images / 255 - student.about["mean"]) / student.about["std"]
    return np.asarray(student.model.apply(student.variables, pixels.astype(np.float32)), np.float64)


def mnist_section(**values):
    config = mnist5k.get_config()
    config.update_from_flattened_dict(SETTINGS | values)
    return config.data


@pytest.mark.slow
def test_the_steps_of_a_run_are_chosen(runs, run, capsys):
    for step, expected in {"last": 8, "4": 4, "best": None}.items():
        code, _, _ = command(capsys, f"--workdir={run}", "--data=clean", f"--step={step}")
        assert code == 0
        values, _ = evaluation(run / "evaluations", "clean")
        assert values["checkpoint_step"] == (expected or values["checkpoint_step"])
        if step == "best":
            assert values["student"]["accuracy"] == runs[1]["dgkd"]["student"]["best_accuracy"]


@pytest.mark.slow
def test_teachers_are_found_checked_and_left_out(runs, run, capsys):
    root = runs[0]
    code, out, _ = command(capsys, f"--workdir={run}", "--data=clean", "--teacher=none")
    assert code == 0
    assert ", teacher" not in out
    assert evaluation(run / "evaluations", "clean")[0]["teacher"] is None

    result = json.loads((run / "result.json").read_text())
    result["teacher"]["weights"] = "/gone/teacher"
    (run / "result.json").write_text(json.dumps(result))
    code, _, err = command(capsys, f"--workdir={run}", "--data=clean")
    assert (code, err.count("\n")) == (2, 1)
    assert "the teacher is not at /gone/teacher: say where it is with --teacher=WORKDIR" in err
    shutil.copytree(root / "teacher", run.parent / "teacher")  # beside the run, as `main` leaves it
    code, out, _ = command(capsys, f"--workdir={run}", "--data=clean")
    assert code == 0
    assert "teacher small_cnn_w24" in out

    (run / "result.json").unlink()  # the run has not ended; its configuration says where
    assert command(capsys, f"--workdir={run}", "--data=clean")[0] == 0
    code, _, err = command(capsys, f"--workdir={run}", "--data=clean", f"--teacher={root / 'ce'}")
    assert code == 2
    assert "is not the one that taught this student" in err


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("gausian_noise", "no such set; did you mean 'gaussian_noise'?"),
        ("gaussian_noise-6", "the severity is 1 to 5"),
        ("scrambled-5", "do not divide an image of 16x16 into several; these do: 1, 2, 4, 8"),
        ("noised-13", "a side of 1 to 12 pixels fits"),
        ("noised", "no such set; did you mean 'noised-8'?"),
        ("contrast-1-wrapped", "no such set"),
        ("clean,", "no such set"),
        ("image_folder:/nowhere", "looked for images in /nowhere/<class>/*"),
        ("tfds:cifar10_corruptd/fog_1", "no data set of this name; did you mean 'cifar10_corrupted'"),
        ("tfds:cifar10_corrupted/frog_1", "no such configuration of cifar10_corrupted; nearest: fog_1, frost_1"),
        ("tfds:imdb_reviews", "no set of images with one label each"),
    ],
)
def test_mistakes_in_names_are_told(runs, capsys, monkeypatch, tmp_path, data, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    code, out, err = command(capsys, f"--workdir={runs[0] / 'dgkd'}", f"--data={data}")
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("dgkd_jax: ")
    assert err.count("\n") == 1


def test_mistakes_in_work_directories_are_told(run, capsys, tmp_path):
    def message(*arguments):
        code, out, err = command(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    assert "no work directory of a run" in message(f"--workdir={tmp_path}", "--data=clean")
    assert "no checkpoint of step 3" in message(f"--workdir={run}", "--data=clean", "--step=3")
    assert "--data" in message(f"--workdir={run}")
    (run / "result.json").write_text('{"teacher": ')
    assert "result.json is damaged" in message(f"--workdir={run}", "--data=clean")
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint yet" in message(f"--workdir={run}", "--data=clean")


@pytest.mark.slow
def test_python_dash_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "dgkd_jax.evaluate", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "scrambled-4" in done.stdout


# -- other sets --------------------------------------------------------------------------------------------------------


def png(value):
    return tf.io.encode_png(np.full((20, 24, 1), value, np.uint8)).numpy()


class TinyDigits(tfds.core.GeneratorBasedBuilder):
    """Six images of one grey each, of three classes, in two configurations: of all names or of its own."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012, as TFDS wants it
        tfds.core.BuilderConfig(name="own_names"),
        tfds.core.BuilderConfig(name="all_names"),
        tfds.core.BuilderConfig(name="strange"),
    ]

    def _info(self):
        names = {"own_names": ["7", "3", "5"], "all_names": [str(n) for n in range(10)], "strange": ["7", "3", "cat"]}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 1)),
                    "label": tfds.features.ClassLabel(names=names[self.builder_config.name]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"test": self._examples(6), "extra": self._examples(2)}

    def _examples(self, count):
        for key in range(count):
            yield key, {"image": np.full((20, 24, 1), 40 * key, np.uint8), "label": ("7", "3")[key % 2]}

    def _generate_examples(self):
        """Unused: the splits name their generators themselves."""


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.mark.slow
def test_a_set_with_some_of_the_classes_is_a_choice_among_these(run, capsys, tfds_folder):
    code, out, err = command(
        capsys, f"--workdir={run}", "--data=tfds:tiny_digits/own_names,tfds:tiny_digits/all_names:extra"
    )
    assert code == 0, err
    assert "sets with 3 of the classes: the choice is among these alone" in out
    values, rows = evaluation(run / "evaluations", "tfds_tiny_digits_own_names")
    assert (values["data"], values["examples"]) == ("tfds:tiny_digits/own_names", 6)
    assert values["restricted_to_classes"] == 3
    assert sorted(rows["label"]) == [3, 3, 3, 7, 7, 7]  # the network's numbers, not the set's
    for who in ("student", "teacher"):
        assert set(rows[f"{who}_prediction"]) <= {3, 5, 7}
        assert rows[f"{who}_confidence"].min() >= 1 / 3
    about = SimpleNamespace(num_classes=10, image_shape=(16, 16, 1), mean=(0.5,), std=(0.5,))
    (batch,) = foreign_sets.open_tfds("tiny_digits/own_names", "", run=about, data=mnist_section()).batches(6)
    logits = logits_of(run, batch["image"])
    nll = np.log(np.exp(logits[:, [3, 5, 7]]).sum(1)) - logits[np.arange(6), batch["label"]]
    np.testing.assert_allclose(rows["student_nll"], nll, rtol=1e-4, atol=1e-5)  # float32 against float64
    values, _ = evaluation(run / "evaluations", "tfds_tiny_digits_all_names_extra")
    assert (values["examples"], values["restricted_to_classes"]) == (2, None)


def test_imagenet_r_and_a_are_a_choice_among_the_classes_that_occur(monkeypatch, tfds_folder):
    """They declare all of ImageNet's names."""
    about = SimpleNamespace(num_classes=10, image_shape=(16, 16, 1), mean=(0.5,), std=(0.5,))
    monkeypatch.setattr(foreign_sets, "_PARTIAL", ("tiny_digits",))
    opened = foreign_sets.open_tfds("tiny_digits/all_names", "", run=about, data=mnist_section())
    assert opened.restricted_to == (3, 7)


def test_foreign_images_are_brought_to_the_size_of_the_networks(tfds_folder):
    about = SimpleNamespace(num_classes=10, image_shape=(16, 16, 1), mean=(0.5,), std=(0.5,))
    opened = foreign_sets.open_tfds("tiny_digits/own_names", "test", run=about, data=mnist_section())
    (batch,) = opened.batches(8)
    assert batch["image"].shape == (8, 16, 16, 1)
    assert sorted(batch["image"][batch["mask"]][:, 8, 8, 0]) == [0, 40, 80, 120, 160, 200]


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("tiny_digits/strange", "", "its class 'cat' is none of the networks' 10"),
        ("tiny_digits/own_names", "train", "no split 'train'; choose :test, :extra"),
    ],
)
def test_sets_that_do_not_fit_are_refused(tfds_folder, name, split, message):
    about = SimpleNamespace(num_classes=10, image_shape=(16, 16, 1), mean=(0.5,), std=(0.5,))
    with pytest.raises(BadInput) as refused:
        foreign_sets.open_tfds(name, split, run=about, data=mnist_section())
    assert message in str(refused.value)


@pytest.mark.wrong_input
def test_a_set_that_does_not_exist_is_refused_without_asking_any_storage(tfds_folder, monkeypatch):
    about = SimpleNamespace(num_classes=10, image_shape=(16, 16, 1), mean=(0.5,), std=(0.5,))
    monkeypatch.setattr(foreign_sets.tfds, "builder", None)  # it would ask Google's, and print about credentials
    with pytest.raises(BadInput, match="tfds:cifar11: TFDS has no data set of this name; did you mean .*'cifar10'"):
        foreign_sets.open_tfds("cifar11", "", run=about, data=mnist_section())


def test_a_set_that_cannot_be_downloaded_says_so(tfds_folder):
    about = SimpleNamespace(num_classes=10, image_shape=(32, 32, 3), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(BadInput, match=r"tfds:cifar10_corrupted/fog_1 is missing: .* config\.data\.download=False"):
        foreign_sets.open_tfds("cifar10_corrupted/fog_1", "", run=about, data=mnist_section(**{"data.download": False}))


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["", "val"])
def test_an_image_folder_is_a_test_set_with_the_runs_classes(run, capsys, tfds_folder, tmp_path, inner):
    for name, value in (("4", 10), ("9", 200)):
        path = tmp_path / "stylised" / inner / name / "a.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(value))
    code, _, err = command(capsys, f"--workdir={run}", f"--data=image_folder:{tmp_path}/stylised")
    assert code == 0, err
    (path,) = (run / "evaluations").glob("image_folder*.json")
    values, rows = evaluation(run / "evaluations", path.stem)
    assert values["examples"] == 2
    assert sorted(rows["label"]) == [4, 9]
    assert set(rows["student_prediction"]) <= {4, 9}

    (tmp_path / "stylised" / inner / "4").rename(tmp_path / "stylised" / inner / "four")
    code, _, err = command(capsys, f"--workdir={run}", f"--data=image_folder:{tmp_path}/stylised")
    assert code == 2
    assert "its class 'four' is none of the networks' 10" in err


def test_classes_are_matched_by_name_or_by_number():
    def match(names, of_network, count):
        classes, restricted = foreign_sets.match_classes(names, of_network, count, what="x")
        return classes.tolist(), restricted

    assert match(("b", "a"), ("a", "b"), 2) == ([1, 0], None)
    assert match(("c", "a"), ("a", "b", "c"), 3) == ([2, 0], (0, 2))
    assert match(("0", "1"), ("a", "b"), 2) == ([0, 1], None)  # as cifar10_corrupted, which has no names
    assert match(("a", "b"), None, 2) == ([0, 1], None)
    for names, of_network in ((("a", "d"), ("a", "b")), (("a",), None), (("0", "1", "2"), ("a", "b"))):
        with pytest.raises(BadInput):
            match(names, of_network, 2)
