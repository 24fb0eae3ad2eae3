"""Validates a config, and says which of its keys make two runs the same run."""

import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dgkd_jax import methods, own_code
from dgkd_jax.errors import BadInput, did_you_mean
from dgkd_jax.methods import METHODS, needs_teacher, sections_of
from dgkd_jax.runs.default import KEYS, NAMED_GRADIENTS, READ_BY_OPTIMIZERS, TEACHERS_OWN

# The sections that only some methods read. DGKD also reads DKD's.
_METHOD_SECTIONS = {section for method in METHODS.values() for section in sections_of(method)}


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, from a config or from its JSON."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)):
            flat |= {f"{key}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def validate(config: ConfigDict, *, method: methods.Method | None = None) -> None:
    """Check every key of a config, so that a mistake is found in a second and not after a day.

    Args:
        method: an object from Python that stands for `config.method`.

    Raises:
        BadInput: names the first key that is missing, unknown or has a forbidden value, with the allowed values and the
            most similar key.
    """
    flat = flatten(config)
    for key in flat:
        if key not in KEYS:
            raise BadInput(f"config.{key}: no such key{did_you_mean(key, KEYS)} All keys: --help")
    for key, (_, _, rule, *_) in KEYS.items():
        if key not in flat:
            raise BadInput(f"config.{key} is missing: start your file from dgkd_jax.runs.default.get_config()")
        value = flat[key]
        if key == "teacher.model" and value == "" and not _needs_teacher(config.method, method):
            continue
        if not rule.accepts(value):
            raise BadInput(f"config.{key}={value!r} is not allowed: {rule.allowed}{did_you_mean(value, rule.choices)}")
    for key in ("student.model", "teacher.model", "data.name"):
        if own_code.is_import_path(flat[key]):
            own_code.load(flat[key], key=key)
    if method is None and own_code.is_import_path(config.method):
        methods.own(config.method)
    if config.batch_norm_groups > 1 and own_code.is_own(config.student.model):
        raise BadInput(
            f"config.batch_norm_groups={config.batch_norm_groups} is for the networks of dgkd_jax.models.NAMES, and "
            f"config.student.model={config.student.model} is a network of its own"
        )
    for section in ("data", "teacher"):
        if len(config[section].mean) != len(config[section].std):
            raise BadInput(f"config.{section}.mean and config.{section}.std must have the same length")
    if not config.data.mock and config.batch_size % config.data.readers:
        raise BadInput(f"config.data.readers={config.data.readers} must divide batch_size={config.batch_size}")
    if config.data.mixup or config.data.cutmix:
        _check_mixing(config, _methods_of(config, method))
    if config.batch_size % config.batch_norm_groups:
        raise BadInput(
            f"config.batch_norm_groups={config.batch_norm_groups} must divide batch_size={config.batch_size}"
        )
    if "dgkd" in methods.names_of(config) and config.dgkd.wrt == "own_logits" and config.dgkd.distance != "mse":
        raise BadInput(
            f"config.dgkd.distance={config.dgkd.distance} compares two gradients coordinate by coordinate, and with "
            "config.dgkd.wrt=own_logits they have none in common; take config.dgkd.distance=mse"
        )
    if config.accumulate > 1:
        _check_accumulate(config, _methods_of(config, method))
    if config.optimizer.name in NAMED_GRADIENTS:
        _check_named_gradients(config, _methods_of(config, method))


def _needs_teacher(name: str, method: methods.Method | None) -> bool:
    if method is None and own_code.is_import_path(name):
        method = methods.own(name)
    return needs_teacher(name) if method is None else method.needs_teacher


def _methods_of(config: ConfigDict, method: methods.Method | None) -> dict[str, methods.Method]:
    """By name."""
    if method is not None:
        return {method.name: method}
    return {name: methods.from_config(with_method(config, name)) for name in methods.names_of(config)}


def _check_accumulate(config: ConfigDict, chosen_methods: dict[str, methods.Method]) -> None:
    chosen, groups = f"config.accumulate={config.accumulate}", config.batch_norm_groups
    if config.batch_size % (config.accumulate * groups):
        times = f" times batch_norm_groups={groups}" if groups > 1 else ""
        raise BadInput(f"{chosen}{times} must divide batch_size={config.batch_size}")
    for name, method in chosen_methods.items():
        if method.needs_whole_batch:
            way_out = (
                "; it does not with config.dgkd.wrt=logits or own_logits and config.dgkd.convention=per_sample, or "
                f"literal with config.dgkd.parity_batch={config.batch_size}"
            )
            raise BadInput(
                f"{chosen} computes the batch in parts, and the loss of method {name} needs the whole batch at once"
                + (way_out if name == "dgkd" else "")
            )


def _check_mixing(config: ConfigDict, chosen_methods: dict[str, methods.Method]) -> None:
    if config.batch_size == 1:
        raise BadInput("config.batch_size=1 leaves config.data.mixup and cutmix no second image to mix with")
    for name, method in chosen_methods.items():
        if method.needs_class_indices:
            raise BadInput(
                f"config.data.mixup and cutmix give every image two labels, and method {name} needs one"
                + (
                    ": only config.dgkd.distance=mse with config.dgkd.wrt=logits or own_logits takes two"
                    if name == "dgkd"
                    else ""
                )
            )


def _check_named_gradients(config: ConfigDict, chosen_methods: dict[str, methods.Method]) -> None:
    """Refuse an optimizer of named gradients where the method's terms are not those, or a key is not for it."""
    optimizer, chosen = config.optimizer, f"config.optimizer.name={config.optimizer.name}"
    needed = set(NAMED_GRADIENTS[optimizer.name]) - {"task", "kd"}  # "kd" is of all terms
    for name, method in chosen_methods.items():
        terms = method.term_units
        if not terms:
            raise BadInput(f"{chosen} needs a distillation loss, and method {name} has none; take sgd")
        if needed and set(terms) != needed:
            raise BadInput(
                f"{chosen} needs a method whose terms are {' and '.join(sorted(needed))}, such as dkd; "
                f"method {name} has {', '.join(terms)}"
            )
    if optimizer.nesterov or optimizer.clip_norm:
        raise BadInput(f"{chosen} goes with config.optimizer.nesterov=False and config.optimizer.clip_norm=0 only")
    middle, delta = optimizer.momentum, optimizer.momentum_delta
    if optimizer.name == "dot" and not (delta <= middle and middle + delta < 1):
        raise BadInput(
            f"config.optimizer.momentum_delta={delta}: momentum - momentum_delta and momentum + momentum_delta must be "
            f"in [0, 1), and momentum={middle}"
        )


def deciding(flat: Mapping[str, Any], *what: str) -> dict[str, Any]:
    """The keys that decide any of `what` (`Key.decides`), without those that the config's method does not read.

    Args:
        flat: dotted key -> value, perhaps from another version; an unknown key counts as deciding the run.
    """
    method = METHODS.get(flat.get("method"))
    unread = _METHOD_SECTIONS - set(sections_of(method)) if method else set()
    if own_code.is_own(flat.get("method")):
        unread = _METHOD_SECTIONS
    if not needs_teacher(flat.get("method")):
        unread = unread | {"teacher"}
    return {
        key: value
        for key, value in flat.items()
        if (KEYS[key].decides if key in KEYS else "run") in what and key.split(".")[0] not in unread
    }


_ADDED_KEYS = (
    "accumulate",
    "gradient_sums",
    *(f"data.{name}" for name in ("trivial_augment", "random_erasing", "mixup", "cutmix", "num_classes", "holdout")),
    *(f"{method}.standardize" for method in ("kd", "dkd")),
)


def identity(config: ConfigDict) -> dict[str, Any]:
    """The keys that decide what a run computes: two configs belong to the same run if and only if these are equal.

    The teacher's keys are left out: its weights are compared by a digest. With that digest the checkpoint records
    whether the logits come from a cache and in which format, so a run cannot change that; but a cache may be moved.
    """
    kept = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in deciding(flatten(config), "run").items()
    }
    if not config.data.mock:
        del kept["data.mock_train_examples"], kept["data.mock_eval_examples"]
    for key, optimizers in READ_BY_OPTIMIZERS.items():
        if config.optimizer.name not in optimizers:
            del kept[key]
    # Runs from before these keys existed go on where the keys are off.
    return {key: value for key, value in kept.items() if key not in _ADDED_KEYS or value != KEYS[key].default}


