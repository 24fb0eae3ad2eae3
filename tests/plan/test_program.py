"""A plan's programs are those that a run compiles: the same text, from shapes as from arrays."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from in_memory import InMemory, tiny
from small_runs import a_teacher

from dgkd_jax.data.described import describe
from dgkd_jax.data.open import open_source
from dgkd_jax.errors import BadInput
from dgkd_jax.evaluate.evaluator import Evaluator, clean
from dgkd_jax.plan import program
from dgkd_jax.runs import sharding
from dgkd_jax.training import feed
from dgkd_jax.training.build import build, program_of
from dgkd_jax.training.teacher import untaught

ROOT = Path(__file__).parents[2]


def as_shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"data.augment": "pad_crop_flip", "on_device": True}, {"accumulate": 2, "optimizer.name": "dot"}],
    ids=["streamed", "on_device", "in_parts"],
)
def test_the_step_from_shapes_is_the_step_from_arrays(changes):
    on_device = changes.pop("on_device", False)
    config, mesh = tiny(batch_size=16, **changes), sharding.make_mesh(fsdp=2)
    source = InMemory(config, on_device=on_device)
    built, state = build(config, source, mesh, a_teacher(source, mesh))
    with feed.feed(config, built, source=source, mesh=mesh, start=0) as fed:
        arguments = fed.arguments(0, 1)
    expected = fed.program.lower(state, built.teacher, *arguments)

    teacher = untaught(config, source, mesh)
    planned = program_of(config, source, mesh, teacher)
    step, shapes = feed.described(config, planned, source=source, mesh=mesh)
    assert as_shapes(shapes) == as_shapes(arguments)
    assert as_shapes(planned.begins_as) == as_shapes(state)
    assert step.lower(planned.begins_as, teacher, *shapes).as_text() == expected.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("target", program.TARGETS)
def test_a_target_is_the_program_that_the_run_calls(target, monkeypatch):
    """The whole way, from the config: of generated images a run's source is also its description."""
    config, mesh = tiny(batch_size=16), sharding.make_mesh()
    planned = program.lower(config, mesh, target=target).as_text()
    source = open_source(config.data)
    teacher = a_teacher(source, mesh)
    built, state = build(config, source, mesh, teacher)
    if target == "train":
        with feed.feed(config, built, source=source, mesh=mesh, start=0) as fed:
            assert fed.program.lower(state, teacher, *fed.arguments(0, 1)).as_text() == planned
        return
    evaluator = Evaluator(mesh, batch_size=config.eval_batch_size, remembers_teacher=True)
    called = {}
    for name, of in {"plain": "evaluate", "full": "diagnose", "ask": "teacher"}.items():
        monkeypatch.setattr(evaluator, name, functools.partial(_noted, called, of, getattr(evaluator, name)))
    student = built.student.with_variables(state.evaluated)
    evaluator(student, clean(source))
    evaluator(student, clean(source), teacher=teacher, diagnose=True)
    assert called[target] == planned


def _noted(called, name, jitted, *arguments, **options):
    called.setdefault(name, jitted.lower(*arguments, **options).as_text())
    return jitted(*arguments, **options)


@pytest.mark.parametrize("own", ["own_networks:Plain", "own_networks:Linen(classes=10)"])
def test_an_own_network_by_an_import_path_is_planned_as_it_is_run(own):
    config, mesh = tiny(**{"batch_size": 16, "method": "ce", "student.model": own}), sharding.make_mesh()
    planned = program.lower(config, mesh, target="train").as_text()
    source = open_source(config.data)
    built, state = build(config, source, mesh, None)
    with feed.feed(config, built, source=source, mesh=mesh, start=0) as fed:
        assert fed.program.lower(state, None, *fed.arguments(0, 1)).as_text() == planned


