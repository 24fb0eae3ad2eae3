"""Defines a study: regimes × arms × seeds on one data set, and the runs that this gives."""

import importlib.util
import json
import os
import sys
import zlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dgkd_jax.errors import BadInput
from dgkd_jax.methods import needs_teacher
from dgkd_jax.runs import config as config_rules

OUTPUT = "runs/study"


class Study(NamedTuple):
    """A study, as a file in configs/study defines it in `get_study()`.

    Attributes:
        name: its folder is OUTPUT/NAME.
        about: a sentence or two for readers of the results: data, teacher, student.
        base: the config that all overrides apply to.
        seeds: of the students, in every regime that `seeds_in` does not name.
        arms: name -> overrides by dotted key: the methods to compare.
        regimes: name -> (overrides, names of the arms that run in it).
        baseline: the arm that all others are compared with, by seed, within each regime.
        teachers: how many; student seed s is taught by that of seed base.teacher.seed + s % teachers.
        rows: a file that keeps a line for each finished run ("" = none); such a run is never repeated, even if its work
            directory is lost.
        seeds_in: regime -> its seeds.
        decides: whether its comparisons are tested. A screening or a sweep is not: its results have intervals and no
            verdicts, and other studies' tests are not corrected for it.
    """

    name: str
    about: str
    base: ConfigDict
    seeds: tuple[int, ...]
    arms: dict[str, dict[str, Any]]
    regimes: dict[str, tuple[dict[str, Any], tuple[str, ...]]]
    baseline: str
    teachers: int = 1
    rows: str = ""
    seeds_in: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    decides: bool = True


class Run(NamedTuple):
    """One student of a study; its work directory is STUDY/REGIME/ARM-seedSEED."""

    regime: str
    arm: str
    seed: int
    config: ConfigDict
    workdir: str


def load(path: str) -> Study:
    """The study that a file defines.

    Raises:
        BadInput: no such file, or it does not define a study with consistent names.
    """
    if not os.path.isfile(path):
        raise BadInput(f"--config={path}: no such file")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # studies import their configs
    spec = importlib.util.spec_from_file_location("study_config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file's own code may raise anything
        raise BadInput(f"--config={path}: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_study"):
        raise BadInput(f"--config={path}: no study, it defines no get_study(); see configs/study/mnist5k.py")
    study = module.get_study()
    for regime in study.seeds_in.keys() - study.regimes.keys():
        raise BadInput(f"--config={path}: seeds_in names the regime {regime!r}, which there is not")
    for regime, (_, arms) in study.regimes.items():
        for arm in {*arms, study.baseline} - set(study.arms):
            raise BadInput(f"--config={path}: regime {regime!r} names the arm {arm!r}, which there is not")
    return study


def runs_of(
    study: Study, *, output: str, seeds: Iterable[int] | None, regimes: Iterable[str], arms: Iterable[str]
) -> list[Run]:
    """The runs of a study, seed by seed: a study that is stopped early has compared everything on fewer seeds.

    Args:
        seeds: in all regimes; None: in each its own.

    Raises:
        BadInput: an override with an unknown key or a wrong type.
    """
    runs = []
    planned = {regime: study.seeds_in.get(regime, study.seeds) for regime in regimes}
    for seed in sorted(set().union(*planned.values())) if seeds is None else seeds:
        for regime in regimes:
            if seeds is None and seed not in planned[regime]:
                continue
            overrides, arms_there = study.regimes[regime]
            for arm in arms_there:
                if arm in arms:
                    runs.append(_run(study, output, regime, arm, seed, overrides | study.arms[arm]))
    return runs


def _run(study: Study, output: str, regime: str, arm: str, seed: int, overrides: dict[str, Any]) -> Run:
    config = study.base.copy_and_resolve_references()
    try:
        # An arm's optimizer or batch size is the student's; the teacher keeps the base's.
        config_rules.fill_in_teacher(config, study.base)
        config.update_from_flattened_dict(overrides | {"seed": seed, "name": study.name})
        config.teacher.seed += seed % study.teachers
        config_rules.validate(config)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"study {study.name}, regime {regime!r}, arm {arm!r}: {error}") from error
    folder = os.path.join(output, study.name)
    with config.unlocked():
        # Regimes with other data or another training have their own teacher.
        identity = json.dumps(config_rules.identity(config_rules.of_teacher(config)), sort_keys=True)
        config.teacher.workdir = os.path.join(folder, f"teacher-{zlib.crc32(identity.encode()):08x}")
    return Run(regime, arm, seed, config, os.path.join(folder, regime, f"{arm}-seed{seed}"))


def with_cache(run: Run) -> Run:
    """The run with the folder of its cache; runs with the same teacher, seed, images and epochs share one."""
    if not needs_teacher(run.config.method):
        return run
    config = run.config.copy_and_resolve_references()
    shared = [config_rules.identity_of_batches(config), config.teacher.weights, config.epochs]
    name = zlib.crc32(json.dumps(shared, sort_keys=True).encode())
    config.teacher.cache = f"{config.teacher.workdir}-logits-{name:08x}"
    return run._replace(config=config)
