"""The bytes read from compiled programs are those counted by hand."""

from functools import partial
import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import pytest

from resist_jax.accounting import hlo
from resist_jax.exchange import collectives
from resist_jax.rounds import make_mesh

ON_WORKERS = PartitionSpec(collectives.WORKER)
RING = [(d, (d + 1) % 4) for d in range(4)]
X = jnp.zeros((4, 8), jnp.float32)  # 32 bytes on each of four devices.
psum = partial(lax.psum, axis_name=collectives.WORKER)


@pytest.fixture(autouse=True, scope='module')
def _names_tell_programs_apart():
  # Else the cache takes programs for the same that differ in scopes alone.
  option = 'jax_compilation_cache_include_metadata_in_key'
  before = getattr(jax.config, option)
  jax.config.update(option, True)
  yield
  jax.config.update(option, before)


def compiled(function, *sharded, index=None, mesh=None):
  """Returns the HLO of `function(index, *sharded)`, or without an index."""
  specs, mesh = (ON_WORKERS,) * len(sharded), mesh or make_mesh(4)
  if index is not None:
    specs, sharded = (PartitionSpec(), *specs), (jnp.int32(index), *sharded)
  run = jax.shard_map(
    function, mesh=mesh, in_specs=specs, out_specs=ON_WORKERS, check_vma=False
  )
  return jax.jit(run).lower(*sharded).compile().as_text()


def sent(function, *sharded, **options):
  return hlo.wire_bytes(compiled(function, *sharded, **options), {})


def move(pairs):
  return partial(lax.ppermute, axis_name=collectives.WORKER, perm=pairs)


def on_rows(function):
  return lambda x: function(x[0], collectives.WORKER, tiled=True)[None]


gather = on_rows(lax.all_gather)


def switch(scope, branches):
  def run(index, x):
    with jax.named_scope(scope):
      return lax.switch(index, branches, x)

  return run


def loop(steps, run):
  def scanned(*arguments):
    *index, x = arguments
    return lax.scan(lambda c, _: (run(*index, c), None), x, length=steps)[0]

  return scanned


def module(body):
  """Returns HLO text whose entry computation has this body after `%x`."""
  return f"""HloModule m, replica_count=2, num_partitions=2
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}
%one (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %c = f32[8]{{0}} collective-permute(%p), source_target_pairs={{{{0,1}}}}
}}
%two (p: f32[16]) -> f32[16] {{
  %p = f32[16]{{0}} parameter(0)
  ROOT %c = f32[16]{{0}} collective-permute(%p), source_target_pairs={{{{0,1}}}}
}}
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0), metadata={{op_name="x"}}
{body}
}}
"""


@pytest.mark.parametrize('n', [1, 2, 4])
def test_a_psum_sends_as_a_ring(n):
  text = compiled(psum, X[:n], mesh=make_mesh(n))
  assert hlo.wire_bytes(text, {}) == 2 * (n - 1) * 32


def test_a_psum_of_a_tree_sends_every_leaf_in_its_type():
  sizes = {'float32': 4, 'int16': 2, 'int8': 1, 'uint32': 4, 'complex64': 8}
  # XLA combines the two leaves of float32.
  tree = [X.astype(dtype) for dtype in sizes] + [X[:, :3]]
  assert sent(psum, tree) == 2 * 3 * (8 * sum(sizes.values()) + 3 * 4)


@pytest.mark.parametrize(
  ('dtype', 'size'),
  [('int8', 1), ('int16', 2), ('uint16', 2), ('float16', 2), ('bfloat16', 4)],
)
def test_only_bfloat16_travels_in_a_wider_type_on_cpu(dtype, size):
  x = X.astype(dtype)
  assert sent(psum, x) == 2 * 3 * 8 * size
  assert sent(move(RING), x) == 4 * 8 * size
  assert sent(gather, x) == 3 * 4 * 8 * size


@pytest.mark.parametrize(
  ('pairs', 'wires'),
  [(RING, 4), (RING[::2], 2), ([(0, 2), (1, 1), (2, 0)], 2), ([(2, 2)], 0)],
)
def test_a_ppermute_sends_once_for_every_pair(pairs, wires):
  assert sent(move(pairs), X) == wires * 32


def test_the_other_collectives():
  assert sent(gather, X) == 3 * 32 * 4
  assert sent(on_rows(lax.psum_scatter), X) == 3 * 32
  exchanged = partial(lax.all_to_all, split_axis=0, concat_axis=0)
  assert sent(on_rows(exchanged), X) == 3 * 8 * 4


