"""Distillation from Python: any network, images, teacher and objective; the whole of a run stands behind it."""

import contextlib
import dataclasses
import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dgkd_jax import methods, models, own_code
from dgkd_jax.data import own_data
from dgkd_jax.data.source import Source
from dgkd_jax.errors import BadInput, did_you_mean
from dgkd_jax.methods.objective import Objective, objective
from dgkd_jax.models import foreign
from dgkd_jax.models.architecture import Architecture
from dgkd_jax.models.host_network import HostNetwork
from dgkd_jax.models.network import Network
from dgkd_jax.runs import command_line, config, default
from dgkd_jax.runs.interruption import Interruption
from dgkd_jax.runs.student import read_config
from dgkd_jax.training.given import FlaxTeacher, Given
from dgkd_jax.training.run import train_students

_RECIPE_EPOCHS = 240  # that the defaults of keys in epochs are for
_UNKNOWN = "unknown#00000000"  # the name of an object until it is tried on the data
_PROBED = 16  # images by whose logits a teacher outside JAX is recognised


class Distilled(NamedTuple):
    """A distilled student.

    Attributes:
        variables: numpy arrays in the form in which the student was given: Linen's collections, an NNX state for
            `nnx.update`, or the parameters of a function; for a name what `models.create(…).apply` takes.
        accuracy: on the evaluation split after the last epoch, in [0, 1].
        workdir: with checkpoints, metrics and evaluations; `python -m dgkd_jax.report WORKDIR` shows them.
        record: the content of its result.json.
        network: uint8 images `[batch, height, width, channels]` -> logits `[batch, classes]`, as evaluated.
    """

    variables: Any
    accuracy: float
    workdir: str
    record: dict[str, Any]
    network: Network


def distill(
    student: Any,
    teacher: Any = None,
    *,
    train: Any,
    evaluate: Any = None,
    method: Any = "dgkd",
    epochs: int,
    workdir: str | None = None,
    **configuration: Any,
) -> Distilled:
    """Train a student, with or without a teacher, and evaluate it. Given again after an interruption, it goes on.

        result = distill(student, teacher, train=(images, labels), evaluate=(images, labels), method="dkd", epochs=20,
                         workdir="runs/mine", batch_size=128, dkd={"beta": 2.0}, optimizer={"learning_rate": 0.1})

    Args:
        student: a name of `models.NAMES`, or a user's own network: a Flax Linen module, (module, variables), a Flax NNX
            module, or (function of parameters and images, parameters). Own networks get float32 images `[batch, height,
            width, channels]`, normalised by `data.mean` and `data.std`, by default those of the training images.
        teacher: as the student, with variables; a folder of a finished run; or any function of uint8 images `[batch,
            height, width, channels]` that returns logits `[batch, classes]`, of any framework. Such a function is asked
            for the logits of every batch first, and then no more. A name of `models.NAMES` is trained first, or read
            from PyTorch's weights with `**{"teacher.weights": FILE}`. None: no teacher, for the method ce.
        train: (images, labels); anything with a length and items (image, label); or a `tf.data.Dataset`. Images are
            uint8, labels whole numbers from 0 on.
        evaluate: likewise; None: `data.holdout` of `train` is kept for it.
        method: a name of `methods.METHODS`, an object of that shape, or a function (student_logits, teacher_logits,
            labels) -> `[batch]` whose mean is minimised, and nothing else.
        epochs: passes over the training images. Lengths in epochs that are not given (milestones, warm-ups) keep their
            share of the recipe's 240.
        workdir: for checkpoints and results; None: a new temporary folder. A finished run there is not repeated.
        configuration: any key of a configuration: `batch_size=128`, `optimizer={"learning_rate": 0.1}` or
            `**{"optimizer.learning_rate": 0.1}`. All keys: `python -m dgkd_jax.main --help`.

    Raises:
        BadInput: something cannot be used; the message says what to do. Nothing has been trained then.
        NumericFailure, StorageFailure: as in `errors`.
        Preempted: stopped by SIGINT or SIGTERM, after saving.
    """
    folder = str(workdir) if workdir is not None else tempfile.mkdtemp(prefix="dgkd_jax-")
    settings = _settings(configuration, epochs=epochs, method=method, folder=folder)
    if isinstance(method, str):
        settings.method = method
    chosen = _method(method, settings)
    if not _check(settings, student, teacher, chosen, configuration):
        teacher = None
    with _as_configured(settings):
        source = own_data.open_given(train, evaluate, settings.data)
        given = Given(
            student=_own_student(student, source),
            teacher=_teacher(teacher, source, settings, epath.Path(folder)),
            method=_complete(chosen, source),
            source=source,
        )
        _name(settings, given, data=source.name)
        with _interruption() as stop:
            (finished,) = train_students(settings, folder, given=given, stop=stop)
        variables = jax.tree.map(np.asarray, finished.student.variables)
        if given.student is not None:
            variables = given.student.unpacked(variables)
        return Distilled(
            variables=variables,
            accuracy=finished.result["student"]["last_accuracy"],
            workdir=folder,
            record=finished.result,
            network=finished.student,
        )


