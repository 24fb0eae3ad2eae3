"""Options for XLA reach the compiler of the step, and what it does not know is named before anything is built."""

import jax
import pytest
from small_runs import small

from dgkd_jax.data.open import open_source
from dgkd_jax.errors import BadInput
from dgkd_jax.runs import compiler_options, sharding
from dgkd_jax.runs.config import validate
from dgkd_jax.training.build import build


@pytest.mark.slow
def test_the_step_is_compiled_with_the_users_options(one_device):
    """Without the pass that joins operations the program has a line for each."""
    lengths = []
    for options in ((), ("xla_disable_hlo_passes=fusion",)):
        config = small(method="ce", compiler_options=options)
        source = open_source(config.data)
        program, current = build(config, source, one_device, None)
        batch = sharding.to_global(
            next(source.train_batches(seed=0, batch_size=config.batch_size, start_step=0)), one_device
        )
        text = program.train_step.lower(current, None, batch).compile().as_text()
        lengths.append(text[text.index("ENTRY") :].count(" = "))
    assert lengths[1] > 1.5 * lengths[0], lengths


def test_the_users_option_counts_where_the_kind_of_device_has_another(monkeypatch, one_device):
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(
        compiler_options._OF_KIND, kind, {"xla_backend_optimization_level": "1", "xla_cpu_use_fusion_emitters": "true"}
    )
    assert compiler_options.of(("xla_backend_optimization_level=0", "xla_dump_hlo_as_text=false"), one_device) == {
        "xla_backend_optimization_level": "0",
        "xla_cpu_use_fusion_emitters": "true",
        "xla_dump_hlo_as_text": False,
    }


@pytest.mark.wrong_input
@pytest.mark.parametrize("text", ["xla_no_such_option=1", "xla_backend_optimization_level=many"])
def test_an_option_that_the_compiler_refuses_is_named(text, one_device):
    with pytest.raises(BadInput, match=rf"config.compiler_options: the compiler refuses {text}: "):
        compiler_options.of((text,), one_device)


@pytest.mark.wrong_input
@pytest.mark.parametrize("value", [("level",), ("=1",), "level=1"])
def test_options_are_texts_with_an_equals_sign(value):
    config = small()
    with config.unlocked():
        config.compiler_options = value if isinstance(value, tuple) else (value, 1)
    with pytest.raises(BadInput, match=r"config.compiler_options=.* is not allowed: a tuple of texts NAME=VALUE"):
        validate(config)
