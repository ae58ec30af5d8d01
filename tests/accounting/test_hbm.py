"""The traffic read from programs is that counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from resist_jax.accounting import hbm

HEAD = 'HloModule a, num_partitions=1\n\n'
# A fusion that picks 8 of 1,000 rows of 16 numbers, and one that replaces 4.
FUSIONS = """%picks (p: f32[1000,16], i: s32[8,1]) -> f32[8,16] {
  %p = f32[1000,16]{1,0} parameter(0)
  %b = f32[1000,16]{1,0} bitcast(%p)
  %i = s32[8,1]{1,0} parameter(1)
  ROOT %g = f32[8,16]{1,0} gather(%b, %i), offset_dims={1}
}

%replaces (q: f32[1000,16], u: f32[4,16]) -> f32[1000,16] {
  %q = f32[1000,16]{1,0} parameter(0)
  %u = f32[4,16]{1,0} parameter(1)
  %n = s32[] constant(3)
  ROOT %d = f32[1000,16]{1,0} dynamic-update-slice(%q, %u, %n, %n)
}

%outer (o: f32[1000,16], oi: s32[8,1]) -> f32[8,16] {
  %o = f32[1000,16]{1,0} parameter(0)
  %oi = s32[8,1]{1,0} parameter(1)
  %of = f32[8,16]{1,0} fusion(%o, %oi), kind=kLoop, calls=%picks
  ROOT %on = f32[8,16]{1,0} negate(%of)
}

%two (x: f32[64], y: f32[64]) -> (f32[64], f32[32]) {
  %x = f32[64]{0} parameter(0)
  %y = f32[64]{0} parameter(1)
  %s = f32[64]{0} add(%x, %y)
  %h = f32[32]{0} slice(%y), slice={[0:32]}
  ROOT %t = (f32[64]{0}, f32[32]{0}) tuple(%s, %h)
}
"""
CASES = {
  'an instruction': ('%r = f32[64]{0} add(%x, %x2)', 3 * 256),
  'names only': ('%r = (f32[64]{0}) tuple(%x)', 0),
  'picked rows': (
    '%r = f32[8,16]{1,0} fusion(%m, %i), kind=kLoop, calls=%picks',
    2 * 8 * 64 + 32,
  ),
  'rows that a fusion inside picks': (
    '%r = f32[8,16]{1,0} fusion(%m, %i), kind=kLoop, calls=%outer',
    2 * 8 * 64 + 32,
  ),
  'rows in place': (
    '%r = f32[1000,16]{1,0} fusion(%m, %u), kind=kLoop, calls=%replaces',
    2 * 4 * 64,
  ),
  # The second operand is read once, for two results.
  'two results': (
    '%r = (f32[64]{0}, f32[32]{0}) fusion(%x, %x2), kind=kLoop, calls=%two',
    3 * 256 + 128,
  ),
  # A library's workspace is no result.
  'a library': (
    '%r = (f32[64]{0}, u8[4096]{0}) custom-call(%x, %x2), '
    'custom_call_target="__cudnn$convForward"',
    3 * 256,
  ),
  'another library': (
    '%r = (f32[64]{0}, s8[4096]{0}) custom-call(%x, %x2), '
    'custom_call_target="__cublas$lt$matmul"',
    3 * 256,
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_bytes_are_those_counted_by_hand(name):
  line, want = CASES[name]
  text = f"""{HEAD}{FUSIONS}
ENTRY %main (x: f32[64], x2: f32[64], m: f32[1000,16], i: s32[8,1], u: f32[4,16]) -> f32[64] {{
  %x = f32[64]{{0}} parameter(0)
  %x2 = f32[64]{{0}} parameter(1)
  %m = f32[1000,16]{{1,0}} parameter(2)
  %i = s32[8,1]{{1,0}} parameter(3)
  %u = f32[4,16]{{1,0}} parameter(4)
  ROOT {line}
}}
"""  # noqa: E501
  assert hbm.memory_traffic(text) == want


# As a TPU's compiler writes it: S(1) is on the chip.
ON_CHIP = """%sums (p: f32[64], q: f32[64]) -> (f32[64], f32[16]) {
  %p = f32[64]{0:T(128)} parameter(0)
  %q = f32[64]{0:T(128)} parameter(1)
  %a = f32[64]{0:T(128)} add(%p, %q)
  %b = f32[16]{0:T(128)} slice(%p), slice={[0:16]}
  ROOT %t = (f32[64]{0:T(128)}, f32[16]{0:T(128)}) tuple(%a, %b)
}

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0:T(128)} parameter(0)
  %s = ((f32[64]{0:T(128)}), f32[32]{0:T(128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:32]}
  %d = f32[32]{0:T(128)S(1)} slice-done(%s)
  %w = f32[64]{0:T(128)S(1)} custom-call(%d, %d), custom_call_target="ConcatBitcast"
  %f = (f32[64]{0:T(128)S(1)}, f32[16]{0:T(128)}) fusion(%w, %x), kind=kLoop, calls=%sums, backend_config={"estimated_cycles":"500"}
  %g = f32[64]{0:T(128)S(1)} get-tuple-element(%f), index=0
  %h = f32[64]{0:T(128)S(1)} negate(%g), backend_config={"estimated_cycles":"70"}
  %c = (f32[64]{0:T(128)}, f32[64]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%h)
  ROOT %e = f32[64]{0:T(128)} copy-done(%c)
}
"""  # noqa: E501


def test_what_a_tpu_keeps_on_its_chip_is_no_traffic():
  # A slice of 32 numbers is read; then x, whole, and 16 numbers are written;
  # then the result.
  want = 4 * (32 + 64 + 16 + 64)
  assert hbm.memory_traffic(HEAD + ON_CHIP) == want


def test_the_estimates_of_instructions_add_up():
  assert hbm.estimated_cycles(HEAD + ON_CHIP) == 570
  x = jnp.ones(8)
  text = jax.jit(jnp.sin).lower(x).compile().as_text()
  assert hbm.estimated_cycles(text) is None


def test_the_body_of_a_loop_counts_once():
  def looped(x):
    return jax.lax.fori_loop(0, 10, lambda i, x: jnp.sin(x) + 1, x)

  x = jnp.zeros(1 << 16)
  texts = [
    jax.jit(f).lower(x).compile().as_text()
    for f in (looped, lambda x: jnp.sin(x) + 1)
  ]
  loop, once = map(hbm.memory_traffic, texts)
  assert once >= 2 * x.nbytes
  # Around the body, the loop copies its argument once at most.
  assert once <= loop <= once + 2 * x.nbytes + 100
