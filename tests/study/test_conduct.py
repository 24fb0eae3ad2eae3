"""In which order the runs of a study are done, and by whom."""

import itertools
import multiprocessing
import os
import signal
import time

import pytest

from configs.study import mnist5k
from dgkd_jax.study.conduct import _own_cores, _phases, _wait_for_workers
from dgkd_jax.study.plan import runs_of, with_cache


@pytest.mark.parametrize(
    ("cores", "workers", "expected"),
    [
        ({0, 1}, 2, [{0}, {1}]),
        ({2, 3, 5, 8, 9}, 2, [{2, 5, 9}, {3, 8}]),
        ({4}, 1, [{4}]),
        ({0, 1}, 3, [set(), set(), set()]),  # more workers than cores: the system shares them out
    ],
)
def test_workers_share_the_cores_out(monkeypatch, cores, workers, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores, raising=False)
    assert _own_cores(workers) == expected


@pytest.mark.slow
def test_each_teacher_and_each_cache_is_made_by_one_run_before_others_need_it(tmp_path):
    planned = mnist5k.get_study()
    everything = {"regimes": planned.regimes, "arms": planned.arms}
    runs = runs_of(planned, output=str(tmp_path), seeds=(0, 1, 2), **everything)
    plain = [[run.workdir for run in phase] for phase, _ in _phases(runs)]
    cached = [([run.workdir for run in phase], made) for phase, made in _phases(list(map(with_cache, runs)))]
    # Without caches: one run for each teacher, then all others.
    by_workdir = {run.workdir: with_cache(run).config for run in runs}
    teachers = {config.teacher.workdir for config in by_workdir.values()}
    assert len(plain[0]) == len(teachers) > 1
    assert plain[1] == []
    for phases in (plain, [phase for phase, _ in cached]):
        assert sorted(itertools.chain(*phases)) == sorted(by_workdir)
    # With them: besides, one for each teacher, seed, images and number of epochs.
    makers = [by_workdir[workdir].teacher.cache for phase, made in cached if made for workdir in phase]
    assert cached[0][0] == plain[0]
    assert len(makers) == len(set(makers))
    assert set(makers) == {config.teacher.cache for config in by_workdir.values() if config.method != "ce"}
    assert not cached[2][1]
    for config in by_workdir.values():
        others = [each for each in by_workdir.values() if each.teacher.cache == config.teacher.cache != ""]
        assert {(each.seed, each.epochs, each.teacher.workdir) for each in others} <= {
            (config.seed, config.epochs, config.teacher.workdir)
        }
    assert {config.teacher.cache for config in by_workdir.values() if config.method == "ce"} == {""}


def test_an_interrupted_study_waits_for_its_workers():
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0.5,))
    worker.start()
    _wait_for_workers()
    assert worker.exitcode == 0


def test_a_second_ctrl_c_kills_the_workers_that_are_waited_for(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    worker.start()
    monkeypatch.setattr(worker, "join", interrupted)
    _wait_for_workers()
    type(worker).join(worker)
    assert worker.exitcode == -signal.SIGKILL
