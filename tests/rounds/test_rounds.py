"""The compiled round is Algorithm 1, on any devices, and holds what it may."""

import dataclasses
import functools

from covering import rest_is_slow
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from resist_jax import decomposition, rounds
from resist_jax.rounds.moments import Parts

L = 5


def resist(S, T=2, **kwargs):
  return tiny.protocol(S, T, {tiny.CHAIN: L}, **kwargs)


def full(S, T=2, **kwargs):
  return tiny.protocol(S, T, **kwargs)


@functools.cache
def problem(norm='batch'):
  net = tiny.network(L, norm=norm)
  return tiny.make_loss(net), tiny.init(net)


def hand_over(S, T=2, **kwargs):
  return resist(S, T, exchange='hand_over', **kwargs)


@functools.cache
def oracle(norm, S, min_depth, exchange='masked_psum'):
  loss_fn, params = problem(norm)
  protocol = resist(S, min_depth=min_depth, exchange=exchange)
  return tiny.algorithm_1(loss_fn, params, protocol, num_rounds=2)


def assert_close(got, want, tolerance=3e-5):
  for path, leaf in jax.tree_util.tree_leaves_with_path(want):
    new = functools.reduce(lambda tree, key: tree[key.key], path, got)
    np.testing.assert_allclose(
      new, leaf, rtol=tolerance, atol=tolerance, err_msg=str(path)
    )


@pytest.mark.parametrize(
  ('exchange', 'norm', 'S', 'D', 'min_depth'),
  rest_is_slow(
    [
      ('masked_psum', 'batch', 1, 1, 0),
      ('masked_psum', 'batch', 2, 2, 0),  # 3 and 2 blocks: one slot is empty.
      ('masked_psum', 'batch', 4, 2, 3),
      ('masked_psum', 'batch', 4, 4, 0),
      ('masked_psum', 'batch', 8, 4, 1),  # More workers than blocks.
      ('masked_psum', 'group', 4, 1, 0),
      ('masked_psum', 'group', 8, 4, 2),
      ('hand_over', 'batch', 1, 1, 0),
      ('hand_over', 'batch', 2, 1, 0),
      ('hand_over', 'batch', 2, 2, 4),
      ('hand_over', 'batch', 4, 4, 0),
      ('hand_over', 'batch', 4, 4, 3),
      ('hand_over', 'group', 4, 2, 3),
    ],
    quick=[
      ('masked_psum', 'batch', 8, 4, 1),
      ('hand_over', 'batch', 4, 4, 3),
    ],
  ),
)
def test_a_compiled_round_equals_algorithm_1(exchange, norm, S, D, min_depth):
  loss_fn, params = problem(norm)
  protocol = resist(S, min_depth=min_depth, exchange=exchange)
  got, metrics = tiny.train_compiled(loss_fn, params, protocol, D, 2)
  assert_close(got, oracle(norm, S, min_depth, exchange))
  assert metrics['loss'].shape == (S,)
  assert np.asarray(metrics['finite']).all()


@pytest.mark.parametrize(
  ('exchange', 'S', 'D'),
  rest_is_slow(
    [('masked_psum', 4, 2), ('hand_over', 4, 4), ('hand_over', 4, 1)],
    quick=[('masked_psum', 4, 2)],
  ),
)
def test_the_loop_on_the_device_equals_algorithm_1(exchange, S, D):
  loss_fn, params = problem()
  protocol = resist(S, exchange=exchange)
  got, _ = tiny.train_compiled(loss_fn, params, protocol, D, 2, on_device=True)
  assert_close(got, oracle('batch', S, 0, exchange))


