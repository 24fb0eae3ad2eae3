"""The whole run: trains or loads the teacher, distils a student by each method, and writes the results."""

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax.data import quiet
from dgkd_jax.data.open import missing, open_source
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import METHODS, from_config
from dgkd_jax.runs import config as config_rules
from dgkd_jax.runs import sharding
from dgkd_jax.runs import workdir as workdir_lib
from dgkd_jax.training import checks, loop, result
from dgkd_jax.training.cached_logits import source as cached_logits
from dgkd_jax.training.cached_logits.teacher import CachedTeacher
from dgkd_jax.training.teacher import Taught, check_weights, missing_weights, teach, try_teacher


@quiet.meanwhile()
def run(
    config: ConfigDict, workdir: str | None = None, *, stop: Callable[[], bool] = lambda: False
) -> list[dict[str, Any]]:
    """Distil by `config.method` (`all`: by each method in turn), reusing the results of earlier runs.

    Args:
        config: validated.
        workdir: the run's folder; for `all` the parent of one folder per method. None: runs/NAME/METHOD-seedSEED.
        stop: as for `loop.fit`.

    Returns:
        The content of each method's `result.json`, in the order of the methods.

    Raises:
        BadInput: the data set, the teacher's weights or the work directory cannot be used.
        NumericFailure, StorageFailure, Preempted: as for `loop.fit`.
    """
    names = tuple(METHODS) if config.method == "all" else (config.method,)
    targets = {name: _target(config, name, workdir) for name in names}
    for folder in (*targets.values(), *_teachers_folder(config, names)):
        workdir_lib.check_writable(folder)
    source, mesh = open_data(config, names)
    checks.check(config, targets, source, mesh)
    taught = _teach(config, names, source, mesh, stop)
    cache = _open_cache(config, names, source, taught) if taught and config.teacher.cache else None
    if taught and any(loop.latest_step(targets[name]) is None for name in _taught_methods(names)):
        try_teacher(config, taught, source, mesh)
    return [
        _distil(
            config_rules.with_method(config, name),
            target,
            source=source,
            mesh=mesh,
            taught=taught,
            cache=cache,
            which=f"{number} of {len(names)}" if len(names) > 1 else "",
            stop=stop,
        )
        for number, (name, target) in enumerate(targets.items(), start=1)
    ]


def root_of(config: ConfigDict) -> epath.Path:
    """The default folder for the runs of a config."""
    return epath.Path("runs") / (config.name + ("-mock" if config.data.mock else ""))


def prepare(
    config: ConfigDict, names: Iterable[str], *, stop: Callable[[], bool]
) -> tuple[Source, Mesh, Taught | None]:
    """The data set, the devices, and the teacher if a method needs one; the teacher is trained here if necessary.

    Raises:
        As for `run`.
    """
    source, mesh = open_data(config, names)
    return source, mesh, _teach(config, names, source, mesh, stop)


def open_data(config: ConfigDict, names: Iterable[str]) -> tuple[Source, Mesh]:
    """The data set and the devices, once all that only the user can provide is found to be there.

    Raises:
        BadInput: the data set, the teacher's weights or its cache is missing or cannot be used.
    """
    _check_present(config, needs_teacher=bool(_taught_methods(names)))
    try:
        mesh = sharding.make_mesh(fsdp=config.mesh.fsdp)
    except ValueError as error:
        raise BadInput(f"config.{error}") from error
    return open_source(config.data), mesh


def _teach(
    config: ConfigDict, names: Iterable[str], source: Source, mesh: Mesh, stop: Callable[[], bool]
) -> Taught | None:
    return teach(config, root_of(config), source, mesh, stop) if _taught_methods(names) else None


def _taught_methods(names: Iterable[str]) -> list[str]:
    return [name for name in names if METHODS[name].needs_teacher]


def _teachers_folder(config: ConfigDict, names: Iterable[str]) -> list[epath.Path]:
    """Where the teacher would be trained."""
    trained = _taught_methods(names) and not config.teacher.weights
    return [epath.Path(config.teacher.workdir or root_of(config) / "teacher")] if trained else []


def _target(config: ConfigDict, method: str, workdir: str | None) -> epath.Path:
    folder = f"{method}-seed{config.seed}"
    if workdir is None:
        return root_of(config) / folder
    return epath.Path(workdir) / (folder if config.method == "all" else "")


def _check_present(config: ConfigDict, *, needs_teacher: bool) -> None:
    """Report everything that only the user can provide in one message, before anything slow starts."""
    absent = []
    if needs_teacher:
        check_weights(config.teacher)
    if not config.data.mock:
        absent.append(missing(config.data))
        if needs_teacher:
            absent.append(missing_weights(config.teacher))
    if needs_teacher and config.teacher.cache:
        absent.append(cached_logits.missing(epath.Path(config.teacher.cache)))
    absent = [message for message in absent if message]
    if absent:
        raise BadInput("\n".join(absent))


def _open_cache(config: ConfigDict, names: Iterable[str], source: Source, taught: Taught) -> cached_logits.Cache:
    """Open the teacher's cached logits and check that they fit every method, before the first one starts."""
    folder = epath.Path(config.teacher.cache)
    cache = cached_logits.Cache(folder, config, teacher=taught.network.fingerprint, source=source)
    for name in names:
        cache.check_method(from_config(config_rules.with_method(config, name)))
    if jax.process_index() == 0:
        print(f"teacher's logits in training: {cache.about.description}, {folder}", file=sys.stderr)
    return cache


def _distil(
    config: ConfigDict,
    workdir: epath.Path,
    *,
    source: Source,
    mesh: Mesh,
    taught: Taught | None,
    cache: cached_logits.Cache | None,
    which: str,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Train and evaluate one student by one method, and write `workdir/result.json`."""
    teacher, batches = None, source
    if METHODS[config.method].needs_teacher:
        teacher = taught.network
        if cache:
            teacher = CachedTeacher(taught.network, cache.about.description)
            batches = cached_logits.WithTeacher(source, cache)
    trained = loop.fit(
        config,
        workdir=workdir,
        source=batches,
        mesh=mesh,
        teacher=teacher,
        leave_examples=True,
        beside=taught and taught.network,
        which=which,
        stop=stop,
    )
    found = result.describe(config, workdir, trained, source=source, taught=taught)
    if jax.process_index() == 0:
        (workdir / "result.json").write_text(json.dumps(found, indent=2) + "\n")
    return found
