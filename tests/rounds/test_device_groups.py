"""Unequal workers: each computes its own blocks, and nothing else changes."""

import functools
import itertools
import re

from covering import rest_is_slow
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_programs import COLLECTIVE, programs
from test_rounds import L, assert_close, problem, resist
import tiny

from resist_jax import accounting, rounds
from resist_jax.rounds import device_groups
from resist_jax.rounds.local_training import LocalTraining
from resist_jax.rounds.mesh import REPLICATED, SHARDED
from resist_jax.rounds.state import replicate

DEPTHS = (3, 2, 1, 2)  # Three replicas, which a hand-over sends.


def unequal(depths=DEPTHS, **kwargs):
  return resist(len(depths), depths=depths, **kwargs)


@pytest.mark.parametrize(
  ('exchange', 'D'),
  rest_is_slow(
    list(itertools.product(['masked_psum', 'hand_over'], [4, 2, 1])),
    quick=[('hand_over', 2)],
  ),
)
def test_a_round_of_unequal_workers_equals_algorithm_1(exchange, D):
  loss_fn, params = problem()
  protocol = unequal(exchange=exchange, carry=True)
  got, metrics = tiny.train_compiled(loss_fn, params, protocol, D, 2)
  assert_close(got, tiny.algorithm_1(loss_fn, params, protocol, 2))
  assert metrics['loss'].shape == (4,)
  assert np.asarray(metrics['finite']).all()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('depths', 'D'),
  rest_is_slow(
    [((3, 3, 1, 1), 2), ((4, 1, 1, 4), 2), ((3, 2, 1, 1), 4)],
    quick=[((4, 1, 1, 4), 2)],
  ),
)
def test_the_loop_over_workers_equals_algorithm_1(depths, D):
  loss_fn, params = problem()
  protocol = unequal(depths, exchange='hand_over')
  got, _ = tiny.train_compiled(loss_fn, params, protocol, D, 2, on_device=True)
  assert_close(got, tiny.algorithm_1(loss_fn, params, protocol, 2))


@pytest.mark.parametrize('depths', [(2, 2, 2, 2), ()])
def test_equal_workers_share_one_program(depths):
  protocol = tiny.protocol(4, 2, {tiny.CHAIN: L}, depths=depths)
  mesh = rounds.make_mesh(4)
  assert device_groups.make_device_groups(protocol, mesh) == {'step': None}


def test_devices_that_are_alike_share_a_program():
  mesh = rounds.make_mesh(4)
  made = device_groups.make_device_groups(unequal(), mesh)
  assert [(group.rows, group.depths) for group in made.values()] == [
    ((0,), (3,)), ((1, 3), (2,)), ((2,), (1,)),
  ]  # fmt: skip
  two = device_groups.make_device_groups(unequal(), rounds.make_mesh(2))
  assert [group.depths for group in two.values()] == [(3, 2), (1, 2)]


@pytest.mark.parametrize('D', [1, 2, 4])
def test_whole_undoes_part_and_copies_nothing(D):
  mesh = rounds.make_mesh(D)
  _, params = problem()
  state = replicate(params, 4, mesh)
  made = device_groups.make_device_groups(unequal(), mesh)
  parts = {
    name: device_groups.part(state, group) for name, group in made.items()
  }
  again = device_groups.whole(parts, state)

  def pointers(x):
    return [s.data.unsafe_buffer_pointer() for s in x.addressable_shards]

  for old, new in zip(
    jax.tree.leaves(state), jax.tree.leaves(again), strict=True
  ):
    assert new.sharding == old.sharding
    assert pointers(new) == pointers(old)
  for name, group in made.items():
    leaf = parts[name]['stem']['kernel']
    assert len(leaf) == len(group.rows) * 4 // D


def cost(depths, D=4):
  """FLOPs of a step of each device's workers, by their depths."""
  _, run, _ = programs(resist(len(depths), depths=depths), D)
  made = device_groups.make_device_groups(
    resist(len(depths), depths=depths), run.mesh
  )
  return {
    group.depths: run.programs[name].cost_analysis()['flops']
    for name, group in made.items()
  }, run