def _settings(configuration: Mapping[str, Any], *, epochs: int, method: Any, folder: str) -> ConfigDict:
    """The defaults with the user's keys."""
    if not isinstance(epochs, int):
        raise BadInput(f"epochs={epochs!r} is not allowed: {default.KEYS['epochs'].rule.allowed}")
    settings = default.get_config()
    settings.epochs = epochs
    settings.name = epath.Path(folder).name or "distilled"
    settings.teacher.workdir = f"{folder}/teacher"
    # A notebook or a user's own program must not be ended because it was stopped in a debugger.
    settings.watchdog_s = 0.0
    settings.writers = ()  # TensorBoard's would need TensorFlow; metrics.jsonl has everything
    share = max(epochs, 1) / _RECIPE_EPOCHS
    settings.teacher.epochs = max(epochs, 1)  # where it is 0, the message is about the student's
    settings.schedule.milestones = tuple(share * epoch for epoch in settings.schedule.milestones)
    for key, about in default.KEYS.items():
        if key.endswith(".warmup_epochs") and about.default is not None:
            section, name = key.split(".")
            settings[section][name] *= share
    for key, value in _flat(configuration).items():
        if key not in default.KEYS:
            alike = [known for known in default.KEYS if known.rpartition(".")[2] == key]
            raise BadInput(f"{key}: no such key{_alternatives(alike, method) or did_you_mean(key, default.KEYS)}")
        section, _, name = key.rpartition(".")
        place = settings[section] if section else settings
        try:
            place[name] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError) as error:
            raise BadInput(f"{key}={value!r} is not allowed: {default.KEYS[key].rule.allowed}") from error
    return settings


