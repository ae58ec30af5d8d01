"""Predicted bytes, memory and FLOPs are those of the compiled programs."""

import functools
import itertools

from covering import rest_is_slow
import jax
import numpy as np
import pytest
import tiny

from resist_jax import accounting, models

L, T = 9, 2


@functools.cache
def problem():
  net = tiny.network(L)
  return net, tiny.make_loss(net), tiny.init(net)


def resist(S, exchange, wire_format='float32', **kwargs):
  return tiny.protocol(
    S, T, {tiny.CHAIN: L}, wire_format, exchange=exchange, **kwargs
  )


def full(S, wire_format='float32', **kwargs):
  return tiny.protocol(S, T, {}, wire_format, **kwargs)


GUARD = {'exclude_faulty': True}
DATA_PARALLEL = {'average_gradients': True, 'carry': True}
CASES = [
  (full(4), 4),
  (full(4), 1),  # Nothing leaves the device.
  (full(8, 'bfloat16'), 4),
  (full(4, 'int8'), 4),
  (full(4, 'int8', carry=True), 2),
  (full(4, **DATA_PARALLEL), 4),
  (full(4, 'bfloat16', **DATA_PARALLEL), 2),
  (resist(4, 'masked_psum'), 4),
  (resist(8, 'masked_psum', 'int8', min_depth=3), 4),
  (resist(4, 'masked_psum', 'bfloat16', carry=True), 2),
  (resist(4, 'hand_over'), 4),
  (resist(4, 'hand_over', min_depth=5), 4),
  (resist(8, 'hand_over', min_depth=2), 4),
  (resist(2, 'hand_over', 'bfloat16', carry=True), 2),
  (resist(4, 'hand_over', 'int8', min_depth=3), 4),
  (resist(4, 'hand_over'), 1),
  (full(4, 'int8', **GUARD), 4),
  (full(4, 'bfloat16', **DATA_PARALLEL, **GUARD), 2),
  (resist(8, 'masked_psum', 'int8', min_depth=3, **GUARD), 4),
  (resist(4, 'masked_psum', carry=True, **GUARD), 2),
  (resist(4, 'hand_over', min_depth=5, **GUARD), 4),
  (resist(4, 'hand_over', 'bfloat16', carry=True, **GUARD), 2),
  (resist(4, 'hand_over', **GUARD), 1),
]


INDICES = rest_is_slow(range(len(CASES)), (10,))


@functools.cache
def compiled(protocol_index, on_device):
  protocol, num_devices = CASES[protocol_index]
  _, loss_fn, params = problem()
  mesh, run = tiny.make_round(loss_fn, protocol, num_devices, on_device)
  assigned = list(itertools.islice(tiny.assignments(protocol), 4))
  state = tiny.distribute(params, protocol, mesh, assigned[0])
  batches = tiny.batches(0, protocol.num_workers, T)
  run = run.compile(state, tiny.examples(), batches)
  sizes = accounting.measure(params, list(protocol.num_blocks))
  return run, sizes, state, assigned


def assert_predicted_equals_read(index, on_device=False):
  protocol, num_devices = CASES[index]
  run, sizes, _, assigned = compiled(index, on_device=on_device)
  read = []
  for before, after in itertools.pairwise(assigned):
    moves = {name: (before[name], after[name]) for name in before}
    predicted = accounting.wire_bytes(sizes, protocol, num_devices, moves)
    branches = accounting.branches(protocol, moves)
    read.append(accounting.compiled_wire_bytes(run, branches))
    assert predicted == read[-1]
  assert (sum(read) > 0) == (num_devices > 1)


@pytest.mark.parametrize('index', INDICES)
def test_predicted_wire_bytes_are_those_of_the_compiled_program(index):
  assert_predicted_equals_read(index)


@pytest.mark.slow
@pytest.mark.parametrize('index', [5, 10, 17, 20])
def test_predicted_wire_bytes_are_those_of_a_program_that_loops(index):
  assert_predicted_equals_read(index, on_device=True)


@pytest.mark.parametrize('index', INDICES)
def test_parameters_and_momentum_on_a_device_are_as_predicted(index):
  protocol, num_devices = CASES[index]
  run, sizes, state, _ = compiled(index, on_device=False)
  want = accounting.predicted_memory(sizes, protocol, num_devices)
  read = accounting.compiled_memory(run)
  given = want['parameters']
  if protocol.carry:
    given += want['optimizer']
  # The schedule begins at the number of the round, which is an argument.
  assert read['begin']['arguments'] == given + 4
  number = 4 * protocol.num_workers // num_devices  # One for each worker.
  # A step updates in place: parameters, momentum, the count of the schedule,
  # and one metric.
  step = run.programs['step'].memory_analysis()
  assert step.alias_size_in_bytes == (
    want['parameters'] + want['optimizer'] + 2 * number
  )
  assert read['step']['temporary'] > want['gradients']
  kept = sum(x.nbytes for x in jax.tree.leaves(state.error)) // num_devices
  base = 0
  if protocol.sends_changes:
    base += sum(x.nbytes for x in jax.tree.leaves(state.shared)) // num_devices
  if protocol.exclude_faulty:
    base += sum(x.nbytes for x in jax.tree.leaves(state.chain)) // num_devices
  assert want['exchange'] == kept + base
  # No output of local training takes the place of what the exchange needs.
  begin = run.programs['begin'].memory_analysis()
  assert begin.alias_size_in_bytes == given - base


def test_parameters_per_device_are_those_of_the_sub_network():
  """The goal is 1.02 times; without a minimum depth it is 1 exactly."""
  protocol, num_devices = CASES[10]
  _, sizes, state, _ = compiled(10, on_device=False)
  held = sum(
    leaf.addressable_shards[0].data.nbytes
    for leaf in jax.tree.leaves((state.shared, state.chain))
  )
  sub = 4 * accounting.params_per_worker(sizes, protocol)
  assert num_devices == protocol.num_workers
  assert held == sub


NETWORKS = [
  {},
  {'bottleneck': True},
  {'pre_activation': False},
  {'stem': 'imagenet'},
  {'stage_sizes': (1, 3, 2)},
  {'stem': 'whitened', 'widths': (8, 8)},
]


@pytest.mark.parametrize(
  'kwargs', rest_is_slow(NETWORKS, [NETWORKS[i] for i in (1, 4, 5)]), ids=str
)
def test_flops_are_near_those_of_the_compiled_step(kwargs):
  """The compiler counts norms and additions too."""
  net = models.ResNet(
    **{
      'num_classes': 5,
      'stage_sizes': (2, 2),
      'widths': (32, 48, 64)[: len(kwargs.get('stage_sizes', (2, 2)))],
      **kwargs,
    }
  )
  shape = (32, 32, 3)
  images = jax.ShapeDtypeStruct((2, *shape), np.float32)
  params = jax.eval_shape(net.init, jax.random.key(0), images)['params']

  def loss(params, images):
    return net.apply({'params': params}, images).sum()

  step = jax.jit(jax.grad(loss)).lower(params, images).compile()
  read = step.cost_analysis()['flops'] / 2
  predicted = models.predicted_flops(net, shape, {})
  assert 0.95 < read / predicted < 1.1


def test_flops_of_the_papers_network():
  """A worker of four computes 1/1.94 of blocks that cost the same; near it."""
  net = models.PreActResNet101(num_classes=100)
  whole = models.predicted_flops(net, (32, 32, 3), {})
  part = models.predicted_flops(net, (32, 32, 3), {'stage3_chain': 6})
  assert whole / part == pytest.approx(1.94, abs=0.05)
