"""Heads are cut, too: a worker without a branch runs the shortcut alone."""

from functools import partial
import itertools
from statistics import NormalDist

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_evaluate
from test_rounds import assert_close
from test_train import tiny_config
import tiny
from wire import train_and_compare

from resist_jax import decomposition, models, rounds
from resist_jax.errors import ConfigError
from resist_jax.run import checks, export, phases, train
from resist_jax.run.setup import prepare

L = 4
NUM_BLOCKS = {'stage2_chain': L, 'stage1_branch': 1, 'stage2_branch': 1}
BRANCHES = ('stage1_branch', 'stage2_branch')
FORMS = pytest.mark.parametrize(
  'form',
  [
    {},
    pytest.param({'bottleneck': True, 'norm': 'group'}, marks=pytest.mark.slow),
    pytest.param(
      {'pre_activation': False, 'norm': 'group'}, marks=pytest.mark.slow
    ),
    pytest.param(
      {'pre_activation': False, 'bottleneck': True}, marks=pytest.mark.slow
    ),
  ],
  ids=str,
)


def problem(**kwargs):
  """Two stages, the second with a projection; random numbers in norms, too."""
  return test_evaluate.make_network((1, L), cut_heads=True, **kwargs)


def protocol(S, T=2, min_depth=0, **kwargs):
  depths = {'stage2_chain': min_depth} | dict.fromkeys(BRANCHES)
  return tiny.protocol(S, T, NUM_BLOCKS, min_depth=depths, **kwargs)


def joined(params):
  """The same parameters for the network whose heads are whole."""
  params = dict(params)
  for stage in (1, 2):
    branch = jax.tree.map(lambda x: x[0], params.pop(f'stage{stage}_branch'))
    head = params.get(f'stage{stage}_head', {})
    assert not head.keys() & branch.keys()
    params[f'stage{stage}_head'] = head | branch
  return params


@FORMS
def test_a_cut_head_computes_what_the_head_does(form):
  net, params = problem(**form)
  images, _ = tiny.examples()
  run = partial(jax.jit(net.apply), {'params': params}, images)
  got = run({name: jnp.ones(1) for name in BRANCHES})
  whole = net.clone(cut_heads=False)
  want = jax.jit(whole.apply)({'params': joined(params)}, images)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
  shapes = tiny.init(whole)
  assert jax.tree.map(jnp.shape, joined(params)) == jax.tree.map(
    jnp.shape, shapes
  )
  off = run({name: jnp.zeros(1) for name in BRANCHES})
  assert np.abs(got - off).max() > 1e-3


@FORMS
def test_an_absent_branch_is_the_shortcut_alone(form):
  """Whatever it holds: its gradient is zero, and nothing depends on it."""
  net, params = problem(**form)
  present = {name: jnp.zeros(1) for name in BRANCHES}
  batch = jnp.arange(6)
  loss, without = tiny.make_loss(net), plain_loss(net)
  grads = tiny.gradient(loss, params, present, batch)
  for name in BRANCHES:
    assert all((x == 0).all() for x in jax.tree.leaves(grads.pop(name)))
  none = tiny.cut(params, {name: [] for name in BRANCHES})
  want = tiny.gradient(without, none, {}, batch)
  assert_close(grads, {k: v for k, v in want.items() if k not in BRANCHES})


def plain_loss(net):
  """The loss of a sub-network that is what it holds, block after block."""

  def loss_fn(params, present, batch, key, constants):
    del present, key
    images, labels = constants
    x = images[batch]
    one = jnp.ones(())

    def run(name, variables, *args):
      return net.make_piece(name).apply({'params': variables}, *args)

    for name, group in itertools.groupby(net.pieces(), lambda step: step[0]):
      if name.endswith(('_head', 'stem', 'classifier')):
        x = run(name, params[name], x)
        continue
      del group
      held = len(jax.tree.leaves(params[name])[0])
      for i in range(held):
        block = jax.tree.map(lambda p, i=i: p[i], params[name])
        x, _ = run(name, block, x, one)
      if not held and isinstance(x, tuple):
        x = x[1] if net.pre_activation else nn.relu(x[1])
    loss = optax.softmax_cross_entropy_with_integer_labels(x, labels[batch])
    return loss.mean(), {}

  return loss_fn