def identity_of_batches(config: ConfigDict) -> dict[str, Any]:
    """The keys that decide the training batches and the teacher's input, but not the teacher's weights."""
    taught = config.copy_and_resolve_references()
    with taught.unlocked():
        taught.method = "kd"  # any method that reads the section `teacher`
    alike = ("seed", "batch_size", "matmul_precision")
    return {
        key: value for key, value in identity(taught).items() if key in alike or key.startswith(("data.", "teacher."))
    }


def check_same_run(recorded: dict[str, Any], config: ConfigDict, *, workdir: Any) -> None:
    """Refuse to continue a run with another config.

    Args:
        recorded: `identity` of the config that the work directory was made with.

    Raises:
        BadInput: names each key that differs, with both values.
    """
    if changes := _changes(recorded, config):
        raise BadInput(
            f"{workdir} holds a run with another configuration ({changes}). "
            "Give another folder, --workdir=DIR, or remove this one."
        )


def check_same_teacher(recorded: dict[str, Any], config: ConfigDict, *, workdir: Any) -> None:
    """Refuse to use a teacher that was trained otherwise than this config says.

    Args:
        recorded: `identity` of the config that the teacher was trained with.
        config: of the student; the keys are named as it spells them.

    Raises:
        BadInput: names each key that differs, with both values, and the ways out.
    """
    if changes := _changes(recorded, of_teacher(config), spelled=_TEACHERS_KEYS):
        raise BadInput(
            f"{workdir} holds a teacher that was trained with other settings ({changes}). Train another beside it: "
            f"--config.teacher.workdir=DIR. Or, if it is finished, take it as it is: --config.teacher.workdir={workdir}"
        )