@pytest.mark.parametrize(
  ('make', 'wire_format'),
  [
    (full, 'int8'),
    pytest.param(resist, 'int8', marks=pytest.mark.slow),
    (functools.partial(hand_over, min_depth=2), 'bfloat16'),
    pytest.param(
      functools.partial(hand_over, carry=True), 'int8', marks=pytest.mark.slow
    ),
  ],
  ids=['local_sgd', 'masked_psum', 'replicas', 'carried'],
)
def test_rounding_costs_little_and_the_same_on_all_paths(make, wire_format):
  """Near the exact round, and alike on any devices and in both loops."""
  loss_fn, params = problem()
  exact, _ = tiny.train_compiled(loss_fn, params, make(4), 4, 2)
  protocol = make(4, wire_format=wire_format)
  got, *others = (
    tiny.train_compiled(loss_fn, params, protocol, D, 2, on_device)[0]
    for D, on_device in ((4, False), (2, False), (4, True))
  )
  assert_close(got, exact, 1e-2)
  difference = got['stem']['kernel'] - exact['stem']['kernel']
  assert np.abs(difference).max() > 0
  for other in others:  # A sum in another order may round to the next step.
    assert_close(got, other, 2e-3)


def test_what_rounding_left_out_is_sent_in_the_next_round():
  """By who sent a change, and by who sent their mean to all."""
  (loss_fn, params), protocol = problem(), full(4, wire_format='int8')
  mesh, run = tiny.make_round(loss_fn, protocol, 4)
  found = []
  # What a worker left out of its own change is a part of four in the mean.
  for name, more in (('mean', 0.0), ('mean', 0.5), ('sent', 0.125)):
    state = tiny.distribute(params, protocol, mesh)
    state, _ = run(state, tiny.examples(), tiny.batches(0, 4, 2))
    error = jax.tree.map(np.array, state.error)
    assert all(map(np.any, error.values()))
    error[name] += np.float32(more)
    placed = jax.tree.map(
      lambda x, like: jax.device_put(x, like.sharding), error, state.error
    )
    state = state._replace(error=placed)
    state, _ = run(state, tiny.examples(), tiny.batches(1, 4, 2))
    found.append(rounds.assemble(state).params['stem']['kernel'])
  for kernel in found[1:]:
    np.testing.assert_allclose(kernel - found[0], 0.5, atol=0.05)


def test_one_local_step_equals_the_step_of_a_lone_worker():
  """No gradient is summed over devices behind one's back."""
  loss_fn, params = problem()
  S, protocol = 4, full(4, 1)
  mesh, run = tiny.make_round(loss_fn, protocol, S)
  state = tiny.distribute(params, protocol, mesh)
  batches = tiny.batches(0, S, 1)
  batches[:] = batches[0]  # All the same: then so is their mean.
  state, _ = run(state, tiny.examples(), batches)
  want = tiny.one_step(loss_fn, params, batches[0, 0])
  assert_close(rounds.assemble(state).params, want)


@pytest.mark.slow
def test_one_worker_of_resist_is_one_worker_of_local_sgd():
  loss_fn, params = problem()
  ours, _ = tiny.train_compiled(loss_fn, params, resist(1), 1, 2)
  baseline, _ = tiny.train_compiled(loss_fn, params, full(1), 1, 2)
  assert_close(ours, baseline)


@pytest.mark.slow
@pytest.mark.parametrize('on_device', [False, True])
def test_data_parallel_is_one_worker_with_a_larger_batch(on_device):
  """Where the norm allows it: group norm knows no other image of the batch."""
  loss_fn, params = problem('group')
  S, T = 4, 2
  protocol = full(S, T, average_gradients=True, carry=True)
  got, _ = tiny.train_compiled(loss_fn, params, protocol, 2, 2, on_device)

  params = jax.tree.map(np.asarray, params)
  velocity = jax.tree.map(np.zeros_like, params)
  for r in range(2):
    batches = tiny.batches(r, S, T)
    for t in range(T):
      batch = batches[:, t].reshape(-1)
      grads = tiny.gradient(loss_fn, params, {}, batch)
      grads = jax.tree.map(np.asarray, grads)
      velocity = jax.tree.map(
        lambda v, g, p: tiny.MOMENTUM * v + g + tiny.WEIGHT_DECAY * p,
        velocity,
        grads,
        params,
      )
      rate = tiny.RATE / (1 + r * T + t)
      params = jax.tree.map(lambda p, v, a=rate: p - a * v, params, velocity)
  assert_close(got, params)


