"""All keys of a config except the methods' own: default, meaning, allowed values, and what each key decides.

The methods' keys are in their files in `methods/`; `get_config` has all keys. A misspelt key, a wrong type or a value
out of range is an error. Override any key on the command line: `--config.optimizer.learning_rate=0.1`.
"""

import re

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dgkd_jax import models, own_code
from dgkd_jax.data import catalogue
from dgkd_jax.data.open import AUGMENTATIONS, INTERPOLATIONS
from dgkd_jax.methods import METHODS, section_keys
from dgkd_jax.methods.key import (
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SWITCH,
    TEXT,
    Key,
    Rule,
    number,
    numbers,
    one_of,
    whole_number,
)

_NAME = Rule(lambda value: isinstance(value, str) and value and "/" not in value, "a name without '/'")


def _or_own(names: tuple[str, ...], allowed: str) -> Rule:
    return Rule(lambda value: value in names or own_code.is_own(value), f"{allowed}, or {own_code.ALLOWED}", names)


def _are_methods(value: object) -> bool:
    names = value.split(",") if isinstance(value, str) else []
    return value == "all" or own_code.is_own(value) or (set(names) <= set(METHODS) and len(names) == len({*names}) > 0)


_METHODS = Rule(
    _are_methods,
    f"'all', or one or several of {', '.join(map(repr, METHODS))} with commas between them, or {own_code.ALLOWED}",
    (*METHODS, "all"),
)
_MODEL = _or_own(models.NAMES, "a name of dgkd_jax.models.NAMES")
_DTYPE = one_of("auto", "float32", "bfloat16", "float64")
_SIDE = Rule(
    lambda value: isinstance(value, int) and (value == 0 or value >= 8), "0 or a whole number of pixels from 8 up"
)
_CHANNELS = numbers("() or one number per channel", lambda value: len(value) in (0, 1, 3))
_DEVIATIONS = numbers(
    "() or one number greater than 0 per channel", lambda v: len(v) in (0, 1, 3) and all(s > 0 for s in v)
)

# optimizer.name -> the gradients that it takes, with a momentum each; other optimizers take that of the whole loss.
NAMED_GRADIENTS = {
    "dot": ("task", "kd"),
    "deepkd": ("task", "tckd", "nckd"),
    "deepkd_released": ("task", "tckd", "nckd"),
}
# Key -> the only optimizers that read it.
READ_BY_OPTIMIZERS = {
    "optimizer.momentum_delta": ("dot",),
    "optimizer.momentum_task": ("deepkd",),
    "optimizer.momentum_tckd": ("deepkd", "deepkd_released"),
    "optimizer.momentum_nckd": ("deepkd", "deepkd_released"),
}
WRITERS = ("tensorboard", "wandb", "mlflow")
_WRITERS = Rule(
    lambda value: isinstance(value, tuple) and set(value) <= set(WRITERS) and len(set(value)) == len(value),
    f"names out of {WRITERS}, each once; () = none",
)
_OPTIONS = Rule(
    lambda value: isinstance(value, tuple) and all(isinstance(v, str) and re.match(r"\w+=\S", v) for v in value),
    "a tuple of texts NAME=VALUE, for example ('xla_tpu_scoped_vmem_limit_kib=65536',)",
)
_MOMENTUM = number(0, 1, open_high=True)