def test_groups():
  pairs = [[0, 2], [1, 3]]
  assert sent(partial(psum, axis_index_groups=pairs), X) == 2 * (2 * 32)

  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 2), (collectives.WORKER, 'core'), auto)
  for axes, wires in [('worker', 4), ('core', 4), (('core', 'worker'), 6)]:
    run = partial(lax.psum, axis_name=axes)
    assert sent(run, X[:2], mesh=mesh) == wires * 32


@pytest.mark.parametrize('num_branches', [2, 3, 4])
def test_a_switch_sends_what_its_branch_sends(num_branches):
  run = switch('move_x', [move(RING[:k]) for k in range(num_branches)])
  text = compiled(run, X, index=0)
  for k in range(num_branches):
    assert hlo.wire_bytes(text, {'move_x': k, 'other': 0}) == k * 32
  last = num_branches - 1
  assert hlo.wire_bytes(text, {'move_x': 7}) == last * 32
  assert hlo.wire_bytes(text, {'move_x': -1}) == 0
  # The innermost scope counts, whatever the order; a part of a name is none.
  assert hlo.wire_bytes(text, {'shard_map': 0, 'move_x': 1}) == 32
  assert hlo.wire_bytes(text, {'move_x': 1, 'shard_map': 0}) == 32
  for branches in ({}, {'move': 1}, {'move_x_2': 1}):
    with pytest.raises(ValueError, match=r'Unknown branch.*/move_x/cond$'):
      hlo.wire_bytes(text, branches)
  # In a loop it takes the same branch every time.
  text = compiled(loop(6, run), X, index=0)
  assert hlo.wire_bytes(text, {'move_x': last}) == 6 * last * 32


def test_a_chain_may_be_called_as_the_end_of_another_one():
  run = switch('decoder/blocks/move_0', [move(RING[:k]) for k in range(3)])
  text = compiled(run, X, index=0)
  names = 'blocks/move_0', 'decoder/blocks/move_0'
  assert hlo.wire_bytes(text, dict(zip(names, (1, 2), strict=True))) == 64


def test_a_cond_on_a_predicate_counts_false_as_zero():
  def run(index, x):
    with jax.named_scope('move_x'):
      return lax.cond(index > 0, move(RING), move(RING[:1]), x)

  text = compiled(run, X, index=0)
  assert hlo.wire_bytes(text, {'move_x': 0}) == 32
  assert hlo.wire_bytes(text, {'move_x': 1}) == 4 * 32


def test_each_switch_has_its_own_index():
  moves = [move(RING[:k]) for k in range(3)]
  inner = switch('inner', moves)

  def run(index, x):
    x = switch('first', moves)(index, x)
    branches = [lambda x: x, partial(inner, index + 1)]
    return psum(switch('outer', branches)(index, x))

  text = compiled(run, X, index=0)
  branches = {'first': 2, 'outer': 1, 'inner': 1}
  assert hlo.wire_bytes(text, branches) == 2 * 32 + 32 + 6 * 32
  # A branch not taken needs no index; one taken does not get the outer one.
  assert hlo.wire_bytes(text, {'first': 2, 'outer': 0}) == 2 * 32 + 6 * 32
  with pytest.raises(ValueError, match='/inner/cond'):
    hlo.wire_bytes(text, {'first': 2, 'outer': 1})
  # Where all branches send alike, none is needed.
  alike = [move(RING), move([(d, s) for s, d in RING])]
  assert sent(switch('move_x', alike), X, index=0) == 4 * 32


def without_trip_counts(text):
  bare = re.sub(r',"known_trip_count":\{"n":"\d+"\}', '', text)
  assert bare != text
  return bare


def test_a_scan_sends_in_every_step():
  assert sent(loop(5, psum), X) == 5 * 6 * 32
  assert sent(loop(1, psum), X) == 6 * 32
  text = compiled(loop(3, loop(4, psum)), X)
  assert hlo.wire_bytes(text, {}) == 12 * 6 * 32
  assert hlo.wire_bytes(without_trip_counts(text), {}) == 12 * 6 * 32


@pytest.mark.parametrize(('start', 'step'), [(1, 1), (0, 2)])
def test_only_a_plain_counter_tells_the_trip_count(start, step):
  def run(x):
    def body(state):
      return state[0] + step, psum(state[1])

    return lax.while_loop(lambda s: s[0] < 7, body, (jnp.int32(start), x))[1]

  text = compiled(run, X)
  assert hlo.wire_bytes(text, {}) == len(range(start, 7, step)) * 6 * 32
  with pytest.raises(ValueError, match=r'Unknown trip count of loop while'):
    hlo.wire_bytes(without_trip_counts(text), {})


