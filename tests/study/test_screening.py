"""The study of photographs: its teachers, its own objectives, and what it says where the images are missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.study import cifar10_images, cifar10_screening
from configs.study.objectives import CoupledKD, LogDKD
from dgkd_jax import losses
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import DKD, Progress
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
