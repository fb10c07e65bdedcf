"""How many kernels a compiled step starts: on a text of every form, and on what XLA really compiles."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxsvd.bench import launches

HLO = """HloModule jit_decode, is_scheduled=true, entry_computation_layout={(f32[8]{0})->(s32[], f32[8]{0})}

%fused_computation (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  %multiply.1 = f32[8]{0} multiply(%param_0, %param_0)
  ROOT %add.1 = f32[8]{0} add(%multiply.1, %param_0)
}

%graph (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused_computation
  ROOT %custom-call.1 = f32[8]{0} custom-call(%fusion.1), custom_call_target="__cublas$gemm"
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %get-tuple-element.1 = s32[] get-tuple-element(%carry), index=0
  %get-tuple-element.2 = f32[8]{0} get-tuple-element(%carry), index=1
  %constant.1 = s32[] constant(1)
  %add.2 = s32[] add(%get-tuple-element.1, %constant.1)
  %call.1 = f32[8]{0} call(%get-tuple-element.2), to_apply=%graph, metadata={op_name="fusion("}
  %copy-start.1 = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%call.1)
  %copy-done.1 = f32[8]{0} copy-done(%copy-start.1)
  ROOT %tuple.1 = (s32[], /*index=1*/f32[8]{0}) tuple(%add.2, %copy-done.1)
}

%condition (carry: (s32[], f32[8])) -> pred[] {
  %carry.1 = (s32[], f32[8]{0}) parameter(0)
  %get-tuple-element.3 = s32[] get-tuple-element(%carry.1), index=0
  %constant.2 = s32[] constant(8)
  ROOT %compare.1 = pred[] compare(%get-tuple-element.3, %constant.2), direction=LT
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %constant.3 = s32[] constant(0)
  %sort.1 = f32[8]{0} sort(%x), dimensions={0}, to_apply=%condition
  %bitcast.1 = f32[8]{0} bitcast(%sort.1)
  %tuple.2 = (s32[], f32[8]{0}) tuple(%constant.3, %bitcast.1)
  ROOT %while.1 = (s32[], f32[8]{0}) while(%tuple.2), condition=%condition, body=%body, TRIPS
}
"""
TRIPS = 'backend_config={"known_trip_count":{"n":"8"}}'


def test_what_is_counted():
    # Once a sort, and in each of eight turns: an add, a fusion, a custom call and a copy.
    assert launches.count(HLO.replace("TRIPS", TRIPS)) == 1 + 8 * 4


def test_a_loop_of_unknown_length_has_no_count():
    assert launches.count(HLO.replace(", TRIPS", "")) is None


def test_a_branch_has_no_count():
    text = HLO.replace("TRIPS", TRIPS).replace("sort(%x)", "conditional(%x)")
    assert launches.count(text) is None


@pytest.mark.parametrize("text", ["", "HloModule empty", "no HLO at all {"])
def test_other_text_has_no_count(text):
    assert launches.count(text) is None


def compiled(turns):
    def run(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=turns)[0]

    return jax.jit(run).lower(jnp.ones((4, 8)), jnp.ones((8, 8))).compile().as_text()


def test_every_turn_of_a_real_loop_counts():
    few, some, many = (launches.count(compiled(turns)) for turns in (4, 8, 16))
    assert many - some == 2 * (some - few) >= 2 * 4 * 2  # a product and a tanh a turn at least