def test_a_loop_of_unknown_length_may_not_send():
  def run(function, limit, x):
    return lax.fori_loop(0, limit, lambda _, x: function(x), x)

  with pytest.raises(ValueError, match=r'Unknown trip count .*/while$'):
    sent(partial(run, psum), X, index=3)
  assert sent(partial(run, lambda x: x * 2), X, index=3) == 0


def test_collectives_lists_each_once():
  def run(index, x):
    x = loop(5, switch('move_x', [move(RING), psum]))(index, x)
    return x, psum(x.astype(jnp.int8))

  found = hlo.collectives(compiled(run, X, index=0))
  assert sorted(c[:3] for c in found) == [
    *[('all-reduce', 'f32', 32), ('all-reduce', 's8', 8)],
    ('collective-permute', 'f32', 32),
  ]
  assert all(c.op_name.endswith(('/psum', '/ppermute')) for c in found)
  assert not hlo.collectives(compiled(lambda x: x @ x.T, X))


@pytest.mark.parametrize(
  ('groups', 'sizes'),
  [
    ('{{0,1},{2,3}}', [2, 2]),
    ('{{0,2,3},{1}}', [3, 1]),
    ('{}', [4]),  # All replicas of all partitions.
    ('[2,2]<=[4]', [2, 2]),
    ('[1,4]<=[2,2]T(1,0)', [4]),
    ("mesh['a'=2,'b'=2] {'b','a'}", [4]),
    ("mesh['a'=4] {'a':(1)2}", [2, 2]),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [2, 2]),
  ],
)
def test_every_notation_of_replica_groups(groups, sizes):
  text = module(
    f'  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, '
    f'replica_groups={groups}, use_global_device_ids=true, to_apply=%add'
  )
  assert hlo.wire_bytes(text, {}) == sum(2 * (g - 1) * 32 for g in sizes)


@pytest.mark.parametrize(
  ('line', 'total'),
  [
    ('((f32[8]), f32[32]) all-gather-start(%x), dimensions={0}', 3 * 32 * 4),
    ('f32[8] all-reduce-start(%x), to_apply=%add', 2 * 3 * 32),
    ('((f32[8]), f32[2]) reduce-scatter-start(%x), to_apply=%add', 3 * 32),
    ('f32[8] collective-broadcast(%x), replica_groups={{0,1}}', 32),
    ('f32[8] all-to-all(%x), dimensions={0}', 3 * 32),
    ('(f32[8], f32[8], u32[], u32[]) collective-permute-start(%x), '
     'source_target_pairs={{0,1},{2,2}}', 32),
    # Older texts repeat the types of operands, longer ones number them.
    ('(f32[8]{0:T(8,128)}, /*index=1*/f32[8]{0}) all-reduce('
     'f32[8]{0:T(8,128)} %x, /*index=1*/f32[8]{0} %x)', 2 * 3 * 64),
  ],
)  # fmt: skip
def test_lines_that_cpu_does_not_print(line, total):
  opcode = re.search(r' ([a-z\-]+)\(', line)[1]
  done = opcode.replace('-start', '-done')
  end = f'\n  ROOT %done = f32[8]{{0}} {done}(%it), calls=%add'
  text = module(f'  %it = {line}' + end * (done != opcode))
  assert hlo.wire_bytes(text, {}) == total
  (found,) = hlo.collectives(text)[2:]
  assert found.kind == opcode.removesuffix('-start')


@pytest.mark.parametrize(
  ('dtype', 'size'),
  [('pred', 9), ('s4', 5), ('u4', 5), ('bf16', 18), ('u16', 18), ('f64', 72)]
  + [('f8e4m3fn', 9), ('f8e5m2', 9), ('c64', 72), ('c128', 144), ('s32', 36)],
)
def test_element_types(dtype, size):
  text = module(
    f'  %y = {dtype}[3,3]{{1,0}} convert(%x)\n'
    f'  ROOT %r = {dtype}[3,3]{{1,0}} collective-permute(%y), '
    'source_target_pairs={{0,1},{1,0}}, metadata={op_name="f/ppermute"}'
  )
  assert hlo.wire_bytes(text, {}) == 2 * size
  expected = hlo.Collective('collective-permute', dtype, size, 'f/ppermute')
  assert hlo.collectives(text)[2:] == [expected]


