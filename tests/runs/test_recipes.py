"""The published recipes, and the pairs of networks that take them or the nearest one."""

import pytest

from configs import cifar100, imagenet, imagenet_strong
from dgkd_jax import models
from dgkd_jax.errors import BadInput
from dgkd_jax.runs import config as rules


@pytest.mark.parametrize("module", [cifar100, imagenet, imagenet_strong])
def test_each_published_pair_gives_a_configuration_with_nothing_to_note(module):
    for pair in getattr(module, "PAIRS", imagenet.PAIRS):
        config = module.get_config(pair)
        assert f"{config.teacher.model},{config.student.model}" == pair
        assert config.note == ""
        rules.validate(config)


@pytest.mark.parametrize("module", [cifar100, imagenet, imagenet_strong])
def test_any_two_networks_are_a_pair(module):
    """Every name as teacher and as student, each beside the next name, and beside itself."""
    for teacher, student in zip(models.NAMES, models.NAMES[1:] + models.NAMES[:1], strict=True):
        for pair in (f"{teacher},{student}", f"{teacher},{teacher}"):
            config = module.get_config(pair)
            assert f"{config.teacher.model},{config.student.model}" == pair
            rules.validate(config)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "vgg8", "resnet18", "shufflenet_v1_cifar", "mobilenet_v2",
                                  "efficientnet_lite0", "vit_tiny_patch16_224", "convnext_tiny", "swin_s",
                                  "small_cnn_w4"])  # fmt: skip
def test_every_kind_of_network_takes_the_images_of_its_pair(name):
    model = models.create(name, num_classes=100)
    for pair in (f"{name},resnet8", f"resnet8,{name}"):
        side = cifar100.get_config(pair).data.image_size
        models.shapes(model, (side, side, 3))  # raises where the network cannot take them


@pytest.mark.parametrize(
    ("pair", "beta", "rate", "note"),
    [
        ("resnet20,resnet8", 2.0, 0.05, "takes that of resnet56,resnet20: β 2, GDKD's w1 and w2 1 and 1"),
        ("resnet56,resnet8x4", 8.0, 0.05, "takes that of resnet32x4,resnet8x4: β 8"),  # the same student
        ("wrn_40_2,resnet8x4", 8.0, 0.05, "takes that of resnet32x4,resnet8x4: β 8"),
        ("wrn_40_2,shufflenet_v2_x0_5", 8.0, 0.01, "resnet32x4,shufflenet_v1_cifar: β 8, learning rate 0.01"),
        ("resnet32x4,swin_s", 8.0, 0.05, "takes the one that its pairs have in common"),  # a teacher is not enough
    ],
)
def test_a_pair_takes_the_recipe_of_the_nearest_student_and_says_so(pair, beta, rate, note):
    config = cifar100.get_config(pair)
    assert (config.dkd.beta, config.optimizer.learning_rate) == (beta, rate)
    assert config.note.startswith(f"configs/cifar100.py: no published recipe for {pair}; ")
    assert config.note.endswith(note)


def test_a_teacher_at_two_sizes_of_image_has_two_folders():
    folders = [
        cifar100.get_config(f"shufflenet_v2_cifar,{student}").teacher.workdir
        for student in ("resnet50_cifar", "vit_small_patch16_224")
    ]
    assert folders == [f"runs/cifar100-teachers/shufflenet_v2_cifar{size}" for size in ("", "-224")]


def test_an_imagenet_teacher_without_known_weights_is_trained_and_the_run_says_so():
    config = imagenet.get_config("swin_s,resnet18")
    assert (config.teacher.weights, config.teacher.workdir) == ("", "runs/imagenet-teachers/swin_s")
    assert config.note == (
        "configs/imagenet.py: no published recipe for swin_s,resnet18; takes that of resnet34,resnet18. "
        "It trains swin_s first, unless --config.teacher.weights names its weights"
    )


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


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            "resnet56,resnet2O",
            "configs/cifar100.py:resnet56,resnet2O: no network 'resnet2O'; did you mean .*'resnet20'",
        ),
        ("resnt56, resnet20", "configs/cifar100.py:resnt56, resnet20: no network 'resnt56'; did you mean 'resnet56'"),
        ("resnet56", "configs/cifar100.py:resnet56: a pair is TEACHER,STUDENT, such as configs/cifar100.py:resnet56,"),
    ],
)
def test_a_misspelt_pair_is_refused_with_the_nearest_name(pair, message):
    with pytest.raises(BadInput, match=message):
        cifar100.get_config(pair)