@pytest.mark.parametrize(
  ('S', 'D', 'min_depth', 'on_device', 'form'),
  [
    (2, 2, 0, False, {}),
    pytest.param(
      4, 2, 2, False, {'pre_activation': False}, marks=pytest.mark.slow
    ),
    pytest.param(
      3,
      1,
      0,
      True,
      {'norm': 'group', 'bottleneck': True},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_round_equals_algorithm_1(S, D, min_depth, on_device, form):
  net, params = problem(**form)
  cut = protocol(S, min_depth=min_depth)
  got, metrics = tiny.train_compiled(
    tiny.make_loss(net), params, cut, D, 2, on_device
  )
  assert np.asarray(metrics['finite']).all()
  assert_close(got, tiny.algorithm_1(plain_loss(net), params, cut, 2), 1e-4)


def test_weight_decay_leaves_an_absent_branch_alone():
  """One worker holds it and decays it; with the others it is nothing at all."""
  net, params = problem()
  S, cut = 2, protocol(2)
  mesh, run = tiny.make_round(tiny.make_loss(net), cut, 2)
  slots = next(tiny.assignments(cut))
  state = tiny.distribute(params, cut, mesh, slots)
  state, _ = run(state, tiny.examples(), tiny.batches(0, S, 2), slots)
  for name in BRANCHES:
    holds = slots[name].slots[:, 0] == 0
    assert holds.sum() == 1
    for leaf in map(np.asarray, jax.tree.leaves(state.chain[name])):
      assert (leaf[~holds] == 0).all()
      assert (leaf[holds] != 0).any()


@pytest.mark.parametrize(('L', 'S'), [(1, 4), (2, 3), (5, 3)])
def test_slots_that_leave_workers_without_blocks_are_fair(L, S):
  """Each frequency has a bound, and all bounds hold with 99.99 %."""
  count = 2000
  keys = jax.random.split(jax.random.key(0), count)
  sample = partial(decomposition.sample_slots, min_depth=None)
  slots = jax.jit(jax.vmap(lambda key: sample(key, L, S)))(keys)
  held = np.asarray(jax.vmap(lambda s: decomposition.presence(s, L))(slots))
  assert (held.sum(axis=1) == 1).all()
  counts = held.sum(axis=2)
  assert (np.ptp(counts, axis=1) <= 1).all()
  assert slots.shape[2] == counts.max()
  z = NormalDist().inv_cdf(1 - 1e-4 / 2 / (S * L))
  bound = z * np.sqrt((1 - 1 / S) / S / count)
  assert np.abs(held.mean(axis=0) - 1 / S).max() < bound


@pytest.mark.slow
@pytest.mark.parametrize(
  'form',
  [
    {},
    {'pre_activation': False},
    {'bottleneck': True, 'stem': 'imagenet'},
    {'norm': 'group'},
  ],
  ids=str,
)
@pytest.mark.parametrize('way', test_evaluate.WAYS)
def test_evaluation_equals_the_assembled_network(form, way, monkeypatch):
  net, params = problem(**form)
  cut, mesh = protocol(4), rounds.make_mesh(2)
  state = tiny.distribute(params, cut, mesh)
  scales = {
    name: jnp.linspace(0.3, 0.9, length) for name, length in NUM_BLOCKS.items()
  }
  evaluator = test_evaluate.make_evaluator(way, net, scales, mesh)
  want, fixed, paper = test_evaluate.plainly(net, params, scales)
  close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  _, logits = test_evaluate.logits_seen(monkeypatch, evaluator, state)
  jax.tree.map(close, evaluator.statistics(state), want)
  expected = [part for pair in zip(fixed, paper, strict=True) for part in pair]
  close(logits, np.concatenate(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('bottleneck', [False, True])
def test_initial_parameters_are_those_of_the_network(bottleneck):
  net, params = problem(bottleneck=bottleneck)
  drawn = models.initial_params(net, (4, 4, 1), seed=0)
  shapes = partial(jax.tree.map, jnp.shape)
  assert shapes(drawn) == shapes(params)


def strided(**fields):
  return tiny_config(
    **{
      'model.stage_sizes': (3, 5),
      'partition': (1, 2),
      'partition_strided': True,
      'exchange': 'masked_psum',
      'num_workers': 2,
      'num_devices': 2,
      **fields,
    }
  )


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'exchange': 'hand_over'}, 'partition_strided: .*exchange=masked_psum'),
    ({'num_workers': 4}, 'stage 1: 4 workers cannot share 2 blocks'),
    ({'min_depth': 3}, 'stage 1: min_depth is 3; a chain of 2 blocks'),
    ({'model.stage_sizes': (1, 5)}, 'stage 1: .* cannot share 0 blocks'),
  ],
)
def test_a_mistake_gets_one_clear_line(fields, says):
  with pytest.raises(ConfigError, match=says) as caught:
    checks.validate(strided(**fields))
  assert '\n' not in str(caught.value)


def test_a_minimum_depth_holds_for_chains_but_not_for_branches():
  config = strided(num_workers=4, min_depth=2)
  checks.validate(config)
  setup = prepare(config)
  assigned = phases.protocol_named(setup, 'resist').assign(config.seed, 0)
  slots = {name: assignment.slots for name, assignment in assigned.items()}
  held = {name: (slots[name] < n).sum() for name, n in setup.chains.items()}
  assert held == {
    'stage1_chain': 8, 'stage2_chain': 8, 'stage1_branch': 1,
    'stage2_branch': 1,
  }  # fmt: skip
  assert phases.global_scale(setup)['stage2_branch'] == 1 / 4
  setup.config.residual_scale = 'none'
  assert set(phases.global_scale(setup).values()) == {1.0}


@pytest.mark.slow
def test_a_whole_run_and_one_that_goes_on_with_other_workers(tmp_path):
  form = {'model.pre_activation': False, 'eval_every': 1}
  summary = train_and_compare(strided(**form, num_rounds=1), tmp_path)
  blocks, lengths = summary['params_per_block'], summary['num_blocks']
  assert lengths == {
    'stage1_chain': 2, 'stage2_chain': 4, 'stage1_branch': 1,
    'stage2_branch': 1,
  }  # fmt: skip
  cut = sum(lengths[name] * blocks[name] for name in lengths)
  assert summary['params_total'] == summary['params_shared'] + cut
  held = 2 * summary['params_shared'] + cut  # By both workers together.
  assert summary['bytes_per_round'] == 2 * 4 * held
  config = strided(**form, num_rounds=2, num_workers=4, min_depth=1)
  assert train.train(config, str(tmp_path))['rounds'] == 2
  predict = export.load(tmp_path)
  assert predict.network.cut_heads
  assert predict.scales['stage2_branch'].tolist() == [0.25]
  predict(np.zeros((2, 8, 8, 1), np.uint8))
