"""Rounds on an accelerator equal those of a CPU, in the memory predicted.

`experiments/launch/first_hour.sh` runs these tests on a rented device. Without
one they are skipped; with REHEARSE=1, virtual CPUs do what they can.
"""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from experiments.accelerator import difference
from resist_jax import Trainer, accounting, make_mesh, models, rounds

pytestmark = pytest.mark.accelerator
L, MIB = 6, 2**20


@pytest.fixture
def devices():
  found = jax.devices()
  if found[0].platform == 'cpu' and os.environ.get('REHEARSE') != '1':
    pytest.skip('no accelerator is here; experiments/launch/first_hour.sh')
  return found


@pytest.fixture
def memory(devices):
  """Returns what a device says of its memory."""
  if devices[0].memory_stats() is None:
    pytest.skip(f'a {devices[0].device_kind} tells nothing of its memory')
  return lambda: devices[0].memory_stats()


def check_equals_the_cpus(protocol, num_devices, group=1):
  """Trains two rounds on devices, and compares with Algorithm 1 on a CPU."""
  net = tiny.network(L, platform=jax.devices()[0].platform)
  with jax.default_matmul_precision('highest'):
    with jax.default_device(jax.devices('cpu')[0]):
      params = jax.tree.map(np.asarray, tiny.init(net))
      want = tiny.algorithm_1(tiny.make_loss(net), params, protocol, 2)
    got, _ = tiny.train_compiled(
      tiny.make_loss(net), params, protocol, num_devices, 2, True, group
    )
  apart = difference(*map(by_path, (got, want)))
  assert apart['of_norm'] < 1e-4
  # Had nobody trained, it would be this much.
  assert difference(by_path(params), by_path(want))['of_norm'] > 1e-2


def by_path(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def resist(S, exchange):
  return tiny.protocol(S, 2, {tiny.CHAIN: L}, exchange=exchange, min_depth=2)


EXCHANGES = pytest.mark.parametrize('exchange', ['hand_over', 'masked_psum'])


@EXCHANGES
def test_a_round_on_one_device_equals_a_cpus(devices, exchange):
  check_equals_the_cpus(resist(4, exchange), 1)


@EXCHANGES
def test_a_round_on_several_devices_equals_a_cpus(devices, exchange):
  D = 2 ** int(math.log2(min(len(devices), L)))
  if D < 2:
    pytest.skip('there is one device, and nothing travels')
  check_equals_the_cpus(resist(D, exchange), D)


def test_a_round_of_groups_equals_a_cpus(devices):
  if len(devices) < 4:
    pytest.skip('two groups of two need four devices')
  net = tiny.network(L, platform=devices[0].platform)
  params = jax.tree.map(np.asarray, tiny.init(net))
  found = [
    tiny.train_compiled(
      tiny.make_loss(net.clone(norm_axis='data' if group > 1 else None)),
      params, resist(2, 'hand_over'), size, 2, True, group,
    )[0]
    for size, group in ((1, 1), (4, 2))
  ]  # fmt: skip
  assert difference(*map(by_path, found))['of_norm'] < 1e-4


def wide_trainer(width):
  """Two workers of one device, whose chain is nearly all of their memory."""

  def loss_fn(params, present, batch, key):
    del key
    for w, p in zip(params['blocks'], present['blocks'], strict=True):
      batch = batch + p * jnp.tanh(batch @ w)
    return jnp.square(batch).mean(), {}

  trainer = Trainer(
    loss_fn,
    optax.sgd(0.1),
    chains=('blocks',),
    num_workers=2,
    local_steps=2,
    mesh=make_mesh(1),
    on_device=True,
  )
  blocks = np.full((8, width, width), 1 / width, np.float32)
  batches = np.ones((2, 2, 8, width), np.float32)
  return trainer, trainer.init({'blocks': blocks}), batches


def test_a_round_takes_its_state_over(devices):
  trainer, state, batches = wide_trainer(32)
  held = jax.tree.leaves((state.shared, state.chain))
  trainer.round(state, batches)
  assert all(x.is_deleted() for x in held)


def test_donation_frees_memory(memory):
  trainer, state, batches = wide_trainer(2048)
  size = sum(x.nbytes for x in jax.tree.leaves(state.chain))
  assert size == 128 * MIB
  held = state  # A copy that was not donated would stay with its name.
  state, _ = jax.block_until_ready(trainer.round(state, batches))
  before = memory()['bytes_in_use']
  for _ in range(3):
    held, (state, _) = state, trainer.round(state, batches)
  jax.block_until_ready(state)
  assert memory()['bytes_in_use'] - before < size / 4
  del held


def test_memory_is_that_predicted(devices, memory):
  """Of the paper's widths and batch, with as few blocks as compile soon."""
  network = models.ResNet(
    num_classes=100,
    stage_sizes=(1, 1, 5, 1),
    dtype='bfloat16',
    platform=devices[0].platform,
  )
  chain, B, shape = models.chain_name(3), 128, (32, 32, 3)

  def loss_fn(params, present, batch, key):
    del key
    images, labels = batch
    sub = network.with_chain_lengths({chain: len(present[chain])})
    logits = sub.apply({'params': params}, images, present)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), {}

  params = models.initial_params(network, shape, 0)
  trainer = Trainer(
    loss_fn,
    optax.sgd(0.1, momentum=0.9),
    chains=(chain,),
    num_workers=2,
    local_steps=2,
    mesh=make_mesh(1),
    on_device=True,
  )
  state = trainer.init(params)
  batches = (
    np.zeros((2, 2, B, *shape), np.float32),
    np.zeros((2, 2, B), np.int32),
  )
  trainer = trainer.compile(state, batches)
  assert trainer.programs is not None
  said = accounting.compiled_memory(trainer.programs)['round']
  fused = devices[0].platform == 'tpu'
  want = predicted(network, trainer.protocol(params), params, fused, B, shape)
  # On a TPU it is an upper bound: much of it fits into on-chip memory.
  assert said['temporary'] < 1.15 * want
  assert fused or said['temporary'] > 0.85 * want

  before = memory()
  jax.block_until_ready(trainer.round(state, batches))
  used = memory()['peak_bytes_in_use'] - before['bytes_in_use']
  assert before['peak_bytes_in_use'] < memory()['peak_bytes_in_use']
  assert used < 1.1 * said['peak'] + 32 * MIB


def predicted(network, protocol, params, fused, batch_size, shape):
  """Predicts the bytes that a round needs besides its arguments."""
  lengths = {k: protocol.slots_per_worker(k) for k in protocol.num_blocks}
  numbers = models.num_activations(network, shape, lengths, fused)
  sizes = accounting.measure(params, list(protocol.num_blocks))
  held = accounting.predicted_memory(
    sizes, protocol, 1, 2 * numbers * batch_size
  )
  parts = 'activations', 'gradients', 'optimizer', 'exchange'
  return sum(held[part] for part in parts)


def test_the_programs_choose_the_form_for_accelerators(devices):
  """Steps loop on the device, unless it is a CPU."""
  protocol = resist(1, 'masked_psum')
  run = rounds.make_round(
    tiny.make_loss(tiny.network(L)), tiny.make_optimizer(), protocol,
    make_mesh(1), seed=0,
  )  # fmt: skip
  assert ('round' in run.programs) == (devices[0].platform != 'cpu')