@pytest.mark.slow
def test_a_mesh_of_absent_devices_decides_the_form_and_the_dtype(monkeypatch):
    """As a stand-in for a TPU: a mesh that says so, on this machine's devices."""
    monkeypatch.setattr(sharding, "platform_of", lambda mesh: "tpu")
    config, mesh = tiny(batch_size=16, accumulate=2), sharding.make_mesh()
    text = program.lower(config, mesh, target="train").as_text()
    assert "bf16" in text  # dtype=auto
    assert "stablehlo.while" in text  # the parts of a batch, written out on CPUs
    monkeypatch.undo()
    text = program.lower(config, mesh, target="train").as_text()
    assert "bf16" not in text
    assert "stablehlo.while" not in text


@pytest.mark.parametrize(
    ("name", "sizes"), [("imagenet2012", (1_281_167, 50_000, 1000)), ("cifar100", (50_000, 10_000, 100))]
)
def test_a_known_set_is_described_without_its_files(name, sizes):
    config = tiny(**{"data.mock": False, "data.name": name, "data.image_size": 32, "data.eval_resize": 32})
    found = describe(config.data)
    assert (found.num_train, found.num_eval, found.num_classes) == sizes
    assert found.image_shape == (32, 32, 3)
    assert found.on_device == (name == "cifar100")  # ImageNet's pixels would take 3.7 GiB, above on_device_mib


def test_an_own_set_is_what_the_config_says():
    given = {"data.image_size": 48, "data.num_classes": 7, "data.train_examples": 5000}
    found = describe(tiny(**{"data.mock": False, "data.name": "own_splits:pair", **given}).data)
    assert (found.image_shape, found.num_classes, found.num_train) == ((48, 48, 3), 7, 5000)


@pytest.mark.wrong_input
def test_a_set_that_only_its_files_describe_is_a_line_with_the_keys():
    data = tiny(**{"data.mock": False, "data.name": "image_folder", "data.image_size": 0}).data
    with pytest.raises(BadInput, match=r"give --config.data.image_size=N .*num_classes=N .*train_examples=N"):
        describe(data)


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("changes", "target", "message"),
    [
        ({"batch_size": 12}, "train", r"batch_size=12 must be a multiple of the number of devices, 8"),
        ({"method": "all"}, "train", r"config.method=all: a plan is of one;"),
        ({"method": "kd,dkd"}, "train", r"config.method=kd,dkd: a plan is of one;"),
        ({"method": "ce"}, "teacher", r"--target=teacher: method ce has none"),
    ],
)
def test_a_program_that_cannot_be_is_one_line(changes, target, message):
    with pytest.raises(BadInput, match=message):
        program.lower(tiny(**changes), sharding.make_mesh(), target=target)


def command(*arguments, without=()):
    """The command in a process of its own, in which the packages `without` are not there."""
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in without)
    run = "runpy.run_module('dgkd_jax.plan', run_name='__main__')"
    code = f"import sys, runpy; {hidden}sys.argv = ['plan', *sys.argv[1:]]; {run}"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )


@pytest.mark.slow
def test_help_needs_no_compiler_and_no_tensorflow():
    done = command("--help", without=("libtpu", "tensorflow", "tensorflow_datasets"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "--topology" in done.stdout


@pytest.mark.slow
@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("arguments", "without", "message"),
    [
        (["--topology=v5e-4"], ("libtpu",), "pip install -e '.[plan]'"),
        (["--topology=v5e-5"], (), "the nearest is v5e:2x2 (v5e-4)"),
        ([], (), "no --topology=SLICE given"),
        (["--topology=v5e-4", "--per-chip=few"], (), "'few' is no number of images"),
        (["--topology=v5e-4", "--target=trian"], (), "did you mean 'train'?"),
        (["--topology=v5e-4", "--tpology=v5e-4"], (), "tpology"),
        (["--topology=v5e-4", "--price=cheap"], (), "'cheap' is no price"),
    ],
)
def test_a_wrong_command_is_one_line_and_code_2(arguments, without, message):
    done = command("--config=configs/mnist5k.py", *arguments, without=without)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