_RUN_KEYS = {
    "name": Key(
        "unnamed",
        "the run's work directory is runs/NAME/METHOD-seedSEED unless --workdir is given",
        _NAME,
        decides="nothing",
    ),
    "note": Key("", "a line that the run prints when it starts: where its recipe comes from", TEXT, decides="nothing"),
    "method": Key(
        "dgkd",
        f"{' | '.join(METHODS)}; several, as in kd,dkd, or all: each in turn, then one table; or an own one",
        _METHODS,
    ),
    "seed": Key(0, "student's initial weights, order of the data and augmentation", whole_number(0, 2**31 - 1)),
    # the student, the teacher and the data
    "student.model": Key("", "a name of dgkd_jax.models.NAMES, or an own network", _MODEL),
    "student.dtype": Key("auto", "compute dtype: float32 | bfloat16 | float64; auto = bfloat16 on TPU and GPU", _DTYPE),
    "teacher.model": Key("", "as student.model", _MODEL),
    "teacher.dtype": Key("auto", "as student.dtype", _DTYPE),
    "teacher.weights": Key(
        "",
        ".pth, .safetensors, .npz or hf:ORG/NAME; '' = train the teacher in teacher.workdir",
        TEXT,
        decides="teacher",
    ),
    "teacher.workdir": Key(
        "",
        "'' = runs/NAME/teacher; a teacher found here is reused; a folder that is given may hold any finished run",
        TEXT,
        decides="nothing",
    ),
    "teacher.cache": Key(
        "",
        "folder of its logits, from python -m dgkd_jax.cache_teacher; '' = the teacher is run",
        TEXT,
        decides="nothing",
    ),
    "teacher.mean": Key((), "mean of the pixels that the teacher's weights were trained on; () = data.mean", _CHANNELS),
    "teacher.std": Key(
        (), "standard deviation of those pixels; () = data.std; example: configs/photographs.py", _DEVIATIONS
    ),
    "teacher.epochs": Key(240, "length of the teacher's own training, by cross-entropy", COUNT, decides="teacher"),
    "teacher.learning_rate": Key(0.05, "peak rate of the teacher's own training", POSITIVE, decides="teacher"),
    "teacher.seed": Key(
        0,
        "seed of the teacher's own training, so that students of several seeds can share it",
        whole_number(0, 2**31 - 1),
        decides="teacher",
    ),
    "data.name": Key(
        "",
        "a name of dgkd_jax/data/catalogue.py, or own data: a function returning (train, evaluate), or a TFDS builder",
        _or_own(catalogue.NAMES, f"one of {', '.join(map(repr, catalogue.NAMES))}"),
    ),
    "data.num_classes": Key(0, "own data: number of classes; 0 = as the data set or its labels say", COUNT_OR_NONE),
    "data.holdout": Key(
        0.1,
        "share of the training images kept for evaluation where own data or an image folder has no split for it",
        number(0, 1, open_low=True, open_high=True),
    ),
    "data.dir": Key("", "TFDS data directory; '' = $TFDS_DATA_DIR or ~/tensorflow_datasets", TEXT, decides="nothing"),
    "data.manual_dir": Key(
        "", "files that cannot be downloaded: ImageNet's tars, an image folder, IDX files", TEXT, decides="nothing"
    ),
    "data.download": Key(True, "may TFDS download a set that is missing", SWITCH, decides="nothing"),
    "data.image_size": Key(0, "side of the images that the models see, pixels; 0 = the data set's own", _SIDE),
    "data.augment": Key(
        "none",
        "none | pad_crop | pad_crop_flip | random_resized_crop | random_resized_crop_fast",
        one_of(*AUGMENTATIONS),
    ),
    "data.trivial_augment": Key(
        False, "TrivialAugment on the device: one random operation of random strength on each image", SWITCH
    ),
    "data.random_erasing": Key(
        0.0, "probability that a rectangle of an image is painted over with the mean pixel; 0 = never", number(0, 1)
    ),
    "data.mixup": Key(0.0, "α of mixup: λ ~ Beta(α, α) of each image, the rest of another; 0 = off", NOT_NEGATIVE),
    "data.cutmix": Key(
        0.0,
        "α of CutMix: a box of 1-λ of the image is another's; 0 = off; with mixup a coin for each batch",
        NOT_NEGATIVE,
    ),
    "data.eval_resize": Key(
        0, "shorter side before the centre crop at evaluation, pixels; 0 = no resizing", COUNT_OR_NONE
    ),
    "data.eval_interpolation": Key(
        "bilinear", "of eval_resize, antialiased as PIL's: bilinear | bicubic", one_of(*INTERPOLATIONS)
    ),
    "data.mean": Key((), "mean per channel, in units of pixel/255; () = the data set's own", _CHANNELS),
    "data.std": Key((), "standard deviation per channel, in the same units; () = its own", _DEVIATIONS),
    "data.shuffle_buffer": Key(0, "records in each reader's shuffle buffer; 0 = all of its piece", COUNT_OR_NONE),
    "data.readers": Key(1, "pieces that a split is read in; with P processes each reads readers/P of them", COUNT),
    "data.train_examples": Key(
        0, "use only this many training images, from the first; 0 = all; generated images: mock_*", COUNT_OR_NONE
    ),
    "data.label_noise": Key(
        0.0,
        "share of the training labels replaced by another class, the same in every epoch",
        number(0, 1, open_high=True),
    ),
    "data.max_bad_images": Key(
        0,
        "undecodable training images to tolerate; each is replaced by a neighbour in its batch",
        COUNT_OR_NONE,
        decides="nothing",
    ),
    "data.on_device_mib": Key(
        2048,
        "a decoded training set up to this size, in MiB, is kept on each device; 0 = never",
        COUNT_OR_NONE,
        decides="nothing",
    ),
    "data.mock": Key(
        False, "generated images of the right shapes (and random teacher weights where none are there)", SWITCH
    ),
    "data.mock_train_examples": Key(1024, "generated images in an epoch", COUNT),
    "data.mock_eval_examples": Key(256, "generated images in an evaluation", COUNT),
    # training length and optimizer (defaults: CIFAR-100 recipe of RepDistiller and mdistiller)
    "epochs": Key(240, "passes over the training split", COUNT),
    "batch_size": Key(64, "global, over all devices", COUNT),
    "accumulate": Key(
        1,
        "parts of the batch that a step computes one after the other, for memory; BatchNorm sees one at a time",
        COUNT,
    ),
    "eval_batch_size": Key(
        256, "global, rounded up to a multiple of the devices; does not change any result", COUNT, decides="nothing"
    ),
    "optimizer.name": Key(
        "sgd",
        "sgd (PyTorch's update rule) | adamw | dot (DOT: two momenta) | deepkd (three) | deepkd_released (its code)",
        one_of("sgd", "adamw", *NAMED_GRADIENTS),
    ),
    "optimizer.learning_rate": Key(0.05, "peak rate", POSITIVE),
    "optimizer.momentum": Key(0.9, "sgd; dot: the middle of its two", _MOMENTUM),
    "optimizer.momentum_delta": Key(
        0.075, "dot: momentum less this for the task, plus this for the distillation", _MOMENTUM, source="mdistiller"
    ),
    "optimizer.momentum_task": Key(0.975, "deepkd: of the cross-entropy's gradient", _MOMENTUM, source="DeepKD"),
    "optimizer.momentum_tckd": Key(0.825, "deepkd: of TCKD's gradient", _MOMENTUM, source="DeepKD"),
    "optimizer.momentum_nckd": Key(0.95, "deepkd: of NCKD's gradient", _MOMENTUM, source="DeepKD"),
    "optimizer.nesterov": Key(False, "sgd only", SWITCH),
    "optimizer.weight_decay": Key(
        5e-4,
        "sgd: added to the gradient (L2), dot and deepkd: the task's, deepkd_released: TCKD's; adamw: decoupled",
        NOT_NEGATIVE,
    ),
    "optimizer.decay_on": Key(
        "all", "all parameters, as PyTorch does | kernels: not biases and BatchNorm", one_of("all", "kernels")
    ),
    "optimizer.clip_norm": Key(0.0, "largest global norm of the gradient; 0 = no clipping", NOT_NEGATIVE),
    "optimizer.ema_decay": Key(
        0.0,
        "decay per step of an average of the variables, which is evaluated instead; 0 = none",
        number(0, 1, open_high=True),
    ),
    "schedule.name": Key("step", "step | cosine | constant", one_of("step", "cosine", "constant")),
    "schedule.milestones": Key(
        (150, 180, 210),
        "step: epochs after which the rate is multiplied by factor",
        numbers(
            "epochs greater than 0 in ascending order",
            lambda value: all(v > 0 for v in value) and list(value) == sorted(set(value)),
        ),
    ),
    "schedule.factor": Key(0.1, "step: of the rate at each milestone", number(0, 1, open_low=True)),
    "schedule.warmup_epochs": Key(0.0, "linear ramp of the learning rate from 0", NOT_NEGATIVE),
    "batch_norm_groups": Key(
        1, "1 = statistics of the global batch; N = of N equal groups of it, as on N PyTorch GPUs", COUNT
    ),
    "label_smoothing": Key(0.0, "in the cross-entropy of every method", number(0, 1, open_high=True)),
}