def test_a_predicate_chooses_the_true_computation():
  text = module(
    '  %p = pred[] constant(true)\n'
    '  ROOT %r = f32[8]{0} conditional(%p, %x, %x), true_computation=%one, '
    'false_computation=%two, metadata={op_name="jit(f)/move_x/cond"}'
  )
  assert hlo.wire_bytes(text, {'move_x': 0}) == 64
  assert hlo.wire_bytes(text, {'move_x': 1}) == 32


@pytest.mark.parametrize(
  'line',
  ['call(%x), to_apply=%two', 'async-start(%x), calls=%two']
  + ['fusion(%x), kind=kCustom, calls=%two']
  + ['custom-call(%x), custom_call_target="f", called_computations={%two}'],
)
def test_a_called_computation_counts_for_every_call(line):
  start = f'  %s = ((f32[8]{{0}}), f32[8]{{0}}, u32[]) {line}\n'
  end = '  ROOT %d = f32[8]{0} async-done(%s), calls=%two'
  assert hlo.wire_bytes(module(start + end), {}) == 64
  twice = start + start.replace('%s', '%t') + end
  assert hlo.wire_bytes(module(twice), {}) == 128
  # The text holds %one and %two once.
  assert len(hlo.collectives(module(twice))) == 2


def test_a_loop_tests_its_condition_once_more():
  text = module(
    '  ROOT %w = f32[8]{0} while(%x), condition=%one, body=%two, '
    'backend_config={"known_trip_count":{"n":"5"}}'
  )
  assert hlo.wire_bytes(text, {}) == 5 * 64 + 6 * 32


def test_a_collective_in_a_branch_is_found():
  alone = loop(3, switch('move_x', [lambda x: x, psum]))
  text = compiled(alone, X, index=0)
  (found,) = hlo.collectives_in_branches(text, ['move'])
  assert (found.kind, found.bytes) == ('all-reduce', 32)
  assert not hlo.collectives_in_branches(text, ['other', 'move_x'])
  assert not hlo.collectives_in_branches(compiled(loop(3, psum), X), [])


def test_donated_arguments_are_counted():
  def step(donated):
    run = jax.jit(lambda x, y: (x + 1, y + 1), donate_argnums=donated)
    return run.lower(X, X).compile().as_text()

  for donated in ((), (0,), (0, 1)):
    assert hlo.num_donated(step(donated)) == len(donated)


def between_slices(target, transfer):
  """A program of two slices of four devices, as the TPU compiler prints it."""
  return module(
    '  %c = (f32[8], f32[8], u32[]) collective-permute-start(%x), '
    'source_target_pairs={{0,1},{1,2}}\n'
    '  %after = token[] after-all()\n'
    '  %s = (f32[8], u32[], token[]) send(%x, %after), channel_id=2, '
    'is_host_transfer=true, frontend_attributes={'
    '_xla_host_transfer_handler_name="xla_megascale_runtime",'
    f'_xla_megascale_target={target},'
    f'_xla_megascale_transfer_type="{transfer}"'
    '}\n'
    '  %r = (f32[8], u32[], token[]) recv(%after), channel_id=2\n'
    '  %sent = token[] send-done(%s), channel_id=2\n'
    '  ROOT %done = f32[8] collective-permute-done(%c)'
  )


@pytest.mark.parametrize(
  ('target', 'transfer', 'copies'),
  [
    ('{{100003->200000},{200003->100000}}', 'ONE_TO_ONE', 2),
    ('"{1,2}x{0:3}"', 'ALL_REDUCE', 4 * 2),
    ('"{1,2,3}x{0:3}"', 'ALL_REDUCE', 4 * 2 * 2),
    ('"{1,2}x{0:3}"', 'ALL_GATHER', 4 * 2),
    ('{{100000,100001,200000,200001}}', 'ALL_TO_ALL', 3),
    ('{{100000,200000},{100001,200001}}', 'ALL_REDUCE', 2 * 2),
  ],
)
def test_what_slices_send_to_each_other(target, transfer, copies):
  text = between_slices(target, transfer)
  slices = 3 if '3}x' in target else 2
  # Every slice runs the permute of two pairs.
  assert hlo.wire_bytes(text, {}) == (2 * slices + copies) * 32
  with pytest.raises(ValueError, match='groups are unknown'):
    hlo.wire_bytes(text, {}, group_size=2)


def test_what_cannot_be_read_is_an_error():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.wire_bytes('module @jit_f {}', {})
  for opcode in ('ragged-all-to-all', 'send'):
    line = f'  ROOT %r = f32[8] {opcode}(%x), metadata={{op_name="f/y"}}'
    with pytest.raises(ValueError, match='Cannot count r: f/y'):
      hlo.wire_bytes(module(line), {})
