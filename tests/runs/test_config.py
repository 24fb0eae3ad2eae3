"""Every key is documented, held to a rule and read; mistakes are named."""

import ast
import importlib
import inspect
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import cifar100, default, mnist5k
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import METHODS, needs_teacher, section_keys, sections_of
from dgkd_jax.runs import command_line
from dgkd_jax.runs import config as rules
from dgkd_jax.runs.default import KEYS, NAMED_GRADIENTS, TEACHERS_OWN

ROOT = Path(__file__).parents[2]
CONFIGS = [p.stem for p in sorted((ROOT / "configs").glob("*.py")) if p.stem not in ("__init__", "default", "pairs")]


def test_a_configuration_has_every_key_and_no_other():
    assert set(rules.flatten(default.get_config())) == set(KEYS)


def test_every_key_has_a_meaning():
    assert [key for key, value in KEYS.items() if not value.meaning.strip()] == []


def attribute_chains(tree: ast.AST) -> set[str]:
    chains = set()
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            chains.add(".".join([node.id, *reversed(parts)]))
    return chains


def test_every_key_is_read_somewhere():
    """As `config.section.key`, or `section.key` where a section is passed on under its own name; a method's own as
    `self.key` in its file; the teacher's by a table.
    """
    chains = set()
    for path in (ROOT / "dgkd_jax").rglob("*.py"):
        chains |= attribute_chains(ast.parse(path.read_text()))
    own = section_keys()
    read = {
        key
        for key in KEYS
        if chains & {key, f"config.{key}", f"self.config.{key}", f"self._config.{key}", f"settings.{key}"}
        or key in rules._TEACHERS_KEYS.values()
    }
    assert set(KEYS) - set(own) - read == set()
    for name, method in METHODS.items():
        chains = attribute_chains(ast.parse(Path(inspect.getfile(method)).read_text()))
        assert {key for key in own if key.startswith(f"{name}.") and f"self.{key.split('.')[1]}" not in chains} == set()


@pytest.mark.parametrize("name", CONFIGS)
def test_each_configuration_is_valid(name):
    rules.validate(importlib.import_module(f"configs.{name}").get_config())


