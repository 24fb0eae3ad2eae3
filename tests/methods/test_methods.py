"""What every method promises, for all of `METHODS`: a new row there is tested here without a word."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import mnist5k
from dgkd_jax import losses, methods
from dgkd_jax.errors import BadInput
from dgkd_jax.methods import CE, DGKD, DKD, KD, METHODS, from_config, names_of, section_keys, sections_of
from dgkd_jax.methods.__main__ import table
from dgkd_jax.methods.key import Key, keys_of
from dgkd_jax.methods.progress import Progress
from dgkd_jax.runs import config as rules
from dgkd_jax.runs.default import KEYS, get_config

BATCH, CLASSES, WIDTH = 6, 5, 4
# Each method as it is by default, those of standardised logits, and DGKD by every convention, every distance and with
# respect to parameters.
VARIANTS = (
    {name: method() for name, method in METHODS.items()}
    | {
        "kd standardize": KD(standardize=True),
        "dkd standardize": DKD(standardize=True),
        "dgkd standardize": DGKD(dkd=DKD(standardize=True)),
        "dgkd standardize params": DGKD(dkd=DKD(standardize=True), wrt="params"),
    }
    | {
        f"dgkd {' '.join(choice.values())}": DGKD(kappa=0.01, **choice)
        for choice in (
            *({"convention": convention} for convention in losses.CONVENTIONS),
            *({"distance": distance} for distance in losses.DISTANCES if distance != "mse"),
            {"wrt": "own_logits"},
            {"wrt": "params"},
            {"wrt": "params", "distance": "wasserstein", "convention": "literal"},
        )
    }
)
PROGRESS = Progress(jnp.asarray(70, jnp.int32), steps_per_epoch=10, total_steps=100)
ALL = pytest.mark.parametrize("name", METHODS)
EACH = pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS)


def another(key: Key):
    """A value that the key may have and that is not its default."""
    if key.rule.choices:
        candidates = key.rule.choices
    elif isinstance(key.default, bool):
        candidates = (not key.default,)
    elif isinstance(key.default, int):
        candidates = (key.default + 1,)
    else:
        candidates = (0.5 * key.default, key.default + 0.25)
    return next(value for value in candidates if value != key.default and key.rule.accepts(value))


def data(seed=0):
    """Inputs, weights of a linear network, the teacher's logits and labels; to be called where there are 64 bits."""
    rng = np.random.default_rng(seed)
    inputs, weights = rng.normal(size=(BATCH, WIDTH)), rng.normal(size=(WIDTH, CLASSES))
    teacher_logits = 2 * rng.normal(size=(BATCH, CLASSES))
    labels = np.array([0, 1, 2, 3, 4, 1], np.int32)
    return jnp.asarray(inputs), jnp.asarray(weights), jnp.asarray(teacher_logits), jnp.asarray(labels)


def terms_of(method, inputs, weights, teacher_logits, labels):
    """As the training step computes them, of a network with these weights."""
    taught_by = teacher_logits if method.needs_teacher else None
    if method.needs_parameter_gradients:
        logits, pull_back = jax.vjp(lambda weights: inputs @ weights, weights)
        return logits, method.terms(logits, taught_by, labels, pull_back=pull_back)
    logits = inputs @ weights
    return logits, method.terms(logits, taught_by, labels)


def loss_of(method, inputs, weights, teacher_logits, labels, progress=PROGRESS):
    logits, terms = terms_of(method, inputs, weights, teacher_logits, labels)
    terms = {"ce": losses.cross_entropy(logits, labels)} | terms
    return method.loss(jax.tree.map(jnp.mean, terms), progress)


@ALL
def test_a_method_is_registered_under_its_own_name(name):
    assert METHODS[name].name == name
    assert set(sections_of(METHODS[name])) <= {*METHODS}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("all", tuple(METHODS)),
        ("kd", ("kd",)),
        ("dkd,ce", ("dkd", "ce")),
        ("my_code:Mine", ("my_code:Mine",)),
        ("my_code:Mine(width=8,depth=2)", ("my_code:Mine(width=8,depth=2)",)),
    ],
)
def test_a_config_names_one_method_or_several_or_all(text, names):
    assert names_of(ConfigDict({"method": text})) == names


def test_sections_are_those_of_a_method_and_of_what_it_is_made_of():
    found = {name: sections_of(method) for name, method in METHODS.items()}
    assert {name: found[name] for name in ("ce", "kd", "dkd", "dgkd", "logit_mse")} == {
        "ce": (), "kd": ("kd",), "dkd": ("dkd",), "dgkd": ("dkd", "dgkd"), "logit_mse": ("logit_mse",),
    }  # fmt: skip


