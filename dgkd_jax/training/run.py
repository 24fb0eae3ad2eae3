"""The whole run: trains or loads the teacher, distils a student by each method, and writes the results."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dgkd_jax import own_code
from dgkd_jax.data import quiet
from dgkd_jax.data.open import missing, open_source
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import Method, names_of
from dgkd_jax.models.host_network import HostNetwork
from dgkd_jax.models.network import Network
from dgkd_jax.runs import config as config_rules
from dgkd_jax.runs import sharding
from dgkd_jax.runs import workdir as workdir_lib
from dgkd_jax.training import checks, loop, result
from dgkd_jax.training.cached_logits import source as cached_logits
from dgkd_jax.training.cached_logits.fill import fill
from dgkd_jax.training.cached_logits.teacher import CachedTeacher
from dgkd_jax.training.given import NOTHING, Given
from dgkd_jax.training.teacher import Taught, check_weights, from_object, missing_weights, teach, try_teacher


def run(
    config: ConfigDict, workdir: str | None = None, *, stop: Callable[[], bool] = lambda: False
) -> list[dict[str, Any]]:
    """The contents of each method's `result.json`; arguments, order and errors as for `train_students`."""
    return [finished.result for finished in train_students(config, workdir, stop=stop)]


class Finished(NamedTuple):
    """A finished run: the content of its result.json, and the student."""

    result: dict[str, Any]
    student: Network


@quiet.meanwhile()
def train_students(
    config: ConfigDict,
    workdir: str | None = None,
    *,
    given: Given = NOTHING,
    stop: Callable[[], bool] = lambda: False,
) -> list[Finished]:
    """Distil by `config.method` (of several by each in turn), reusing the results of earlier runs.

    Args:
        config: validated.
        workdir: the run's folder; of several methods the parent of one folder each. None: runs/NAME/METHOD-seedSEED.
        given: objects in place of the config's names.
        stop: as for `loop.fit`.

    Returns:
        One for each method, in the order of the methods.

    Raises:
        BadInput: the data set, the teacher's weights or the work directory cannot be used.
        NumericFailure, StorageFailure, Preempted: as for `loop.fit`.
    """
    all_methods = {name: given.method_of(config_rules.with_method(config, name)) for name in names_of(config)}
    targets = {name: _target(config, name, workdir) for name in all_methods}
    methods = {name: method for name, method in all_methods.items() if method.needs_teacher}
    trains_teacher = methods and not config.teacher.weights and given.teacher is None
    for folder in (*targets.values(), *([_teachers_folder(config)] if trains_teacher else [])):
        workdir_lib.check_writable(folder)
    source, mesh = open_data(config, needs_teacher=bool(methods), given=given)
    checks.check(config, targets, source, mesh, given=given)
    taught = _teach(config, source, mesh, stop, given) if methods else None
    outside = taught is not None and isinstance(taught.network, HostNetwork)
    reads_cache = taught is not None and config.teacher.cache and not outside
    cache = _open_cache(config, methods, source, taught) if reads_cache else None
    if taught and any(loop.latest_step(targets[name]) is None for name in methods):
        try_teacher(config, taught, source, mesh)
    if outside:
        config = _cache_here(config, workdir, taught.network, source, mesh, stop)
        cache = _open_cache(config, methods, source, taught)
    return [
        _distil(
            config_rules.with_method(config, name),
            target,
            method=all_methods[name],
            given=given,
            source=source,
            mesh=mesh,
            taught=taught,
            cache=cache,
            which=f"{number} of {len(targets)}" if len(targets) > 1 else "",
            stop=stop,
        )
        for number, (name, target) in enumerate(targets.items(), start=1)
    ]


def root_of(config: ConfigDict) -> epath.Path:
    """The default folder for the runs of a config."""
    return epath.Path("runs") / (config.name + ("-mock" if config.data.mock else ""))