def resolved(**changes) -> ConfigDict:
    config = mnist5k.get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "dkg", "config.method='dkg' is not allowed: 'all', or one or several of 'ce'.*did you mean 'dkd'"),
        ("method", "kd,dkg", "config.method='kd,dkg' is not allowed: 'all', or one or several of 'ce', 'kd'"),
        ("method", "kd,kd", "config.method='kd,kd' is not allowed"),
        ("method", "kd,", "config.method='kd,' is not allowed"),
        ("method", "kd,all", "config.method='kd,all' is not allowed"),
        ("student.model", "resnet19", r"config.student.model='resnet19' is not allowed.*did you mean 'resnet1"),
        ("teacher.model", "", "config.teacher.model='' is not allowed"),
        ("data.name", "cifar", "config.data.name='cifar' is not allowed.*did you mean 'cifar10"),
        ("epochs", 0, r"config.epochs=0 is not allowed: a whole number in \[1, inf\)"),
        ("dkd.temperature", 0.0, r"config.dkd.temperature=0.0 is not allowed: a number in \(0, inf\)"),
        ("dkd.temperature", float("nan"), "config.dkd.temperature=nan is not allowed"),
        ("optimizer.learning_rate", -0.1, "config.optimizer.learning_rate=-0.1 is not allowed"),
        ("optimizer.momentum", 1.0, r"config.optimizer.momentum=1.0 is not allowed: a number in \[0, 1\)"),
        ("label_smoothing", 1.0, "config.label_smoothing=1.0 is not allowed"),
        ("schedule.milestones", (60, 30), "config.schedule.milestones=.* ascending order"),
        ("dgkd.convention", "normalised", "config.dgkd.convention='normalised'.*did you mean 'normalized'"),
        ("dgkd.epsilon", float("inf"), "config.dgkd.epsilon=inf is not allowed"),
        ("data.std", (0.0,), "config.data.std=.* greater than 0"),
        ("name", "a/b", "config.name='a/b' is not allowed"),
        ("data.readers", 3, "config.data.readers=3 must divide batch_size=128"),
        ("batch_norm_groups", 3, "config.batch_norm_groups=3 must divide batch_size=128"),
        ("data.mean", (0.5,), "config.data.mean and config.data.std must have the same length"),
        ("data.eval_interpolation", "cubic", "config.data.eval_interpolation='cubic'.*did you mean 'bicubic'"),
        ("teacher.mean", (0.5,), "config.teacher.mean and config.teacher.std must have the same length"),
        ("teacher.std", (0.0,), "config.teacher.std=.* greater than 0"),
        ("optimizer.name", "deep_kd", "config.optimizer.name='deep_kd' is not allowed.*did you mean 'deepkd'"),
        (
            "writers",
            ("tensorbord",),
            "config.writers=.'tensorbord',. is not allowed: names out of .'tensorboard', 'wandb'",
        ),
        ("writers", ("wandb", "wandb"), "config.writers=.* each once"),
        ("optimizer.momentum_nckd", 1.0, r"config.optimizer.momentum_nckd=1.0 is not allowed: a number in \[0, 1\)"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(key, value, message):
    with pytest.raises(BadInput, match=message):
        rules.validate(resolved(**{key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "ce", "optimizer.name": "dot"}, "optimizer.name=dot needs a distillation loss, and method ce has"),
        ({"method": "kd,ce", "optimizer.name": "dot"}, "needs a distillation loss, and method ce has"),
        ({"method": "all", "optimizer.name": "dot"}, "optimizer.name=dot needs a distillation loss, and method ce has"),
        ({"method": "kd", "optimizer.name": "deepkd"}, "terms are nckd and tckd, such as dkd; method kd has kd"),
        (
            {"method": "dgkd", "optimizer.name": "deepkd_released"},
            "deepkd_released needs a method whose terms are nckd and tckd, such as dkd; method dgkd has .*, coupling",
        ),
        (
            {"method": "kd", "optimizer.name": "dot", "optimizer.clip_norm": 1.0},
            "optimizer.name=dot goes with config.optimizer.nesterov=False and config.optimizer.clip_norm=0 only",
        ),
        (
            {"method": "kd", "optimizer.name": "dot", "optimizer.momentum": 0.95},
            r"momentum_delta=0.075: .* must be in \[0, 1\), and momentum=0.95",
        ),
        ({"method": "kd", "optimizer.name": "dot", "optimizer.momentum": 0.05}, "momentum_delta=0.075: .*=0.05"),
    ],
)
def test_an_optimizer_of_named_gradients_is_refused_where_it_does_not_fit(changes, message):
    with pytest.raises(BadInput, match=message):
        rules.validate(resolved(**changes))


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 0}, r"config.accumulate=0 is not allowed: a whole number in \[1, inf\)"),
        ({"accumulate": 3}, "config.accumulate=3 must divide batch_size=128"),
        (
            {"accumulate": 64, "batch_norm_groups": 4},
            "config.accumulate=64 times batch_norm_groups=4 must divide batch_size=128",
        ),
        ({"accumulate": 2, "method": "dist"}, "the loss of method dist needs the whole batch at once$"),
        ({"accumulate": 2, "method": "all"}, "the loss of method dist needs the whole batch at once$"),
        (
            {"accumulate": 2, "dgkd.convention": "literal"},
            "method dgkd needs the whole batch at once; it does not with .* literal with config.dgkd.parity_batch=128",
        ),
        ({"accumulate": 2, "dgkd.convention": "normalized"}, "the loss of method dgkd needs the whole batch at once"),
        ({"accumulate": 2, "dgkd.wrt": "params"}, "the loss of method dgkd needs the whole batch at once"),
    ],
)
def test_parts_of_a_batch_are_refused_where_they_are_uneven_or_the_loss_needs_all_of_it(changes, message):
    with pytest.raises(BadInput, match=message):
        rules.validate(resolved(**changes))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_teacher])
