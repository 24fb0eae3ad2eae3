"""Every key is documented, held to a rule and read; mistakes are named."""

import ast
import importlib
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import cifar100, default, imagenet, mnist5k
from dgkd_jax import config as rules
from dgkd_jax import models
from dgkd_jax.errors import BadInput

ROOT = Path(__file__).parents[1]
CONFIGS = [p.stem for p in sorted((ROOT / "configs").glob("*.py")) if p.stem not in ("__init__", "default", "pairs")]


def test_every_key_has_a_rule_and_every_rule_a_key():
    assert set(rules.flatten(default.get_config())) == set(rules.RULES)


def test_every_key_stands_in_default_with_a_comment():
    for line in (ROOT / "configs" / "default.py").read_text().splitlines():
        if line.strip().startswith("config.") and "ConfigDict()" not in line:
            assert "  # " in line, f"undocumented: {line.strip()}"


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
    """As `config.section.key`, or `section.key` where a section is passed on under its own name."""
    chains = set()
    for path in (ROOT / "dgkd_jax").rglob("*.py"):
        chains |= attribute_chains(ast.parse(path.read_text()))
    read = {key for key in rules.RULES if chains & {key, f"config.{key}", f"settings.{key}"}}
    assert set(rules.RULES) - read == set()


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
        ("method", "dkg", "config.method='dkg' is not allowed: one of 'ce', 'kd'.*did you mean 'dkd'"),
        ("student.model", "resnet19", r"config.student.model='resnet19' is not allowed.*did you mean 'resnet1"),
        ("teacher.model", "", "config.teacher.model='' is not allowed"),
        ("data.name", "cifar", "config.data.name='cifar' is not allowed.*did you mean 'cifar10"),
        ("epochs", 0, r"config.epochs=0 is not allowed: a number in \[1, inf\)"),
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
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(key, value, message):
    with pytest.raises(BadInput, match=message):
        rules.validate(resolved(**{key: value}))


def test_cross_entropy_needs_no_teacher():
    rules.validate(resolved(**{"method": "ce", "teacher.model": ""}))


def test_a_file_that_does_not_start_from_the_default_is_told_so():
    with pytest.raises(BadInput, match="is missing: start your file from configs/default.py"):
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


def test_teachers_run_does_not_depend_on_the_method_or_the_students_seed():
    one = rules.of_teacher(mnist5k.get_config())
    other = rules.of_teacher(
        resolved(**{"method": "kd", "seed": 5, "dgkd.epsilon": 1.0, "student.model": "small_cnn_w24"})
    )
    assert rules.identity(one) == rules.identity(other)
    assert (one.method, one.student.model, one.epochs) == ("ce", "small_cnn_w24", mnist5k.get_config().teacher.epochs)


@pytest.mark.parametrize(("module", "pairs"), [(cifar100, cifar100.PAIRS), (imagenet, imagenet.PAIRS)])
def test_each_published_pair_gives_a_configuration_or_says_what_is_not_built(module, pairs):
    for pair in pairs:
        teacher, student = pair.split(",")
        if {teacher, student} <= set(models.NAMES):
            config = module.get_config(pair)
            assert (config.teacher.model, config.student.model) == (teacher, student)
            rules.validate(config)
        else:
            with pytest.raises(ValueError, match=r"model \w+ is not built yet. Pairs that can be run: "):
                module.get_config(pair)


def test_published_recipes_are_those_of_their_sources():
    """Figures of mdistiller's configuration files and of RepDistiller's scripts."""
    config = cifar100.get_config("resnet32x4,resnet8x4")
    assert (config.epochs, config.batch_size, config.schedule.milestones) == (240, 64, (150, 180, 210))
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.optimizer.momentum) == (
        0.05,
        5e-4,
        0.9,
    )
    assert (config.dkd.alpha, config.dkd.beta, config.dkd.temperature, config.dkd.warmup_epochs) == (
        1.0,
        8.0,
        4.0,
        20.0,
    )
    assert cifar100.get_config("resnet56,resnet20").dkd.beta == 2.0
    assert cifar100.get_config("resnet110,resnet32").dkd.beta == 2.0
    assert {pair: cifar100.PAIRS[pair]["beta"] for pair in cifar100.PAIRS if "wrn" in pair or "vgg" in pair} == {
        "wrn_40_2,wrn_16_2": 6.0,
        "wrn_40_2,wrn_40_1": 6.0,
        "vgg13_bn,vgg8_bn": 6.0,
    }
    slow = {pair for pair, recipe in cifar100.PAIRS.items() if recipe.get("learning_rate") == 0.01}
    assert slow == {
        "resnet32x4,shufflenet_v1_cifar",
        "resnet32x4,shufflenet_v2_cifar",
        "resnet50_cifar,mobilenet_v2_half_cifar",
    }
    config = imagenet.get_config("resnet34,resnet18")
    assert (config.epochs, config.batch_size, config.schedule.milestones) == (100, 512, (30, 60, 90))
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (0.2, 1e-4)
    assert (config.dkd.alpha, config.dkd.beta, config.dkd.temperature, config.dkd.warmup_epochs) == (1.0, 0.5, 1.0, 1.0)


def test_an_unknown_pair_is_named_with_the_nearest():
    with pytest.raises(
        ValueError, match="configs/cifar100.py:resnet56,resnet21: no such pair; did you mean resnet56,resnet20"
    ):
        cifar100.get_config("resnet56,resnet21")
