"""What the compiler's text says: cycles of what is run, loops by their length, exchanges by their kind."""

import pytest

from dgkd_jax.plan import hlo

# In the form of libtpu 0.0.42.1, shortened.
TEXT = """\
HloModule jit_train_step, is_scheduled=true

%fused (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0:T(128)} parameter(0)
  ROOT %inner = f32[8]{0:T(128)} add(%param_0, %param_0), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %unnamed = f32[8]{0:T(128)} fusion(%state), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"10"}}
  %sum.1 = f32[8]{0:T(128)} all-reduce(%unnamed), channel_id=1, to_apply=%add, metadata={op_name="jit(train_step)/while/body/reduce_sum"}
}

%condition (state.1: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(128)
  %state.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  ROOT %less = pred[]{:T(512)} compare(%state.1, %limit), direction=LT
}

%other_condition (state.2: (s32[], f32[8])) -> pred[] {
  ROOT %unlike = pred[]{:T(512)} custom-call(%state.2), custom_call_target="Ask"
}

%wrapped (param_1: bf16[4]) -> bf16[16] {
  %param_1 = bf16[4]{0} parameter(0)
  ROOT %gathered = bf16[16]{0} all-gather(%param_1), dimensions={0}
}

ENTRY %main.0_spmd (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0), metadata={op_name="examples[\\'image\\']"}
  %copy.1 = f32[8]{0:T(128)} copy(%x), metadata={op_name="examples[\\'image\\']"}, backend_config={"window_config":{"estimated_cycles":"7"}}
  %conv.1 = bf16[8]{0:T(128)} fusion(%copy.1), kind=kOutput, calls=%fused, metadata={op_name="jit(train_step)/transpose(jvp(ResNet))/layer1_0/conv2/conv_general_dilated" stack_frame_id=4}, backend_config={"window_config":{"estimated_cycles":"100"}}
  %conv.2 = bf16[8]{0:T(128)} fusion(%copy.1), kind=kOutput, calls=%fused, metadata={op_name="jit(train_step)/transpose(jvp(ResNet))/layer1_0/conv2/conv_general_dilated" stack_frame_id=5}, backend_config={"window_config":{"estimated_cycles":"50"}}
  %loop.1 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%x), condition=%condition, body=%body, metadata={op_name="jit(train_step)/vmap()/gather"}
  %loop.2 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%x), condition=%other_condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %loop.3 = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%x), condition=%other_condition, body=%body
  %start = (f32[2,4]{1,0}, bf16[3]{0}) all-reduce-start(%x, %x), channel_id=2, to_apply=%add
  %done = (f32[2,4]{1,0}, bf16[3]{0}) all-reduce-done(%start)
  %async = ((bf16[4]{0}), bf16[16]{0}) async-start(%x), calls=%wrapped
  %pool = f32[8]{0:T(128)} select-and-scatter(%x, %x), select=%ge, scatter=%add, metadata={op_name="jit(train_step)/transpose(jvp(ResNet))/maxpool"}
  %join = bf16[8]{0} custom-call(%x), custom_call_target="ConcatBitcast"
  ROOT %sum.2 = f32[8]{0:T(128)} all-reduce(%x), channel_id=3, to_apply=%add
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def found():
    return hlo.read(TEXT)


def test_the_cycles_are_of_what_is_run_each_loop_as_often_as_it_runs(found):
    # Within a fusion nothing counts. The loops run 128 times by their condition, 3 times as said, and unknown.
    assert found.cycles == 7 + 100 + 50 + 10 * (128 + 3 + 1)
    assert found.unknown_loops == 1


def test_operations_of_one_name_are_one_and_a_loop_names_what_has_no_name(found):
    conv = "jit(train_step)/transpose(jvp(ResNet))/layer1_0/conv2/conv_general_dilated"
    assert found.by_name[conv] == 150
    assert found.by_name["jit(train_step)/vmap()/gather"] == 1280
    assert found.by_name["examples['image']"] == 7


def test_exchanges_have_kind_number_bytes_and_whether_they_overlap(found):
    blocking = hlo.Collective(kind="all-reduce", overlaps=False, count=128 + 3 + 1 + 1, bytes=133 * 8 * 4)
    started = hlo.Collective(kind="all-reduce", overlaps=True, count=1, bytes=8 * 4 + 3 * 2)
    gathered = hlo.Collective(kind="all-gather", overlaps=True, count=1, bytes=16 * 2)
    assert set(found.collectives) == {blocking, started, gathered}
    assert found.collectives[0] == blocking


def test_what_has_no_estimate_is_told(found):
    assert found.without_estimate == {"all-reduce": 134, "all-gather": 1, "select-and-scatter": 1}
    assert found.custom_calls["ConcatBitcast"] == 1


@pytest.mark.parametrize(
    ("name", "part", "layer"),
    [
        (
            "jit(train_step)/ResNet/layer1_0/conv1/conv_general_dilated",
            "teacher",
            "layer1_0/conv1 conv_general_dilated",
        ),
        ("jit(train_step)/jvp(ResNet)/bn1/reduce_sum", "student, forward", "bn1 reduce_sum"),
        ("jit(train_step)/transpose(jvp(ResNet))/fc/dot_general", "student, backward", "fc dot_general"),
        ("jit(train_step)/jvp()/log_softmax/exp", "rest", "log_softmax exp"),
        ("jit(train_step)/add", "rest", "add"),
        ("examples['image']", "rest", "copy of the argument examples['image']"),
        ("", "rest", "(unnamed)"),
    ],
)
def test_an_operation_has_a_part_and_a_layer(name, part, layer):
    assert (hlo.part_of(name), hlo.layer_of(name)) == (part, layer)