def prepare(config: ConfigDict, *, stop: Callable[[], bool]) -> tuple[Source, Mesh, Taught]:
    """The data set, the devices, and the teacher, which is trained here if necessary.

    Raises:
        As for `run`.
    """
    source, mesh = open_data(config, needs_teacher=True)
    return source, mesh, _teach(config, source, mesh, stop, NOTHING)


def open_data(config: ConfigDict, *, needs_teacher: bool, given: Given = NOTHING) -> tuple[Source, Mesh]:
    """The data set and the devices, once all that only the user can provide is found to be there.

    Raises:
        BadInput: the data set, the teacher's weights or its cache is missing or cannot be used.
    """
    _check_present(config, needs_teacher=needs_teacher and given.teacher is None)
    try:
        mesh = sharding.make_mesh(fsdp=config.mesh.fsdp)
    except ValueError as error:
        raise BadInput(f"config.{error}") from error
    return given.source or open_source(config.data), mesh


def _teach(config: ConfigDict, source: Source, mesh: Mesh, stop: Callable[[], bool], given: Given) -> Taught:
    if given.teacher is not None:
        return from_object(config, given.teacher, source, mesh)
    return teach(config, root_of(config), source, mesh, stop)


def _teachers_folder(config: ConfigDict) -> epath.Path:
    """Where the teacher would be trained."""
    return epath.Path(config.teacher.workdir or root_of(config) / "teacher")


def _cache_here(
    config: ConfigDict,
    workdir: str | None,
    teacher: HostNetwork,
    source: Source,
    mesh: Mesh,
    stop: Callable[[], bool],
) -> ConfigDict:
    """Store the logits of a teacher that cannot be run in training; returns the config that reads them."""
    folder = epath.Path(config.teacher.cache or epath.Path(workdir or root_of(config)) / "teacher-logits")
    about = cached_logits.about(config, teacher=teacher.fingerprint, source=source, dtype="float32")
    size = 4 * config.epochs * about.steps_per_epoch * about.batch_size * about.num_classes
    if not folder.exists():
        checks.check_space(folder, size, what="the teacher's logits need")
        print(
            f"the teacher's logits of {config.epochs} epochs are stored in {folder}: {size / 1e6:,.1f} MB",
            file=sys.stderr,
        )
    fill(folder, about, config, epochs=config.epochs, teacher=teacher, source=source, mesh=mesh, stop=stop)
    with (config := config.copy_and_resolve_references()).unlocked():
        config.teacher.cache = str(folder)
    return config


def _target(config: ConfigDict, method: str, workdir: str | None) -> epath.Path:
    folder = f"{own_code.plain_name(method)}-seed{config.seed}"
    if workdir is None:
        return root_of(config) / folder
    return epath.Path(workdir) / (folder if len(names_of(config)) > 1 else "")


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


def _open_cache(
    config: ConfigDict, methods: Mapping[str, Method], source: Source, taught: Taught
) -> cached_logits.Cache:
    """Open the teacher's cached logits and check that they fit every method, before the first one starts."""
    folder = epath.Path(config.teacher.cache)
    cache = cached_logits.Cache(folder, config, teacher=taught.network.fingerprint, source=source)
    for method in methods.values():
        cache.check_method(method)
    if jax.process_index() == 0:
        print(f"teacher's logits in training: {cache.about.description}, {folder}", file=sys.stderr)
    return cache


def _distil(
    config: ConfigDict,
    workdir: epath.Path,
    *,
    method: Method,
    given: Given,
    source: Source,
    mesh: Mesh,
    taught: Taught | None,
    cache: cached_logits.Cache | None,
    which: str,
    stop: Callable[[], bool],
) -> Finished:
    """Train and evaluate one student by one method, and write `workdir/result.json`."""
    teacher, batches = None, source
    if method.needs_teacher:
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
        given=given,
        beside=taught and taught.network,
        which=which,
        stop=stop,
    )
    found = result.describe(config, workdir, trained, source=source, taught=taught)
    if jax.process_index() == 0:
        (workdir / "result.json").write_text(json.dumps(found, indent=2) + "\n")
    return Finished(found, trained.network)