def test_dot_goes_with_every_method_that_has_a_teacher(method):
    rules.validate(resolved(**{"method": method, "optimizer.name": "dot"}))


def test_each_optimizer_has_its_own_momenta_and_other_runs_are_the_same_as_before_there_were_any():
    two = {"momentum_tckd", "momentum_nckd"}  # the released code never uses the task's
    momenta = {"sgd": set(), "adamw": set(), "dot": {"momentum_delta"}, "deepkd": two | {"momentum_task"}}
    for name, read in (momenta | {"deepkd_released": two}).items():
        found = rules.identity(resolved(**{"method": "dkd", "optimizer.name": name}))
        assert {key.removeprefix("optimizer.") for key in found if key.startswith("optimizer.momentum_")} == read


def test_cross_entropy_needs_no_teacher():
    rules.validate(resolved(**{"method": "ce", "teacher.model": ""}))


def test_a_file_that_does_not_start_from_the_default_is_told_so():
    with pytest.raises(BadInput, match=r"is missing: start your file from dgkd_jax.runs.default.get_config\(\)"):
        rules.validate(ConfigDict({"method": "ce"}))
    extra = default.get_config()
    with extra.unlocked():
        extra.dkd.alhpa = 1.0
    with pytest.raises(BadInput, match=r"config.dkd.alhpa: no such key; did you mean 'dkd.alpha'"):
        rules.validate(extra)


def test_a_run_is_the_same_run_after_json():
    config = mnist5k.get_config()
    again = ConfigDict(json.loads(config.to_json()))
    assert rules.identity(again) == rules.identity(config)
    rules.check_same_run(rules.identity(again), config, workdir="w")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"log_every": 7}, True),
        ({"data.dir": "/elsewhere"}, True),
        ({"teacher.epochs": 3}, True),  # the teacher is compared by its weights
        ({"kd.temperature": 9.0}, True),  # DGKD does not read it
        ({"dkd.beta": 9.0}, False),
        ({"teacher.mean": (0.5,), "teacher.std": (0.5,)}, False),
        ({"dgkd.epsilon": 0.2}, False),
        ({"seed": 1}, False),
        ({"optimizer.learning_rate": 0.2}, False),
        ({"data.augment": "none"}, False),
        ({"batch_size": 64}, False),
    ],
)
def test_only_keys_that_change_the_result_make_another_run(change, same):
    one, other = mnist5k.get_config(), resolved(**change)
    assert (rules.identity(one) == rules.identity(other)) == same
    if not same:
        key = next(iter(change))
        with pytest.raises(BadInput, match=f"w holds a run with another configuration .{key}=.* there, .* here"):
            rules.check_same_run(rules.identity(one), other, workdir="w")


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"log_every": 7}, True),
        ({"optimizer.learning_rate": 0.2}, True),
        ({"dgkd.epsilon": 0.2}, True),
        ({"seed": 1}, False),
        ({"batch_size": 64}, False),
        ({"matmul_precision": "highest"}, False),
        ({"data.augment": "none"}, False),
        ({"teacher.mean": (0.5,), "teacher.std": (0.5,)}, False),
    ],
)
def test_the_teachers_logits_are_others_where_its_batches_or_its_arithmetic_are(change, same):
    """What decides a cache of them; whatever the student is taught by, one cache serves."""
    one, other = (rules.identity_of_batches(config) for config in (mnist5k.get_config(), resolved(**change)))
    assert (one == other) == same


