"""The runs of a study, and which of them share a teacher."""

import pytest

from configs.study import fashion_mnist, mnist5k
from dgkd_jax.study.plan import runs_of


@pytest.mark.parametrize("module", [mnist5k, fashion_mnist])
def test_studies_are_valid_and_seeds_share_their_teachers(module, tmp_path):
    planned = module.get_study()
    runs = runs_of(planned, output=str(tmp_path), seeds=planned.seeds, regimes=planned.regimes, arms=planned.arms)
    assert len({run.workdir for run in runs}) == len(runs)
    teachers = {run.regime: set() for run in runs}
    for run in runs:
        teachers[run.regime].add(run.config.teacher.workdir)
    assert all(len(found) == 1 for found in teachers.values())
    assert teachers["standard"] == teachers["T = 1"] != teachers["noisy labels"]