@EACH
def test_a_method_is_a_value(method):
    same = dataclasses.replace(method)
    assert same == method
    assert same is not method
    assert hash(same) == hash(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "other"


@ALL
def test_each_key_makes_another_method(name):
    plain = METHODS[name]()
    for field, key in keys_of(METHODS[name]).items():
        other = dataclasses.replace(plain, **{field: another(key)})
        assert other != plain


@ALL
def test_the_section_of_a_method_is_that_of_the_configuration(name):
    keys = keys_of(METHODS[name])
    assert {key for key in KEYS if key.startswith(f"{name}.")} == {f"{name}.{field}" for field in keys}
    config = get_config()
    for field, key in keys.items():
        assert KEYS[f"{name}.{field}"] is key is section_keys()[f"{name}.{field}"]
        assert config[name][field] == key.default == getattr(METHODS[name](), field)
        assert key.rule.accepts(key.default)
        assert key.meaning
        assert key.decides == "run"


@ALL
def test_a_method_is_built_from_every_key_of_its_sections(name):
    config = get_config()
    config.method = name
    built = from_config(config)
    assert built == METHODS[name]()
    for section in sections_of(METHODS[name]):
        for field, key in keys_of(METHODS[section]).items():
            changed = rules.with_method(config, name)
            changed[section][field] = another(key)
            found = from_config(changed)
            assert found != built, f"{section}.{field}"
            assert getattr(found if section == name else getattr(found, section), field) == another(key)
    for section in {*METHODS} - {*sections_of(METHODS[name])}:
        for field, key in keys_of(METHODS[section]).items():
            changed = rules.with_method(config, name)
            changed[section][field] = another(key)
            assert from_config(changed) == built, f"{section}.{field} of another method"


@EACH
def test_terms_have_the_names_that_are_announced(method):
    with jax.enable_x64(True):
        logits, terms = terms_of(method, *data())
        assert tuple(terms) == tuple(method.term_units)
        assert all(term.shape in ((), (BATCH,)) for term in terms.values())
        assert all(np.isfinite(term).all() for term in terms.values())
        assert logits.shape == (BATCH, CLASSES)


def assert_alike(found, expected, *, same):
    close = [np.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12) for name in expected]  # float64
    assert all(close) == same


@EACH
def test_labels_matter_where_a_method_says_so_and_only_there(method):
    with jax.enable_x64(True):
        inputs, weights, teacher_logits, labels = data()
        _, terms = terms_of(method, inputs, weights, teacher_logits, labels)
        _, others = terms_of(method, inputs, weights, teacher_logits, (labels + 1) % CLASSES)
        assert_alike(others, terms, same=not method.needs_labels)


@EACH
def test_the_order_of_the_classes_matters_where_a_method_says_so_and_only_there(method):
    order = np.array([3, 0, 4, 2, 1])
    with jax.enable_x64(True):
        inputs, weights, teacher_logits, labels = data()
        _, terms = terms_of(method, inputs, weights, teacher_logits, labels)
        _, others = terms_of(
            method,
            inputs,
            weights[:, order],
            teacher_logits[:, order],
            jnp.asarray(np.argsort(order)[labels], jnp.int32),
        )
        assert_alike(others, terms, same=not method.needs_class_order)


@pytest.mark.slow
@EACH
def test_the_loss_is_a_finite_scalar_whose_gradient_is_that_of_its_finite_differences(method):
    with jax.enable_x64(True):
        inputs, weights, *rest = data()
        loss = jax.jit(functools.partial(loss_of, method))
        assert loss(inputs, weights, *rest).shape == ()
        assert np.isfinite(loss(inputs, weights, *rest))
        gradient = jax.grad(loss, argnums=1)(inputs, weights, *rest)
        assert np.isfinite(gradient).all()
        if getattr(method, "convention", "").endswith("normalized"):
            return  # no gradient is taken of what these divide by
        direction = np.random.default_rng(1).normal(size=weights.shape)
        h = 1e-6
        slope = (loss(inputs, weights + h * direction, *rest) - loss(inputs, weights - h * direction, *rest)) / (2 * h)
        # Central differences: truncation h² and cancellation 1e-16/h give about 1e-9.
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6, atol=1e-8)


@EACH
def test_no_gradient_flows_into_the_teacher(method):
    if not method.needs_teacher:
        pytest.skip("has no teacher")
    with jax.enable_x64(True):
        gradient = jax.grad(functools.partial(loss_of, method), argnums=2)(*data())
        assert not np.any(gradient)


@ALL
def test_a_method_without_a_teacher_is_given_none_and_one_with_a_teacher_reads_it(name):
    method = METHODS[name]()
    with jax.enable_x64(True):
        inputs, weights, teacher_logits, labels = data()
        loss = loss_of(method, inputs, weights, teacher_logits, labels)
        other = loss_of(method, inputs, weights, teacher_logits[::-1], labels)
        assert (loss == other) == (not method.needs_teacher)
    if not method.needs_teacher:
        assert method.teacher_temperature is None
        assert rules.deciding({"method": name, "teacher.model": "x"}, "run") == {"method": name}