_MACHINE_KEYS = {
    # machine, logs and checkpoints: none of these changes a result
    "mesh.fsdp": Key(
        1,
        "devices over which large parameters are sharded; the rest of the devices is data-parallel",
        COUNT,
        decides="nothing",
    ),
    "matmul_precision": Key(
        "default",
        "default | high | highest: highest = full float32 products on TPU and GPU",
        one_of("default", "high", "highest"),
    ),
    "gradient_sums": Key(
        "auto",
        "dtype in which kernels' gradients are summed over pixels and devices: float32 | compute (student.dtype: half "
        "the bytes between devices) | auto = float32 on TPU, else compute",
        one_of("auto", "float32", "compute"),
    ),
    "join_timeout_s": Key(300, "seconds that processes wait for each other at the start", COUNT, decides="nothing"),
    "heartbeat_timeout_s": Key(
        100,
        "seconds of silence after which a process counts as lost, and the others end",
        COUNT,
        decides="nothing",
    ),
    "compilation_cache": Key(
        "~/.cache/dgkd_jax", "compiled programs, kept between runs; '' = none", TEXT, decides="nothing"
    ),
    "compiler_options": Key(
        (),
        "options of XLA for the training step, texts NAME=VALUE; they come on top of those of the kind of device",
        _OPTIONS,
        decides="nothing",
    ),
    "log_every": Key(50, "steps between fetches of the metrics", COUNT, decides="nothing"),
    "writers": Key(
        ("tensorboard",),
        "who gets the metrics besides metrics.jsonl: of tensorboard, wandb and mlflow (docs/trackers.md)",
        _WRITERS,
        decides="nothing",
    ),
    "eval_every": Key(
        1.0, "epochs between evaluations; the last step is always evaluated", POSITIVE, decides="nothing"
    ),
    "diagnose": Key(
        True,
        "evaluate calibration, neural collapse, distance to the teacher; keeps the split's features",
        SWITCH,
        decides="nothing",
    ),
    "checkpoint_every": Key(
        0,
        "steps between checkpoints, in addition to one at each evaluation; 0 = no others",
        COUNT_OR_NONE,
        decides="nothing",
    ),
    "keep_checkpoints": Key(2, "newest checkpoints to keep, in addition to the best", COUNT, decides="nothing"),
    "best_metric": Key(
        "accuracy", "the best evaluation has the highest accuracy | the lowest ce", one_of("accuracy", "ce")
    ),
    "nonfinite_limit": Key(
        10, "the run ends after this many steps in a row with a non-finite loss or gradient (skipped)", COUNT
    ),
    "steps_per_call": Key(
        1,
        "steps per call for a set on the device; above 1 only if dispatching is slow, not on CPUs",
        COUNT,
        decides="nothing",
    ),
    "watchdog_s": Key(
        1800.0,
        "seconds without a finished step after which the process ends itself; 0 = never",
        NOT_NEGATIVE,
        decides="nothing",
    ),
}

