"""What each key of a configuration may be, and which keys make two runs the same run.

The keys, their meaning and their defaults are in `configs/default.py`; here are the rules that every configuration is
held to before anything starts, so that a mistake costs a second and not a day.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dgkd_jax import losses, models
from dgkd_jax.data import datasets
from dgkd_jax.errors import BadInput
from dgkd_jax.steps import METHODS


class Rule(NamedTuple):
    """`allowed` tells the user what `accepts` takes."""

    accepts: Callable[[Any], bool]
    allowed: str
    choices: tuple[str, ...] = ()


def _one_of(*choices: str) -> Rule:
    return Rule(lambda value: value in choices, "one of " + ", ".join(repr(c) for c in choices), choices)


def _number(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Rule:
    left, right = "(" if open_low else "[", ")" if open_high or high == math.inf else "]"

    def accepts(value) -> bool:
        if isinstance(value, bool) or not math.isfinite(value):
            return False
        return (value > low if open_low else value >= low) and (value < high if open_high else value <= high)

    return Rule(accepts, f"a number in {left}{low:g}, {high:g}{right}")


def _numbers(allowed: str, accepts: Callable[[tuple], bool]) -> Rule:
    def is_tuple_of_numbers(value) -> bool:
        return isinstance(value, tuple) and all(isinstance(v, (int, float)) and math.isfinite(v) for v in value)

    return Rule(lambda value: is_tuple_of_numbers(value) and accepts(value), allowed)


_POSITIVE = _number(0, open_low=True)
_NOT_NEGATIVE = _number(0)
_COUNT = _number(1)
_FINITE = _number(-math.inf)
_TEXT = Rule(lambda value: isinstance(value, str), "text")
_NAME = Rule(lambda value: isinstance(value, str) and value and "/" not in value, "a name without '/'")
_SWITCH = Rule(lambda value: isinstance(value, bool), "True or False")
_MODEL = _one_of(*models.NAMES)
_DTYPE = _one_of("auto", "float32", "bfloat16", "float64")
_CHANNELS = _numbers("() or one number per channel", lambda value: len(value) in (0, 1, 3))
_DEVIATIONS = _numbers(
    "() or one number greater than 0 per channel", lambda v: len(v) in (0, 1, 3) and all(s > 0 for s in v)
)

RULES: dict[str, Rule] = {
    "name": _NAME,
    "method": _one_of(*METHODS, "all"),
    "seed": _number(0, 2**31 - 1),
    "student.model": _MODEL,
    "student.dtype": _DTYPE,
    "teacher.model": _MODEL,
    "teacher.dtype": _DTYPE,
    "teacher.weights": _TEXT,
    "teacher.workdir": _TEXT,
    "teacher.cache": _TEXT,
    "teacher.mean": _CHANNELS,
    "teacher.std": _DEVIATIONS,
    "teacher.epochs": _COUNT,
    "teacher.learning_rate": _POSITIVE,
    "teacher.seed": _number(0, 2**31 - 1),
    "data.name": _one_of(*datasets.NAMES),
    "data.dir": _TEXT,
    "data.manual_dir": _TEXT,
    "data.download": _SWITCH,
    "data.image_size": _NOT_NEGATIVE,
    "data.augment": _one_of("none", "pad_crop", "pad_crop_flip", "random_resized_crop", "random_resized_crop_fast"),
    "data.eval_resize": _NOT_NEGATIVE,
    "data.eval_interpolation": _one_of("bilinear", "bicubic"),
    "data.mean": _CHANNELS,
    "data.std": _DEVIATIONS,
    "data.shuffle_buffer": _NOT_NEGATIVE,
    "data.readers": _COUNT,
    "data.train_examples": _NOT_NEGATIVE,
    "data.label_noise": _number(0, 1, open_high=True),
    "data.max_bad_images": _NOT_NEGATIVE,
    "data.on_device_mib": _NOT_NEGATIVE,
    "data.mock": _SWITCH,
    "data.mock_train_examples": _COUNT,
    "data.mock_eval_examples": _COUNT,
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "eval_batch_size": _COUNT,
    "optimizer.name": _one_of("sgd", "adamw"),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.momentum": _number(0, 1, open_high=True),
    "optimizer.nesterov": _SWITCH,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.decay_on": _one_of("all", "kernels"),
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "optimizer.ema_decay": _number(0, 1, open_high=True),
    "schedule.name": _one_of("step", "cosine", "constant"),
    "schedule.milestones": _numbers(
        "epochs greater than 0 in ascending order",
        lambda value: all(v > 0 for v in value) and list(value) == sorted(set(value)),
    ),
    "schedule.factor": _number(0, 1, open_low=True),
    "schedule.warmup_epochs": _NOT_NEGATIVE,
    "batch_norm_groups": _COUNT,
    "label_smoothing": _number(0, 1, open_high=True),
    "kd.ce_weight": _NOT_NEGATIVE,
    "kd.weight": _NOT_NEGATIVE,
    "kd.temperature": _POSITIVE,
    "logit_mse.ce_weight": _NOT_NEGATIVE,
    "logit_mse.weight": _NOT_NEGATIVE,
    "dkd.ce_weight": _NOT_NEGATIVE,
    "dkd.alpha": _NOT_NEGATIVE,
    "dkd.beta": _NOT_NEGATIVE,
    "dkd.temperature": _POSITIVE,
    "dkd.warmup_epochs": _NOT_NEGATIVE,
    "dkd.warmup_form": _one_of("step", "epoch_from_0", "epoch_from_1"),
    "dgkd.epsilon": _FINITE,
    "dgkd.epsilon_end": _FINITE,
    "dgkd.epsilon_schedule": _one_of("constant", "linear", "cosine"),
    "dgkd.convention": _one_of(*losses.CONVENTIONS),
    "dgkd.distance": _one_of(*losses.DISTANCES),
    "dgkd.wrt": _one_of("logits", "params"),
    "dgkd.parity_batch": _NOT_NEGATIVE,
    "dgkd.kappa": _POSITIVE,
    "mesh.fsdp": _COUNT,
    "matmul_precision": _one_of("default", "high", "highest"),
    "join_timeout_s": _COUNT,
    "heartbeat_timeout_s": _COUNT,
    "compilation_cache": _TEXT,
    "log_every": _COUNT,
    "eval_every": _POSITIVE,
    "diagnose": _SWITCH,
    "checkpoint_every": _NOT_NEGATIVE,
    "keep_checkpoints": _COUNT,
    "best_metric": _one_of("accuracy", "ce"),
    "nonfinite_limit": _COUNT,
    "steps_per_call": _COUNT,
    "watchdog_s": _NOT_NEGATIVE,
}

# The sections that each method reads.
_SECTIONS = {"ce": (), "kd": ("kd",), "logit_mse": ("logit_mse",), "dkd": ("dkd",), "dgkd": ("dkd", "dgkd")}
_METHOD_SECTIONS = {"kd", "logit_mse", "dkd", "dgkd"}

# Keys that may change between an interruption and the continuation: none of them changes the parameters. The teacher
# is compared by a digest of its weights instead of by how it came to be; beside that digest stands whether its logits
# come from a cache, and in what format, so that a run does not change over, but a cache may move (`job`).
_NEUTRAL = {
    "name", "eval_batch_size", "join_timeout_s", "heartbeat_timeout_s", "compilation_cache",
    "log_every", "eval_every", "diagnose", "checkpoint_every", "keep_checkpoints", "watchdog_s",
    "mesh.fsdp", "data.dir", "data.manual_dir", "data.download", "data.max_bad_images",
    "data.on_device_mib", "steps_per_call",
    "teacher.weights", "teacher.workdir", "teacher.cache", "teacher.epochs", "teacher.learning_rate", "teacher.seed",
}  # fmt: skip


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value, tuples as tuples."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{key}.{inner}": v for inner, v in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the closest of `names`, or nothing."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def validate(config: ConfigDict) -> None:
    """Hold a configuration to the rules.

    Raises:
        BadInput: naming the first key that is missing, unknown or has a value that is not allowed, what is allowed, and
            the nearest spelling.
    """
    flat = flatten(config)
    for key in flat:
        if key not in RULES:
            raise BadInput(f"config.{key}: no such key{nearest(key, RULES)} All keys are in configs/default.py")
    for key, rule in RULES.items():
        if key not in flat:
            raise BadInput(f"config.{key} is missing: start your file from configs/default.py's get_config()")
        value = flat[key]
        if key == "teacher.model" and config.method == "ce" and value == "":
            continue
        if not rule.accepts(value):
            raise BadInput(f"config.{key}={value!r} is not allowed: {rule.allowed}{nearest(value, rule.choices)}")
    for section in ("data", "teacher"):
        if len(config[section].mean) != len(config[section].std):
            raise BadInput(f"config.{section}.mean and config.{section}.std must have the same length")
    if not config.data.mock and config.batch_size % config.data.readers:
        raise BadInput(f"config.data.readers={config.data.readers} must divide batch_size={config.batch_size}")
    if config.batch_size % config.batch_norm_groups:
        raise BadInput(
            f"config.batch_norm_groups={config.batch_norm_groups} must divide batch_size={config.batch_size}"
        )


def identity(config: ConfigDict) -> dict[str, Any]:
    """The keys that decide what a run computes: two runs are the same run if and only if these are equal."""
    unread = _METHOD_SECTIONS - set(_SECTIONS[config.method])
    if config.method == "ce":
        unread = unread | {"teacher"}
    kept = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in flatten(config).items()
        if key not in _NEUTRAL and key.split(".")[0] not in unread
    }
    if not config.data.mock:
        del kept["data.mock_train_examples"], kept["data.mock_eval_examples"]
    return kept


def of_batches(config: ConfigDict) -> dict[str, Any]:
    """The keys that decide the training batches and how the teacher sees them; not its weights."""
    taught = config.copy_and_resolve_references()
    with taught.unlocked():
        taught.method = "kd"  # any that reads the section `teacher`
    alike = ("seed", "batch_size", "matmul_precision")
    return {
        key: value for key, value in identity(taught).items() if key in alike or key.startswith(("data.", "teacher."))
    }


def check_same_run(recorded: dict[str, Any], config: ConfigDict, *, workdir: Any) -> None:
    """Refuse to continue a run with another configuration.

    Args:
        recorded: `identity` of the configuration that the work directory was made with.

    Raises:
        BadInput: naming each key that differs, with both values.
    """
    current = identity(config)
    differing = [key for key in sorted(recorded | current) if recorded.get(key) != current.get(key)]
    if differing:
        changes = ", ".join(f"{key}={recorded.get(key)!r} there, {current.get(key)!r} here" for key in differing)
        raise BadInput(
            f"{workdir} holds a run with another configuration ({changes}). "
            "Give another folder (--workdir, or --config.teacher.workdir for a teacher), or remove this one."
        )


def of_teacher(config: ConfigDict) -> ConfigDict:
    """The configuration of the teacher's own training: cross-entropy with this run's data and optimizer."""
    teacher = config.copy_and_resolve_references()
    with teacher.unlocked():
        teacher.method = "ce"
        teacher.seed = config.teacher.seed
        teacher.epochs = config.teacher.epochs
        teacher.optimizer.learning_rate = config.teacher.learning_rate
        teacher.student.model = config.teacher.model
        teacher.student.dtype = config.teacher.dtype
        teacher.data.mean = config.teacher.mean or config.data.mean
        teacher.data.std = config.teacher.std or config.data.std
    return teacher
