"""The runs of a study, and which of them share a teacher."""

import re
from pathlib import Path

import pytest

from configs.study import fashion_mnist, mnist5k
from dgkd_jax.errors import BadInput
from dgkd_jax.study.plan import load, runs_of


@pytest.mark.slow
@pytest.mark.parametrize("module", [mnist5k, fashion_mnist])
def test_studies_are_valid_and_seeds_share_their_teachers(module, tmp_path):
    planned = module.get_study()
    runs = runs_of(planned, output=str(tmp_path), seeds=planned.seeds, regimes=planned.regimes, arms=planned.arms)
    assert len({run.workdir for run in runs}) == len(runs)
    teachers = {run.regime: set() for run in runs}
    for run in runs:
        teachers[run.regime].add(run.config.teacher.workdir)
    assert all(len(found) == 1 for found in teachers.values())
    assert teachers["standard"] == teachers["T = 1"] == teachers["momenta"] != teachers["noisy labels"]


def test_a_regime_with_seeds_of_its_own_runs_those_unless_the_command_names_some(tmp_path):
    planned = mnist5k.get_study()._replace(seeds=(0, 1), seeds_in={"T = 1": (1, 5)})
    of_all = {"output": str(tmp_path), "regimes": ("standard", "T = 1"), "arms": ("dkd",)}
    runs = runs_of(planned, seeds=None, **of_all)
    assert [(run.seed, run.regime) for run in runs] == [(0, "standard"), (1, "standard"), (1, "T = 1"), (5, "T = 1")]
    runs = runs_of(planned, seeds=(7,), **of_all)
    assert [(run.seed, run.regime) for run in runs] == [(7, "standard"), (7, "T = 1")]


def test_the_study_of_the_documentation_is_valid(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
    (example,) = re.findall(r"```python\n(# my_study.py\n.*?)```", text, re.DOTALL)
    (tmp_path / "my_study.py").write_text(example)
    study = load(str(tmp_path / "my_study.py"))
    runs = runs_of(study, output=str(tmp_path), seeds=None, regimes=study.regimes, arms=study.arms)
    assert len(runs) == 3 * 2 * 5
    double, once = (run.config.dkd for run in runs[1::-1])
    assert (double.alpha, double.beta) == (2 * once.alpha, 2 * once.beta)


@pytest.mark.wrong_input
def test_seeds_of_a_regime_that_there_is_not_are_refused(tmp_path):
    file = tmp_path / "wrong.py"
    file.write_text(
        "from configs.study import mnist5k\n"
        "def get_study(): return mnist5k.get_study()._replace(seeds_in={'T = 11': (1,)})\n"
    )
    with pytest.raises(BadInput, match="wrong.py: seeds_in names the regime 'T = 11', which there is not"):
        load(str(file))


def test_the_controls_of_the_momenta_take_the_steps_that_constant_gradients_would_give():
    """The rate times each weight over 1 − μ is that of the gradient's own momentum, and likewise for the decay."""
    planned = mnist5k.get_study()
    base = planned.base
    for name, momenta, of_decay in (
        ("dot", (0.825, 0.975, 0.975), 0.825),
        ("deepkd", (0.975, 0.825, 0.95), 0.975),
        ("deepkd_released", (0.825, 0.825, 0.95), 0.825),
    ):
        control = planned.arms[f"{name} as weights"]
        gain = control["optimizer.learning_rate"] / (1 - base.optimizer.momentum)
        rate = base.optimizer.learning_rate
        for key, momentum in zip(("ce_weight", "alpha", "beta"), momenta, strict=True):
            assert gain * control[f"dkd.{key}"] == pytest.approx(rate * base.dkd[key] / (1 - momentum), rel=1e-12)
        assert gain == pytest.approx(rate / (1 - of_decay), rel=1e-12)
        assert "optimizer.weight_decay" not in control