# What the teacher's own training can have otherwise than the student's: each is also a key of the section teacher.
TEACHERS_OWN = (
    "batch_size",
    "batch_norm_groups",
    "label_smoothing",
    *(f"data.{name}" for name in ("augment", "trivial_augment", "random_erasing", "mixup", "cutmix")),
    *(name for name in _RUN_KEYS if name.startswith(("optimizer.", "schedule.")) and name != "optimizer.learning_rate"),
)


def _of_teacher(name: str) -> Key:
    key = _RUN_KEYS[name]
    return Key(
        None,
        f"{name} of the teacher's own training; None = as the configuration file has {name}",
        Rule(lambda value: value is None or key.rule.accepts(value), f"None, or {key.rule.allowed}", key.rule.choices),
        decides="teacher",
    )


_TEACHER_KEYS = {f"teacher.{name}": _of_teacher(name) for name in TEACHERS_OWN}

KEYS: dict[str, Key] = _RUN_KEYS | _TEACHER_KEYS | section_keys() | _MACHINE_KEYS


def get_config() -> ConfigDict:
    """A config with every key at its default."""
    config = ConfigDict()
    for name, key in KEYS.items():
        *sections, last = name.split(".")
        place = config
        for section in sections:
            if section not in place:
                place[section] = ConfigDict()
            place = place[section]
        place[last] = key.default if key.default is not None else placeholder(_type(name))
    return config


def _type(name: str) -> type:
    """Of a key of the teacher that is None unless it is given."""
    return type(_RUN_KEYS[name.removeprefix("teacher.")].default)