def _changes(recorded: dict[str, Any], config: ConfigDict, *, spelled: Mapping[str, str] | None = None) -> str:
    current = identity(config)
    off = {key: KEYS[key].default for key in _ADDED_KEYS if key in recorded or key in current}
    recorded, current = off | recorded, off | current
    return ", ".join(
        f"{(spelled or {}).get(key, key)}={recorded.get(key)!r} there, {current.get(key)!r} here"
        for key in sorted(recorded | current)
        if recorded.get(key) != current.get(key)
    )


def with_method(config: ConfigDict, method: str) -> ConfigDict:
    """A copy with this method, for running each method of `all`."""
    with (config := config.copy_and_resolve_references()).unlocked():
        config.method = method
    return config


# Key of the teacher's own training -> key of the student's config that sets it.
_TEACHERS_KEYS = {
    **{name: f"teacher.{name}" for name in TEACHERS_OWN},
    "seed": "teacher.seed",
    "epochs": "teacher.epochs",
    "optimizer.learning_rate": "teacher.learning_rate",
    "student.model": "teacher.model",
    "student.dtype": "teacher.dtype",
}


def fill_in_teacher(config: ConfigDict, of_file: ConfigDict) -> None:
    """Give the teacher's keys that are None the values of the configuration file, before the command line's changes."""
    there = flatten(of_file)
    with config.unlocked():
        config.update_from_flattened_dict(
            {f"teacher.{key}": there[key] for key in TEACHERS_OWN if flatten(config)[f"teacher.{key}"] is None}
        )


def in_teachers_keys(message: str) -> str:
    """A message about the teacher's own training in the keys of the student's config that set it."""
    named = "|".join(map(re.escape, sorted(_TEACHERS_KEYS, key=len, reverse=True)))
    return re.sub(rf"\bconfig\.({named})\b(?!\.)", lambda match: f"config.{_TEACHERS_KEYS[match[1]]}", message)


def of_teacher(config: ConfigDict) -> ConfigDict:
    """The config of the teacher's own training: cross-entropy with this run's data, and what `teacher` has otherwise.

    With an optimizer of named gradients the teacher, which has but one, is trained by `sgd`.
    """
    teacher = config.copy_and_resolve_references()
    with teacher.unlocked():
        teacher.method = "ce"
        given = flatten(config)
        own = {key: given.get(setting) for key, setting in _TEACHERS_KEYS.items()}
        teacher.update_from_flattened_dict({key: value for key, value in own.items() if value is not None})
        if teacher.optimizer.name in NAMED_GRADIENTS:
            teacher.optimizer.name = "sgd"
        teacher.data.mean = config.teacher.mean or config.data.mean
        teacher.data.std = config.teacher.std or config.data.std
    return teacher