@pytest.mark.slow
@pytest.mark.parametrize('exchange', ['masked_psum', 'hand_over'])
@pytest.mark.parametrize('on_device', [False, True])
def test_carried_velocity_is_exchanged_like_the_parameters(on_device, exchange):
  """Against the plain loop, with new slots, copies and an uneven deal."""
  loss_fn, params = problem()
  protocol = resist(4, min_depth=2, carry=True, exchange=exchange)
  got, _ = tiny.train_compiled(loss_fn, params, protocol, 2, 3, on_device)
  want = tiny.algorithm_1(loss_fn, params, protocol, num_rounds=3)
  assert_close(got, want)
  restarts = dataclasses.replace(protocol, carry=False)
  restarted = tiny.algorithm_1(loss_fn, params, restarts, num_rounds=3)
  difference = want['stem']['kernel'] - restarted['stem']['kernel']
  assert np.abs(difference).max() > 1e-3


@pytest.mark.slow
def test_carried_velocity_makes_rounds_seamless():
  """With one worker nothing is lost: two rounds of T are one of 2 T."""
  loss_fn, params = problem()

  def run(carry, T, num_rounds):
    protocol = resist(1, T, carry=carry)
    mesh, call = tiny.make_round(loss_fn, protocol, 1)
    slots = {tiny.CHAIN: tiny.assign(0, L, 1)}
    state = tiny.distribute(params, protocol, mesh, slots)
    batches = tiny.batches(0, 1, 4).reshape(1, num_rounds, T, -1)
    for r in range(num_rounds):
      state, _ = call(state, tiny.examples(), batches[:, r], slots)
    return rounds.assemble(state)

  carried, whole = run(True, 2, 2), run(True, 4, 1)
  assert_close(carried.params, whole.params)
  (velocity,) = carried.carried.moments
  assert_close(velocity, whole.carried.moments[0])
  assert jax.tree.map(jnp.shape, velocity) == jax.tree.map(jnp.shape, params)
  restarted = run(False, 2, 2)
  assert restarted.carried is None
  kernels = (x.params['stem']['kernel'] for x in (restarted, whole))
  assert np.abs(np.subtract(*kernels)).max() > 1e-4


def test_a_block_that_nobody_trains_keeps_its_value():
  """A worker's step leaves the zeros of an empty slot zeros."""
  loss_fn, params = problem()
  S, protocol = 2, resist(2)
  mesh, run = tiny.make_round(loss_fn, protocol, 2)
  slots = {tiny.CHAIN: tiny.assign(0, L, S)}
  state = tiny.distribute(params, protocol, mesh, slots)
  state, _ = run(state, tiny.examples(), tiny.batches(0, S, 2), slots)
  empty = slots[tiny.CHAIN].slots == L
  assert empty.sum() == 1
  for leaf in jax.tree.leaves(state.chain[tiny.CHAIN]):
    assert (np.asarray(leaf)[empty] == 0).all()


@pytest.mark.parametrize(('S', 'D'), [(4, 4), (8, 2)])
def test_assemble_undoes_distribute_bit_for_bit(S, D):
  _, params = problem()
  slots = {tiny.CHAIN: tiny.assign(0, L, S, min_depth=2)}
  mesh = rounds.make_mesh(D)
  carried = Parts([params], [np.zeros((), np.int32)])
  whole = rounds.Whole(params, carried)
  state = rounds.distribute(whole, resist(S), mesh, slots)
  again = rounds.assemble(state)
  jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_a_device_holds_shared_parameters_and_its_own_blocks_only():
  _, params = problem()
  S = 4
  slots = {tiny.CHAIN: tiny.assign(0, L, S)}
  mesh = rounds.make_mesh(S)
  state = tiny.distribute(params, resist(S), mesh, slots)
  held = sum(
    leaf.addressable_shards[0].data.size
    for leaf in jax.tree.leaves((state.shared, state.chain))
  )
  shared, chain = decomposition.split(params, [tiny.CHAIN])

  def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  assert held == count(shared) + 2 * count(chain) // L