@ALL
def test_a_method_is_static_under_jit(name):
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def loss(method, ce):
        traces.append(method)
        return method.loss({"ce": ce} | dict.fromkeys(method.term_units, ce), PROGRESS)

    loss(METHODS[name](), 1.0)
    loss(METHODS[name](), 2.0)
    assert len(traces) == 1


def test_losses_are_their_formulas():
    """Of terms 2, 3, 5 and 7; the schedules are in test_progress.py."""
    weights = {"warmup_epochs": 0.0, "ce_weight": 0.5, "alpha": 1.5, "beta": 2.0}
    found = {
        CE(): {"ce": 2.0},
        KD(ce_weight=0.3, weight=0.7): {"ce": 2.0, "kd": 3.0},
        METHODS["logit_mse"](ce_weight=0.3, weight=0.7): {"ce": 2.0, "logit_mse": 3.0},
        METHODS["wttm"](ce_weight=0.3, weight=0.7): {"ce": 2.0, "wttm": 3.0},
        METHODS["nkd"](ce_weight=0.3): {"ce": 2.0, "nkd": 3.0},
        METHODS["dist"](ce_weight=0.3): {"ce": 2.0, "dist": 3.0},
        METHODS["rld"](ce_weight=0.3, warmup_epochs=0.0): {"ce": 2.0, "rld": 3.0},
        METHODS["gdkd"](ce_weight=0.3, warmup_epochs=0.0): {"ce": 2.0, "gdkd": 3.0},
        DKD(**weights): {"ce": 2.0, "tckd": 3.0, "nckd": 5.0},
        DGKD(dkd=DKD(**weights), epsilon=0.25): {"ce": 2.0, "tckd": 3.0, "nckd": 5.0, "coupling": 7.0},
    }
    values = [float(method.loss(jax.tree.map(jnp.asarray, terms), PROGRESS)) for method, terms in found.items()]
    np.testing.assert_allclose(values, [2.0, 2.7, 2.7, 2.7, 3.6, 3.6, 3.6, 3.6, 15.5, 13.75], rtol=1e-6)  # float32


def test_temperatures_at_which_the_teacher_is_read():
    found = {name: method().teacher_temperature for name, method in METHODS.items()}
    assert {name: found[name] for name in ("ce", "kd", "dkd", "dgkd", "logit_mse")} == {
        "ce": None, "kd": 4.0, "dkd": 4.0, "dgkd": 4.0, "logit_mse": None,
    }  # fmt: skip
    assert DGKD(dkd=DKD(temperature=2.0)).teacher_temperature == 2.0
    # Standardising needs every logit, and so do the peers.
    assert KD(standardize=True).teacher_temperature is None
    assert DGKD(dkd=DKD(standardize=True)).teacher_temperature is None
    assert {found[name] for name in ("nkd", "dist", "wttm", "rld", "gdkd")} == {None}


def test_the_table_of_the_readme_is_the_one_that_the_command_prints():
    readme = Path(__file__).parents[2] / "README.md"
    assert f"\n{table()}\n" in readme.read_text(), "paste what `python -m dgkd_jax.methods` prints into README.md"


def with_own_method(text):
    config = mnist5k.get_config()
    config.method = text
    return config


def test_a_users_own_method_by_its_import_path_has_the_arguments_of_the_path():
    config = with_own_method("own_methods:Weighted(strength=3.0, temperature=2.0)")
    rules.validate(config)
    method = methods.from_config(config)
    assert (method.strength, method.temperature) == (3.0, 2.0)
    terms = {"ce": 1.0, "kd": 2.0}
    assert method.loss(terms, None) == 7.0


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("own_methods:NoMethod", "is no method, it lacks needs_teacher, needs_labels, .* loss; dgkd_jax/methods/kd"),
        ("own_methods:Unhashable", "cannot be hashed .* make it a dataclass with frozen=True"),
        ("own_methods:Weighted(stength=3.0)", "config.method: Weighted: TypeError: .*stength"),
        ("own_methods:function(a=1)", "only a class takes arguments"),
        ("own_methods:Nothing", "own_methods has no Nothing"),
    ],
)
def test_what_is_no_method_is_refused(text, message):
    with pytest.raises(BadInput, match=message):
        rules.validate(with_own_method(text))


def test_each_method_reads_its_own_section():
    config = get_config()
    with config.unlocked():
        config.update({"kd": {"temperature": 2.0}, "dkd": {"temperature": 3.0}, "dgkd": {"parity_batch": 64}})
    found = {}
    for method in METHODS:
        config.method = method
        found[method] = from_config(config)
    read = [found[m].teacher_temperature for m in ("ce", "kd", "dkd", "dgkd", "logit_mse")]
    assert read == [None, 2.0, 3.0, 3.0, None]
    assert found["dgkd"].parity_batch == 64
    assert not found["ce"].needs_teacher
    assert all(found[m].needs_teacher for m in METHODS if m != "ce")