# Another value of these makes no other run: the same numbers all the same.
DECIDES_NOTHING = {
    "compiler_options",
    "name", "note", "writers", "eval_batch_size", "join_timeout_s", "heartbeat_timeout_s", "compilation_cache",
    "log_every", "eval_every", "diagnose", "checkpoint_every", "keep_checkpoints", "watchdog_s", "mesh.fsdp",
    "data.dir", "data.manual_dir", "data.download", "data.max_bad_images", "data.on_device_mib", "steps_per_call",
    "teacher.workdir", "teacher.cache",
}  # fmt: skip
# Of these neither, for a run: the teacher that it has is compared by its weights.
DECIDES_THE_TEACHER = {"teacher.weights", "teacher.epochs", "teacher.learning_rate", "teacher.seed"} | {
    f"teacher.{key}" for key in TEACHERS_OWN
}
# Where the next value that comes to mind is not allowed, or would be no other run's.
OTHER_VALUES = {
    "compiler_options": ("xla_backend_optimization_level=1",),
    "schedule.milestones": (1, 2),
    "data.image_size": 32,
    "batch_size": 256,
    "batch_norm_groups": 2,
    "writers": ("wandb",),
    "data.readers": 2,
    **{f"{section}.mean": (0.4,) for section in ("data", "teacher")},
    **{f"{section}.std": (0.3,) for section in ("data", "teacher")},
}


def every_key_at_work(method) -> ConfigDict:
    """A valid configuration in which each key can be changed by itself."""
    pixels = {f"{section}.{key}": (0.5,) for section in ("data", "teacher") for key in ("mean", "std")}
    return resolved(**{"method": method, "data.mock": True} | pixels)


def other_value(key: str, value):
    """One that is allowed."""
    rule = KEYS[key].rule
    if key.removeprefix("teacher.") in TEACHERS_OWN:
        key = key.removeprefix("teacher.")
        value = rules.flatten(mnist5k.get_config())[key]
    if key in OTHER_VALUES:
        candidates = [OTHER_VALUES[key]]
    elif rule.choices:
        candidates = rule.choices
    elif isinstance(value, bool):
        candidates = [not value]
    elif isinstance(value, str):
        candidates = [f"{value}other"]
    elif isinstance(value, int):
        candidates = [value + 1]
    else:
        candidates = [0.5 * value, 0.25]
    return next(candidate for candidate in candidates if candidate != value and rule.accepts(candidate))