def test_a_worker_that_diverges_is_named():
  loss_fn, params = problem()

  def explodes(params, present, batch, key, constants):
    loss, metrics = loss_fn(params, present, batch, key, constants)
    return loss * jnp.where(batch[0] == 0, jnp.inf, 1.0), metrics

  mesh, run = tiny.make_round(explodes, full(4, 1), 4)
  state = tiny.distribute(params, full(4, 1), mesh)
  batches = np.ones_like(tiny.batches(0, 4, 1))
  batches[2] = 0
  _, metrics = run(state, tiny.examples(), batches)
  assert np.asarray(metrics['finite']).tolist() == [True, True, False, True]


def test_randomness_follows_seed_round_worker_and_step():
  _, params = problem()

  def draws(params, present, batch, key, constants):
    number = jax.random.uniform(key)
    return number + 0 * params['classifier']['bias'].sum(), {}

  def losses(round_index, T=1):
    mesh, run = tiny.make_round(draws, full(4, T), 2)
    state = tiny.distribute(params, full(4, T), mesh)
    state = state._replace(round=np.int32(round_index))
    batches = tiny.batches(0, 4, T)
    _, metrics = run(state, tiny.examples(), batches)
    return np.asarray(metrics['loss'])

  first = losses(0)
  np.testing.assert_array_equal(first, losses(0))
  assert len({*first, *losses(1)}) == 8  # All workers and rounds differ.
  assert (losses(0, T=2) != first).all()


@pytest.mark.parametrize('on_device', [False, True])
def test_batches_of_another_length_are_refused(on_device):
  """JAX would take the last step again, and the metrics be wrong."""
  loss_fn, params = problem()
  for S, T in ((4, 1), (4, 3), (8, 2)):
    with pytest.raises(ValueError, match=r'it must be \[S=4, T=2, ...\]'):
      tiny.run_rounds(
        loss_fn, params, full(4), 2, [tiny.batches(0, S, T)], on_device
      )


def test_slots_that_leave_a_block_out_are_refused():
  params = {'blocks': {'w': np.ones((4, 3), np.float32)}}
  slots = {'blocks': decomposition.Assignment(np.array([[0, 1], [1, 2]]))}
  protocol = rounds.Protocol(2, 1, {'blocks': 4})
  with pytest.raises(ValueError, match='no worker holds block 3 of blocks'):
    rounds.distribute(
      rounds.Whole(params), protocol, rounds.make_mesh(2), slots
    )


def test_a_protocol_without_outer_step_drops_its_moments():
  params = {'blocks': {'w': np.ones((4, 3), np.float32)}}
  before = rounds.Protocol(2, 1, {'blocks': 4}, outer=optax.sgd(0.7, 0.9))
  whole = rounds.with_carried(rounds.Whole(params), optax.sgd(0.1), before)
  assert whole.outer is not None
  protocol = rounds.Protocol(2, 1, {'blocks': 4})
  state = rounds.distribute(
    whole, protocol, rounds.make_mesh(2), protocol.assign(0, 0)
  )
  assert state.outer is None


def test_a_network_without_what_the_protocol_keeps_is_refused():
  """Rounds would leave the outer step out, and bytes would count it."""
  mesh = rounds.make_mesh(2)
  params = {'blocks': {'w': np.ones((4, 3), np.float32)}}
  for fields in ({'outer': optax.sgd(0.7)}, {'average': 0.9}):
    protocol = rounds.Protocol(2, 1, {'blocks': 4}, **fields)
    whole, assigned = rounds.Whole(params), protocol.assign(0, 0)
    with pytest.raises(ValueError, match=f'{next(iter(fields))} is None'):
      rounds.distribute(whole, protocol, mesh, assigned)
    whole = rounds.with_carried(whole, optax.sgd(0.1), protocol)
    rounds.distribute(whole, protocol, mesh, assigned)
