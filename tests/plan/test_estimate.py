"""The arithmetic of a plan, its advice and how it is shown, from figures given by hand."""

import dataclasses
import json

import pytest

from configs import imagenet_r50_r18
from dgkd_jax.plan import estimate, hlo, page, slices
from dgkd_jax.plan.advice import advice
from dgkd_jax.plan.compiler import Compiled, TooLarge, needed

GIB = 2**30


class Program:
    """What JAX gives of a compiled program."""

    def __init__(self, text, **analysis):
        self._text, self._analysis = text, analysis

    def cost_analysis(self):
        return {
            key.replace("_", " ") if key == "bytes_accessed" else key: value for key, value in self._analysis.items()
        }

    def as_text(self):
        return self._text

    def memory_analysis(self):
        class Memory:
            argument_size_in_bytes, temp_size_in_bytes = 2 * GIB, 3 * GIB
            output_size_in_bytes, alias_size_in_bytes = GIB, GIB // 2

        return Memory


TEXT = """\
ENTRY %main (x: f32[8]) -> f32[8] {
  %a = f32[8]{0} fusion(%x), calls=%f, metadata={op_name="jit(train_step)/ResNet/conv1/conv"}, backend_config={"estimated_cycles":"1503000"}
  %b = f32[8]{0} fusion(%x), calls=%f, metadata={op_name="jit(train_step)/jvp(ResNet)/fc/dot"}, backend_config={"estimated_cycles":"4509000"}
  %c = f32[8]{0} custom-call(%x), custom_call_target="ConcatBitcast"
  ROOT %d = f32[262144]{0} all-reduce(%x), to_apply=%add
}
"""  # noqa: E501


@pytest.fixture
def config():
    return imagenet_r50_r18.get_config()


@pytest.fixture
def cost():
    program = Program(TEXT, flops=197e9, bytes_accessed=819e6, optimal_seconds=0.002 - 1)
    return estimate.cost_of(Compiled(program, 1.0), slices.named("v5e:4x4"), of_step=True)