def test_what_each_key_decides_is_written_down_here_too():
    found = {what: {key for key, value in KEYS.items() if value.decides == what} for what in ("nothing", "teacher")}
    assert found == {"nothing": DECIDES_NOTHING, "teacher": DECIDES_THE_TEACHER}
    assert {value.decides for value in KEYS.values()} == {"run", "nothing", "teacher"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", KEYS)
def test_a_key_makes_another_run_exactly_where_it_decides_what_is_computed(key, method):
    one = every_key_at_work(method)
    rules.validate(one)
    value = other_value(key, rules.flatten(one)[key])
    other = rules.with_method(one, method)
    other.update_from_flattened_dict({key: value})
    if (key in ("data.mixup", "data.cutmix") and method == "rld") or (key, method) == ("accumulate", "dist"):
        with pytest.raises(BadInput, match=f"method {method} needs"):
            rules.validate(other)
        return
    rules.validate(other)
    section = key.split(".")[0]
    of_other_methods = section in METHODS and section not in sections_of(METHODS[method])
    of_no_teacher = section == "teacher" and not needs_teacher(method)
    of_other_optimizers = key.startswith("optimizer.momentum_")
    decides = key not in DECIDES_NOTHING | DECIDES_THE_TEACHER and not (
        of_other_methods or of_no_teacher or of_other_optimizers
    )
    assert (rules.identity(one) != rules.identity(other)) == decides
    recorded = json.loads(json.dumps(rules.identity(one)))  # as a checkpoint holds it
    rules.check_same_run(recorded, one, workdir="w")
    if decides:
        with pytest.raises(BadInput, match=rf"w holds a run with another configuration .*{key}=.* there, .* here"):
            rules.check_same_run(recorded, other, workdir="w")
    else:
        rules.check_same_run(recorded, other, workdir="w")


@pytest.mark.parametrize("key", ["data.mock_train_examples", "data.mock_eval_examples"])
def test_numbers_of_generated_images_decide_nothing_where_none_are_generated(key):
    one, other = resolved(), resolved(**{key: 77})
    assert rules.identity(one) == rules.identity(other)


def test_teachers_run_does_not_depend_on_the_method_the_students_seed_or_its_named_gradients():
    one = rules.of_teacher(mnist5k.get_config())
    other = rules.of_teacher(
        resolved(
            **{
                "method": "kd",
                "seed": 5,
                "dgkd.epsilon": 1.0,
                "student.model": "small_cnn_w24",
                "optimizer.name": "dot",
                "optimizer.momentum_delta": 0.05,
            }
        )
    )
    assert rules.identity(one) == rules.identity(other)
    assert (one.method, one.student.model, one.epochs) == ("ce", "small_cnn_w24", mnist5k.get_config().teacher.epochs)


def test_the_command_line_changes_the_students_training_and_leaves_the_teachers_as_the_file_has_it():
    argv = ["main", "--config=configs/cifar100.py:resnet32x4,resnet8x4", "--config.batch_size=32"]
    config = cifar100.get_config("resnet32x4,resnet8x4")
    config.update_from_flattened_dict({"batch_size": 32, "optimizer.momentum": 0.5, "teacher.data.augment": "none"})
    rules.fill_in_teacher(config, command_line.config_of_file(argv))
    teacher = rules.of_teacher(config)
    assert (teacher.batch_size, teacher.optimizer.momentum, teacher.data.augment) == (64, 0.9, "none")
    assert (config.batch_size, config.optimizer.momentum, config.data.augment) == (32, 0.5, "pad_crop_flip")
    rules.validate(config)


@pytest.mark.parametrize("key", TEACHERS_OWN)
def test_the_teacher_has_each_key_of_its_training_for_itself(key):
    """Any other allowed value is the teacher's alone; without one it is the student's."""
    config = mnist5k.get_config()
    other = other_value(f"teacher.{key}", None)
    assert config_value(rules.of_teacher(config), key) == config_value(config, key)
    config.update_from_flattened_dict({f"teacher.{key}": other})
    rules.validate(config)
    expected = "sgd" if other in NAMED_GRADIENTS else other  # the teacher has one gradient
    assert config_value(rules.of_teacher(config), key) == expected
    assert other != config_value(config, key)


def config_value(config, key):
    return rules.flatten(config)[key]


def test_messages_about_the_teachers_training_name_the_teachers_keys():
    message = "config.batch_size=12, config.data.augment=x, config.name, config.optimizer.learning_rate: no"
    assert rules.in_teachers_keys(message) == (
        "config.teacher.batch_size=12, config.teacher.data.augment=x, config.name, config.teacher.learning_rate: no"
    )


def test_a_run_from_before_a_key_existed_goes_on_where_the_key_is_off():
    config = default.get_config()
    config.update_from_flattened_dict({"method": "kd", "student.model": "resnet8", "data.name": "cifar100"})
    recorded = rules.identity(config)
    added = {"data.mixup", "data.trivial_augment", "kd.standardize", "accumulate"}
    assert not added & set(recorded)  # as older runs have it
    rules.check_same_run(recorded, config, workdir="runs/old")
    config.update_from_flattened_dict({"data.mixup": 0.2, "kd.standardize": True})
    with pytest.raises(BadInput, match=r"data.mixup=0.0 there, 0.2 here, kd.standardize=False there, True here"):
        rules.check_same_run(recorded, config, workdir="runs/old")


@pytest.mark.wrong_input
@pytest.mark.parametrize("key", ["student.model", "teacher.model", "data.name"])
def test_an_import_path_that_leads_nowhere_is_named_before_anything_else(key):
    with pytest.raises(BadInput, match=f"config.{key}='own_networks:Linenn': own_networks has no Linenn; did you mean"):
        rules.validate(resolved(**{key: "own_networks:Linenn"}))
