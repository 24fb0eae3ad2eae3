"""The studies of photographs: teachers, arms, images and objectives, and what they say where the images are missing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.study import cifar10, cifar10_images, cifar10_machines, cifar10_screening, cifar10_weights, fashion_images
from configs.study.objectives import CoupledKD, LogDKD
from dgkd_jax import losses
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import DKD, Progress
from dgkd_jax.study import rows
from dgkd_jax.study.plan import runs_of

AFTER_THE_RAMP = Progress(jnp.asarray(90), steps_per_epoch=10, total_steps=100)


@pytest.mark.slow
def test_each_regime_has_three_teachers_of_its_own_data_and_no_arm_changes_one(tmp_path):
    study = cifar10_screening.get_study()
    runs = runs_of(study, output=str(tmp_path), seeds=study.seeds, regimes=study.regimes, arms=study.arms)
    teachers = {
        (regime, seed % 3): {run.config.teacher.workdir for run in runs if (run.regime, run.seed) == (regime, seed)}
        for regime in study.regimes
        for seed in study.seeds
    }
    assert {len(folders) for folders in teachers.values()} == {1}
    assert len(set.union(*teachers.values())) == 6
    for number in range(3):
        assert teachers["10,000 images", number] == teachers["8 epochs", number]
        assert teachers["10,000 images", number] != teachers["30 % wrong labels", number]


PEERS = ("nkd", "dist", "wttm", "gdkd", "rld", "kd standardized", "dkd standardized x 4", "dot", "deepkd")


def best(screened, regime, arms):
    """Of these arms the one with the highest accuracy in the screening of seed 0."""
    return max((arm for arm in arms if (regime, arm) in screened), key=lambda arm: screened[regime, arm])


def test_the_confirmation_compares_what_the_plans_rules_choose_from_the_screening():
    screening, confirmation = cifar10_screening.get_study(), cifar10.get_study()
    kept = rows.read(screening.rows)
    screened = {(row["regime"], row["arm"]): row["student"]["last_accuracy"] for row in kept if row["seed"] == 0}
    names = list(screening.arms)
    apart, together = ([arm for arm in names if arm.startswith(f"{sign} ")] for sign in ("apart", "together"))
    assert {regime: arms[1:] for regime, (_, arms) in confirmation.regimes.items()} == {
        "10,000 images": tuple(best(screened, "10,000 images", arms) for arms in (apart, together, PEERS)),
        "30 % wrong labels": (best(screened, "30 % wrong labels", together), "log dkd 3"),
        "8 epochs": (best(screened, "8 epochs", apart),),
    }
    weights = ["dkd", *(f"dkd x {weight}" for weight in (2, 4, 8, 16))]
    of_base = {"dkd.alpha": 1.0, "dkd.beta": 2.0}
    for regime, (overrides, (baseline, *_)) in confirmation.regimes.items():
        assert baseline == "tuned dkd"
        tuned = of_base | screening.arms[best(screened, regime, weights)]
        assert of_base | overrides | confirmation.arms[baseline] == tuned | screening.regimes[regime][0]
    for _, arms in confirmation.regimes.values():
        for arm in arms[1:]:
            assert confirmation.arms[arm] == of_base | screening.arms[arm]


def test_what_explains_the_confirmation_changes_the_weight_alone_and_repeats_no_run(tmp_path):
    explained = cifar10_weights.get_study()
    runs = runs_of(explained, output=str(tmp_path), seeds=(100,), regimes=explained.regimes, arms=explained.arms)
    config = {run.arm: run.config for run in runs}
    kept = rows.read(explained.rows)
    there = {run.arm for run in runs if rows.find(kept, run)}
    assert there >= {"tuned dkd", "apart own_logits 1", "together self_normalized 3"}
    for arm in ("apart own_logits 1", "together self_normalized 3"):
        changed = config[f"{arm} with tuned weight"].copy_and_resolve_references()
        assert (changed.dkd.alpha, changed.dkd.beta) == (config["tuned dkd"].dkd.alpha, config["tuned dkd"].dkd.beta)
        changed.dkd.alpha, changed.dkd.beta = config["dkd"].dkd.alpha, config["dkd"].dkd.beta
        assert changed == config[arm]
    assert (config["dkd"].dkd.alpha, config["dkd"].dkd.beta) == (1.0, 2.0)


def test_what_compares_machines_repeats_the_tuned_dkd_of_the_seeds_that_ran_on_a_gpu(tmp_path):
    repeated = cifar10_machines.get_study()
    runs = runs_of(repeated, output=str(tmp_path), seeds=None, regimes=repeated.regimes, arms=repeated.arms)
    kept = rows.read(repeated.rows)
    on_gpu = [
        run.seed for run in runs if run.arm == "tuned dkd" and "H100" in rows.find(kept, run)["machine"]["device"]
    ]
    assert on_gpu == list(repeated.seeds)
    made_by = {(run.arm, run.seed): rows.made_by(run) for run in runs}
    for seed in on_gpu:
        assert made_by["tuned dkd on CPUs", seed] == made_by["tuned dkd", seed]


def test_what_trains_what_screens_and_what_confirms_are_different_images(monkeypatch):
    def numbered(folder, part, first, last):
        ids = [(part == "test") * 10**6 + 10**4 * label + n for label in range(10) for n in range(first, last)]
        return np.array(ids), np.array(ids) // 10**4 % 100

    monkeypatch.setattr(cifar10_images, "_split", numbered)
    (trained, _), (screened, _) = cifar10_images.screening()
    (again, _), (confirmed, labels) = cifar10_images.confirmation()
    np.testing.assert_array_equal(trained, again)
    assert (len(trained), len(screened), len(confirmed)) == (10_000, 10_000, 40_000)
    for one, other in itertools.combinations((trained, screened, confirmed), 2):
        assert not np.intersect1d(one, other).size
    assert np.bincount(labels).tolist() == [4000] * 10
    assert (confirmed[:10_000] >= 10**6).all()  # the test images come first


def test_few_classes_are_the_first_ones_with_as_many_images(monkeypatch):
    labels = np.tile(np.arange(10, dtype=np.uint8), 6000)
    images = np.broadcast_to(labels[:, None, None], (60_000, 28, 28))
    monkeypatch.setattr(fashion_images, "locate", lambda folder: {"train": ("train",), "test": ("test",)})
    monkeypatch.setattr(
        fashion_images,
        "read_split",
        lambda name: (images, labels) if name == "train" else (images[:10_000], labels[:10_000]),
    )
    for classes, of_test in ((3, 3000), (10, 10_000)):
        (train, train_labels), (test, test_labels) = fashion_images.of_classes(classes=classes)
        assert train.shape == (10_000, 28, 28, 1)
        assert len(test) == of_test
        assert set(train_labels) == set(test_labels) == set(range(classes))
        assert (train[:, 0, 0, 0] == train_labels).all()


def batch():
    rng = np.random.default_rng(0)
    return (*(2 * rng.standard_normal((2, 6, 5))).astype(np.float32), rng.integers(0, 5, 6))


def loss_of(method, z, v, y):
    terms = {name: jnp.mean(term) for name, term in method.terms(z, v, y).items()}
    return method.loss(terms | {"ce": jnp.zeros(())}, AFTER_THE_RAMP)


@pytest.mark.slow
def test_the_gradient_of_the_logarithm_of_dkd_is_dkds_over_dkd():
    z, v, y = batch()
    value, slope = jax.value_and_grad(loss_of, argnums=1)(DKD(alpha=1.0, beta=2.0, warmup_epochs=2.0), z, v, y)
    found = jax.grad(loss_of, argnums=1)(LogDKD(weight=3.0, kappa=1e-12), z, v, y)
    np.testing.assert_allclose(found, 3 * slope / value, rtol=1e-5)


def test_the_coupling_of_plain_kd_is_kd_less_epsilon_times_g():
    z, v, y = batch()
    at = {"temperature": 4.0}
    expected = 0.9 * losses.kd(z, v, **at).mean() - 0.5 * losses.gradient_coupling(
        z, v, y, convention="per_sample", **at
    )
    np.testing.assert_allclose(loss_of(CoupledKD(epsilon=0.5), z, v, y), expected, rtol=1e-6)


@pytest.mark.wrong_input
def test_where_the_photographs_are_missing_the_message_says_how_to_name_their_folder(tmp_path):
    with pytest.raises(BadInput, match=r"train: no such folder; put CIFAR-10's images .* variable CIFAR10_FOLDER"):
        cifar10_images.screening(str(tmp_path))
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(BadInput, match="expected 10 folders of at least 1000 images each"):
        cifar10_images.screening(str(tmp_path))