def _flat(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value; a section may be a dictionary."""
    flat: dict[str, Any] = {}
    for key, value in configuration.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _alternatives(keys: list[str], method: Any) -> str:
    sections = methods.sections_of(methods.METHODS[method]) if method in methods.METHODS else ()
    best = [key for key in keys if key.split(".")[0] in sections] or keys
    return "; did you mean " + " or ".join(f'**{{"{key}": …}}' for key in best[:3]) + "?" if best else ""


def _own_student(student: Any, source: Source) -> Architecture | None:
    """A user's own network; None: it is a name."""
    return None if isinstance(student, str) else _checked(foreign.architecture(student), source, role="student")


def _checked(found: Architecture, source: Source, *, role: str) -> Architecture:
    return foreign.check(
        found,
        role=role,
        data=source.name,
        num_classes=source.num_classes,
        image_shape=source.image_shape,
    )


def _teacher(
    teacher: Any, source: Source, settings: ConfigDict, folder: epath.Path
) -> FlaxTeacher | HostNetwork | None:
    if teacher is None or isinstance(teacher, str):
        return None
    if foreign.is_network(teacher):
        architecture = _checked(foreign.architecture(teacher, role="teacher"), source, role="teacher")
        if architecture.begins_from is None:
            raise BadInput("the teacher is a Linen module, which holds no variables: give (module, variables)")
        return FlaxTeacher(architecture, architecture.initialise(source.image_shape, 0))
    if any(kind.__module__.startswith("torch.nn") for kind in type(teacher).__mro__):
        raise BadInput(
            "the teacher is a PyTorch module, which takes no uint8 images [batch, height, width, channels]: give a "
            "function that prepares them, such as lambda images: module(prepare(torch.from_numpy(images)))"
        )
    if not callable(teacher):
        raise BadInput(f"the teacher is of type {type(teacher).__name__}; it must be {foreign.WANTED}, or any function")
    unnamed = HostNetwork(teacher, getattr(teacher, "__name__", type(teacher).__name__), source.num_classes)
    return dataclasses.replace(unnamed, fingerprint=_fingerprint(unnamed, source, folder / "teacher_probe.npy"))


def _fingerprint(host: HostNetwork, source: Source, recorded: epath.Path) -> str:
    """From the logits of a few images. The first run's are kept, since other machines round otherwise."""
    batch = next(iter(source.eval_batches(batch_size=min(_PROBED, source.num_eval))))
    logits = host.on_host(batch["image"])
    if recorded.exists():
        with recorded.open("rb") as file:
            before = np.load(file)
        if before.shape == logits.shape and np.allclose(before, logits, rtol=1e-3, atol=1e-3 * np.abs(before).max()):
            logits = before
    else:
        recorded.parent.mkdir(parents=True, exist_ok=True)
        with recorded.open("wb") as file:
            np.save(file, logits)
    return hashlib.sha256(logits.tobytes()).hexdigest()[:16]


def _method(method: Any, settings: ConfigDict) -> Any:
    """A `methods.Method` that is an object, as far as it is known before the data; None: it is a name."""
    if isinstance(method, str):
        if len(methods.names_of(settings)) > 1:
            raise BadInput(f"method={method!r} is for the command; call distill once for each method")
        return None
    if hasattr(method, "terms") and hasattr(method, "loss"):
        found = methods.checked(method, called="method")
        # Its values are in its text, as of every dataclass.
        settings.method = own_code.name_of_given(found.name, repr(found))
        return found
    if not callable(method):
        raise BadInput(f"method is of type {type(method).__name__}; give a name, a function or a method")
    settings.method = _UNKNOWN
    return Objective(name=_UNKNOWN, function=method)


def _complete(method: Any, source: Source) -> Any:
    """A user's function is tried once the number of classes is known, and gets its name."""
    if isinstance(method, Objective) and method.name == _UNKNOWN:
        return objective(method.function, num_classes=source.num_classes)
    return method


def _check(settings: ConfigDict, student: Any, teacher: Any, method: Any, configuration: Mapping[str, Any]) -> bool:
    """Check all that can be checked before the data are looked at; returns whether the method has a teacher.

    Objects get a name in the settings that is completed later.
    """
    settings.data.name = settings.teacher.model = _UNKNOWN
    settings.student.model = student if isinstance(student, str) else _UNKNOWN
    if isinstance(teacher, str):
        _name_teacher(settings, teacher)
    config.validate(settings, method=method)
    command_line.check_read(_flat(configuration), settings)
    needs_teacher = (method or methods.from_config(settings)).needs_teacher
    if needs_teacher and teacher is None:
        raise BadInput(f"method {settings.method} needs a teacher: distill(student, teacher, …)")
    if not needs_teacher:
        settings.teacher.model = ""
    return needs_teacher


def _name(settings: ConfigDict, given: Given, *, data: str) -> None:
    """Put names into the config for what was given: by them a run is recognised."""
    settings.data.name = data
    if isinstance(given.method, Objective):
        settings.method = given.method.name
    if given.student is not None:
        settings.student.model = given.student.name
    match given.teacher:
        case FlaxTeacher(architecture, _):
            settings.teacher.model = architecture.name
        case HostNetwork(name=name, fingerprint=fingerprint):
            settings.teacher.model = own_code.name_of_given(name, fingerprint)


def _name_teacher(settings: ConfigDict, teacher: str) -> None:
    """A teacher that is a name or a folder."""
    if teacher in models.NAMES:
        settings.teacher.model = teacher
    elif (epath.Path(teacher) / "config.json").exists():
        settings.teacher.workdir = teacher
        settings.teacher.model = read_config(epath.Path(teacher)).student.model
    else:
        raise BadInput(
            f"teacher={teacher!r} is neither the folder of a finished run nor a name of models.NAMES"
            f"{did_you_mean(teacher, models.NAMES)}"
        )


@contextlib.contextmanager
def _as_configured(settings: ConfigDict) -> Iterator[None]:
    """The process's settings that a command makes for good, while the block runs."""
    with contextlib.ExitStack() as stack:
        if "float64" in (settings.student.dtype, settings.teacher.dtype):
            stack.enter_context(jax.enable_x64(True))
        if settings.matmul_precision != "default":
            stack.enter_context(jax.default_matmul_precision(settings.matmul_precision))
        yield


@contextlib.contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Signals stop the run after it has saved; only the main thread can receive them."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    with Interruption() as interruption:
        yield interruption.agreed