def a_plan(cost, topology="v5e:4x4", batch_size=2048, **changes):
    plan = estimate.Plan(
        topology=slices.named(topology), target="train", batch_size=batch_size, cost=cost, needed_gib=None,
        largest=1000, largest_is="estimated", accumulate=1, steps=1000, steps_per_epoch=10, streamed=True,
        compile_s=5.0,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


def test_time_is_cycles_by_the_clock_and_the_bound_is_corrected(cost):
    assert cost.estimated_s == pytest.approx(0.004)  # 6.012 million cycles at 1.503 GHz
    assert cost.compute_s == pytest.approx(0.001)  # 197 GFLOP at 197 TFLOP/s
    assert cost.memory_s == pytest.approx(0.001)
    assert cost.roofline_s == pytest.approx(0.002)  # a second for the one ConcatBitcast
    assert cost.parts == {"student, forward": 0.75, "teacher": 0.25}
    assert cost.costliest[0] == (0.75, "student, forward", "fc dot")


def test_a_bound_below_zero_is_none():
    """As with all-reduces on the sparse cores of v6e: other calls take seconds off as well."""
    program = Program(TEXT, flops=197e9, bytes_accessed=1638e6, optimal_seconds=0.002 - 20)
    cost = estimate.cost_of(Compiled(program, 1.0), slices.named("v5e:4x4"), of_step=True)
    assert cost.roofline_s == cost.memory_s == pytest.approx(0.002)


def test_memory_counts_results_that_reuse_nothing(cost):
    assert (cost.memory.arguments, cost.memory.temporaries, cost.memory.results) == (2048, 3072, 512)


def test_rates_hours_and_share_of_the_peak(cost):
    plan = a_plan(cost)
    assert plan.images_per_second == pytest.approx(2048 / 0.004)
    assert plan.share_of_peak == pytest.approx(0.25)
    assert plan.hours == pytest.approx(1000 * 0.004 / 3600)
    assert a_plan(cost, accumulate=2).share_of_peak is None  # of the loop one round is counted


@pytest.mark.parametrize(
    ("topology", "links"),
    [("v5e:4x4", 2), ("v5e:16x16", 4), ("v5e:2x2", 2), ("v5p:4x4x4", 6), ("v5p:2x2x1", 2), ("v5e:8x16", 3)],
)
def test_an_exchange_takes_its_bytes_over_the_links(topology, links):
    on = slices.named(topology)
    exchange = hlo.Collective(kind="all-reduce", overlaps=False, count=1, bytes=10**9)
    expected = 2 * (on.chips - 1) / on.chips / (links * on.chip.link_gb_per_s)
    assert estimate.exchange_s(exchange, on) == pytest.approx(expected)
    gather = dataclasses.replace(exchange, kind="all-gather")
    assert estimate.exchange_s(gather, on) == pytest.approx(expected / 2)


def test_a_single_chip_exchanges_nothing():
    exchange = hlo.Collective(kind="all-reduce", overlaps=False, count=1, bytes=10**9)
    assert estimate.exchange_s(exchange, slices.named("v5e-1")) == 0


def test_the_largest_batch_is_what_is_left_over_what_an_image_takes(cost):
    # 5,632 MiB, of which 1,536 do not grow: 4,096 for 128 images, 32 an image; 14,592 MiB are left of 16,128.
    on = slices.named("v5e:4x4")
    assert estimate.largest_estimated(cost, on, per_chip=128, constant_mib=1536) == 456
    too_large = TooLarge(needed_gib=31.5, available_gib=15.75, seconds=1.0)
    assert estimate.largest_estimated(too_large, on, per_chip=128, constant_mib=0) == 64
    assert estimate.largest_estimated(TooLarge(None, None, 1.0), on, per_chip=128, constant_mib=0) is None


def test_what_the_compiler_says_of_a_program_that_does_not_fit():
    said = (
        "RESOURCE_EXHAUSTED: … the total memory required for HLO temporaries (34.00G) exceeds available HBM (15.75G)."
    )
    assert needed(said) == (34.0, 15.75)
    assert needed("Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm.") == (0.5, 15.75)
    assert needed("RESOURCE_EXHAUSTED: something else") == (None, None)


def test_two_images_a_chip_are_told_with_the_batch_and_rate_that_use_them(cost, config):
    config.data.readers = 64
    (first, *_) = advice(a_plan(cost, topology="v5e:16x16", batch_size=512), config)
    assert "2 images a chip leave it idle" in first
    assert "--per-chip=32 makes the batch 8,192" in first  # the largest that the linear rule is shown for
    assert "learning_rate=3.2" in first  # 0.2 · 8192 / 512
    assert "this batch fills 4 with 128 each" in first


def test_a_batch_beyond_what_the_linear_rule_is_shown_for_is_told(cost, config):
    found = advice(a_plan(cost, topology="v5e:16x16", batch_size=32768), config)
    assert any("learning_rate=12.8" in line for line in found)
    assert any("32,768 is beyond 8,192" in line and "64 chips with 128 each" in line for line in found)


def test_readers_that_the_hosts_cannot_share_are_told(cost, config):
    assert config.data.readers == 32
    on_64_hosts = advice(a_plan(cost, topology="v5e:16x16", batch_size=8192), config)
    assert "config.data.readers=32 would be refused" in on_64_hosts[0]
    assert on_64_hosts[0].endswith("--config.data.readers=64")
    assert not any("readers" in line for line in advice(a_plan(cost, topology="v5e:8x16", batch_size=8192), config))


def test_the_configs_own_batch_needs_no_advice(cost, config):
    assert advice(a_plan(cost, topology="v5e:2x2", batch_size=512), config) == []


def test_blocking_exchanges_and_copies_are_told(cost, config):
    many = hlo.Collective(kind="all-reduce", overlaps=False, count=71, bytes=1000)
    changed = dataclasses.replace(
        cost, collectives=(many,), costliest=((0.75, "rest", "copy of the argument examples['image']"),)
    )
    found = advice(a_plan(changed, topology="v5e:2x2", batch_size=512), config)
    assert any("75% of the time is a copy of the argument" in line for line in found)
    assert any("in 71 exchanges" in line and "batch_norm_groups=4" in line for line in found)


def test_a_program_that_does_not_fit_is_one_line_with_the_ways_out(config):
    plan = a_plan(None, needed_gib=31.5, largest=64)
    (line,) = advice(plan, config)
    message = page.too_large(plan, advice=[line])
    assert "does not fit v5e:4x4 with 128 images a chip: it needs 31.50 GiB" in message
    assert "--per-chip=64 should fit" in message
    assert "--config.accumulate=2" in message
    assert "\n" not in message


def test_the_page_shows_every_figure(cost):
    text = page.page(a_plan(cost), title="run, dgkd", compiler="libtpu 1", advice=["do this"], price=2.0)
    for expected in (
        "run, dgkd: the training step on v5e:4x4, 16 chips on 4 hosts",
        "128 images a chip, batch 2,048; compiled by libtpu 1 in 5 s",
        "2,048 MiB arguments + 3,072 MiB temporaries + 512 MiB results = 5.50 of 15.75 GiB: fits",
        "4 ms estimated; at least 2 ms; work alone 1 ms, memory alone 1 ms",
        "32,000 images/s a chip, 512,000 in all; 25% of the peak",
        "1,000 steps, 10 an epoch: 0.00111 hours, 0.0178 chip-hours, 0.04 at 2 a chip-hour",
        "128,000 a second from each host, 1,143 from each of its 112 virtual CPUs",
        "where the time goes: student, forward 75%; teacher 25%",
        "1  all-reduce              1.00 MiB  nothing else meanwhile",
        " 75.0%  student, forward  fc dot",
        "without an estimate: 1 all-reduce",
        "  - do this",
        "This is the compiler's estimate; nothing was run.",
    ):
        assert expected in text


def test_several_slices_are_a_table_and_one_that_does_not_fit_has_no_times(cost):
    plans = [a_plan(cost), a_plan(None, topology="v6e:2x2", batch_size=512, needed_gib=40.0)]
    lines = page.table(plans, title="run, dgkd", price=None).splitlines()
    rows = {line[:26].strip(): line[26:].split() for line in lines[2:]}
    assert rows["images a chip"] == ["128", "128"]
    assert rows["estimated time, ms"] == ["4", "–"]
    assert rows["share of the peak"] == ["25%", "–"]
    assert "40.0 > 31.25" in page.table(plans, title="", price=None)


def test_json_holds_all_of_it(cost):
    found = json.loads(json.dumps(page.as_json(a_plan(cost), advice=["do this"], price=2.0)))
    assert found["topology"]["name"] == "v5e:4x4"
    assert found["fits"] is True
    assert found["chip_hours"] == pytest.approx(16 * found["hours"])
    assert found["price"] == pytest.approx(2 * found["chip_hours"])
    assert found["cost"]["collectives"][0]["kind"] == "all-reduce"