@pytest.mark.slow
def test_an_empty_slot_computes_nothing():
  flops, run = cost((5, 3, 2, 1))
  five, three, two, one = (flops[n,] for n in (5, 3, 2, 1))
  block = (five - one) / 4
  # A block for a block, but for what the compiler fuses.
  assert three - one == pytest.approx(2 * block, rel=0.1)
  assert two - one == pytest.approx(block, rel=0.1)
  _, even, _ = programs(resist(1, min_depth=1), 1)
  assert five == pytest.approx(
    even.programs['step'].cost_analysis()['flops'], rel=1e-3
  )
  assert accounting.compiled_flops(run, 1) == five
  taking_turns, _ = cost((5, 3, 2, 1), D=1)
  assert taking_turns[5, 3, 2, 1] == pytest.approx(
    five + three + two + one, rel=1e-3
  )


def test_what_is_absent_is_never_seen():
  """In the programs of a step, no activation and no gradient of it."""
  _, run, _ = programs(unequal((5, 1, 1, 1)))
  names = [name for name in run.programs if name.startswith('step')]
  assert len(names) == 2
  convolutions = []
  for name in names:
    text = run.programs[name].as_text()
    assert not re.search(COLLECTIVE, text)
    convolutions.append(len(re.findall(r' convolution\(', text)))
  # Two layers of four blocks: forward, and for both gradients.
  assert convolutions[0] - convolutions[1] == 4 * 2 * 3


def test_an_empty_slot_has_exactly_zero_gradient():
  """After two local steps, before an exchange that would not read it."""
  loss_fn, params = problem()
  protocol = unequal((4, 2))
  training = LocalTraining(
    loss_fn, tiny.make_optimizer(), protocol, 0, (), loop=False, grouped=False
  )
  mesh = rounds.make_mesh(1)
  (group,) = device_groups.make_device_groups(protocol, mesh).values()
  rows, all_ = SHARDED, REPLICATED
  run = jax.jit(
    jax.shard_map(
      functools.partial(training.step, group=group),
      mesh=mesh,
      in_specs=(rows, all_, all_, rows, all_, all_),
      out_specs=rows,
    )
  )
  assigned = tiny.assign(0, L, 2, depths=(4, 2))
  state = tiny.distribute(params, protocol, mesh, {tiny.CHAIN: assigned})
  local = training.begin(state.shared, state.chain, None, jnp.int32(0))
  batches = tiny.batches(0, 2, 2)
  for t in range(2):
    slots = {tiny.CHAIN: jnp.array(assigned.slots)}
    local = run(local, slots, tiny.examples(), batches[:, t], 0, jnp.int32(t))
  empty = assigned.slots == L
  assert empty.tolist() == [4 * [False], [False, False, True, True]]
  momentum = optax.tree.get(local.opt_state, 'trace')
  for tree in (local.params, momentum):
    for leaf in jax.tree.leaves(tree[tiny.CHAIN]):
      assert (np.asarray(leaf)[empty] == 0).all()
      assert (np.abs(np.asarray(leaf)[~empty]).reshape(6, -1).max(1) > 0).all()


@pytest.mark.slow
def test_a_worker_draws_the_same_numbers_in_any_group():
  _, params = problem()

  def draws(params, present, batch, key, constants):
    nothing = 0 * params['classifier']['bias'].sum()
    first = batch[0].astype(jnp.float32)
    return jax.random.uniform(key) + first + nothing, {}

  def losses(protocol, D):
    mesh, run = tiny.make_round(draws, protocol, D)
    slots = {tiny.CHAIN: tiny.assign(0, L, 4, depths=protocol.depths)}
    state = tiny.distribute(params, protocol, mesh, slots)
    batches = tiny.batches(0, 4, 2)
    return run(state, tiny.examples(), batches, slots)[1]['loss']

  equal = losses(resist(4), 4)
  for D in (1, 2, 4):
    np.testing.assert_allclose(losses(unequal(), D), equal, rtol=1e-6)


def test_slots_of_other_depths_are_refused():
  state, run, _ = programs(unequal(), ahead=False)
  other = {tiny.CHAIN: tiny.assign(1, L, 4, depths=(1, 2, 3, 2))}
  with pytest.raises(ValueError, match='assign them with these') as raised:
    run(state, tiny.examples(), tiny.batches(0, 4, 2), other)
  assert '\n' not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize('exchange', ['masked_psum', 'hand_over'])
def test_programs_serve_all_decompositions_and_donate(exchange):
  state, run, assigned = programs(unequal(exchange=exchange), ahead=False)
  kernel = state.chain[tiny.CHAIN]['conv1']['kernel']
  for r in range(3):
    batches = tiny.batches(r, 4, 2)
    state, _ = run(state, tiny.examples(), batches, next(assigned))
  assert kernel.is_deleted()
  sizes = {name: p._cache_size() for name, p in run.programs.items()}
  assert set(sizes.values()) == {1}, sizes
