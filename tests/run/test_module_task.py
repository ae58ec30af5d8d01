"""A run of a network that is not ours, from its card to its model."""

import collections
import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import types
from typing import Any, NamedTuple

from covering import rest_is_slow
import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_network
import pytest
from test_train import rows, tiny_config
from wire import train_and_compare

from resist_jax import data
from resist_jax.errors import ConfigError
from resist_jax.run import (
  depth,
  evaluate_command,
  export,
  export_command,
  module_task,
  phases,
  predict_command,
  setup,
  train,
)
from resist_jax.run.interrupt import Interrupted
from resist_jax.run.mean_loss import MeanLoss
from resist_jax.run.module_task import rescaled_blocks


def config(**fields):
  made = tiny_config(lr=0.3, **fields)
  made.model.module = 'own_network'
  made.model.options = {'width': 8, 'blocks': 4, 'text': 0}
  return made


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp('finished')
  return folder, train.train(config(**{'log.report': True}), folder)


def test_it_is_tested_as_its_loss_says_on_every_set(finished):
  folder, summary = finished
  params, scales = export.load_parameters(folder)
  np.testing.assert_array_equal(scales['blocks'], [0.25] * 4)
  loss_fn = jax.jit(own_network.loss(None))
  dataset = own_network.data(config())
  for name, count in (('test', 37), ('other', 11)):
    batch = dataset.tests[name].take(np.arange(count))
    loss, found = loss_fn(params, scales, batch, None)
    np.testing.assert_allclose(summary[f'{name}_loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(
      summary[f'{name}_accuracy'], found['accuracy'], rtol=1e-5
    )
    assert summary[f'{name}_perplexity'] == math.exp(summary[f'{name}_loss'])
  assert 'best_test_accuracy_paper' not in summary
  first, *_, last = rows(folder)
  assert last['train_loss'] < first['train_loss']
  assert {'train_accuracy', 'bytes_total'} <= set(last)
  assert (folder / 'report.html').stat().st_size > 1000


def evaluated(capsys, folder, out, *words):
  """What the command writes and prints; a refusal is one line."""
  code = evaluate_command.main([str(folder), f'--out={out}', *words])
  printed = capsys.readouterr()
  if code:
    assert len(printed.err.splitlines()) == 1
    assert not printed.out
    return printed.err
  return json.loads((out / 'evaluation.json').read_text()), printed.out


def test_it_is_evaluated_as_the_run_tested_it(finished, capsys, tmp_path):
  folder, summary = finished
  found, out = evaluated(capsys, folder, tmp_path, '--depths=0,2,4')
  names = ('loss', 'perplexity', 'accuracy')
  for test, count in (('test', 37), ('other', 11)):
    assert found['examples'][test] == count
    for name in names:
      np.testing.assert_allclose(
        found['measures'][f'{test}_{name}'], summary[f'{test}_{name}'],
        rtol=1e-5,
      )  # fmt: skip
  assert f'{summary["test_loss"]:.4g}' in out
  assert f'{summary["test_accuracy"]:.2%}' in out
  kinds = [(r['order'], r['blocks'], r['draw']) for r in found['depth']]
  assert kinds == [
    ('first', 0, 0), ('first', 2, 0), *(('random', 2, i) for i in range(3)),
    ('first', 4, 0),
  ]  # fmt: skip
  rows = [{n: row[n] for n in found['measures']} for row in found['depth']]
  for name, value in found['measures'].items():
    assert rows[-1][name] == pytest.approx(value)
  params, scales = export.load_parameters(folder)
  batch = own_network.data(config()).tests['other'].take(np.arange(11))
  for row, kept in ((rows[0], []), (rows[1], [0, 1])):
    shallower = {'blocks': depth.keep(scales['blocks'], np.array(kept, int))}
    loss, metrics = own_network.loss(None)(params, shallower, batch, None)
    assert row['other_loss'] == pytest.approx(float(loss), rel=1e-5)
    assert row['other_accuracy'] == pytest.approx(float(metrics['accuracy']))
  assert rows[0]['test_loss'] != rows[1]['test_loss']
  for name in ('depth_test.png', 'depth_other.png'):
    assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
  assert (tmp_path / 'depth.csv').read_text().count('\n') == 7


def test_it_is_evaluated_on_other_data_if_its_module_reads_their_name(
  finished, capsys, tmp_path, monkeypatch
):
  folder, summary = finished
  words = ('--data=another text', '--depths=none')
  found, _ = evaluated(capsys, folder, tmp_path, *words)
  assert found['data'] == 'another text'
  made = config()
  made.data.name = 'another text'
  batch = own_network.data(made).tests['test'].take(np.arange(37))
  params, scales = export.load_parameters(folder)
  loss, _ = own_network.loss(None)(params, scales, batch, None)
  assert found['measures']['test_loss'] == pytest.approx(float(loss), rel=1e-5)
  assert found['measures']['test_loss'] != summary['test_loss']
  same = own_network.data(config())
  monkeypatch.setattr(own_network, 'data', lambda config: same)
  said = evaluated(capsys, folder, tmp_path, *words)
  assert 'let it read config.data.name' in said


def test_it_is_not_evaluated_by_another_module(
  finished, capsys, tmp_path, monkeypatch
):
  folder, _ = finished
  made = config()
  made.model.options.width = 4
  other = own_network.network(made)
  monkeypatch.setattr(own_network, 'network', lambda config: other)
  said = evaluated(capsys, folder, tmp_path)
  assert 'the parameter blocks/in of the run has the shape (4, 8, 8)' in said
  monkeypatch.setitem(sys.modules, 'own_network', None)  # As if it were gone.
  said = evaluated(capsys, folder, tmp_path)
  assert said.startswith('error: model.module is ')
  assert 'cannot be imported' in said


def test_commands_that_need_classes_refuse_it(finished, capsys):
  folder, _ = finished
  for main, words, says in (
    (predict_command.main, ['x.png'], 'names no classes'),
    (export_command.main, ['--to=torch'], 'use --to=safetensors'),
  ):
    assert main([str(folder), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert 'own_network' in line


@pytest.mark.skipif(
  importlib.util.find_spec('safetensors') is None,
  reason='safetensors is not installed',
)
def test_safetensors_hold_its_parameters(finished, capsys, tmp_path):
  from safetensors import safe_open

  path = tmp_path / 'net.safetensors'
  words = [str(finished[0]), '--to=safetensors', f'--out={path}']
  assert export_command.main(words) == 0
  params, scales = export.load_parameters(finished[0])
  with safe_open(path, 'numpy') as file:
    assert file.metadata() == {'module': '"own_network"'}
    np.testing.assert_array_equal(
      file.get_tensor('params/blocks/in'), params['blocks']['in']
    )
    np.testing.assert_array_equal(
      file.get_tensor('scales/blocks'), scales['blocks']
    )


class Pair(NamedTuple):
  one: Any
  other: Any


@pytest.mark.parametrize('node', [lambda *both: both, Pair])
def test_its_parameters_are_read_in_their_nodes(node, tmp_path, monkeypatch):
  make = own_network.network

  def network(made):
    init, chains = make(made)
    more = {3: jnp.zeros(2), 12: node(jnp.zeros(1), jnp.zeros(1))}
    return module_task.Network(lambda s: {**init(s), 'more': more}, chains)

  monkeypatch.setattr(own_network, 'network', network)
  train.train(config(num_rounds=1), tmp_path)
  begun = network(config()).init(0)
  like = begun if node is Pair else None
  params, _ = export.load_parameters(tmp_path, like)
  assert jax.tree.structure(params) == jax.tree.structure(begun)
  with pytest.raises(ValueError, match='blocks/in is missing in like'):
    export.load_parameters(tmp_path, {'more': begun['more']})


def test_it_goes_on_to_the_same_end(finished, tmp_path, monkeypatch):
  test = MeanLoss.__call__

  def signal_and_test(self, state):
    os.kill(os.getpid(), signal.SIGTERM)
    return test(self, state)

  monkeypatch.setattr(MeanLoss, '__call__', signal_and_test)
  with pytest.raises(Interrupted, match='after round 2'):
    train.train(config(), tmp_path)
  monkeypatch.setattr(MeanLoss, '__call__', test)
  log = rows(tmp_path)
  assert [row['round'] for row in log] == [1, 2]
  summary = train.train(config(), tmp_path)
  assert summary['params_hash'] == finished[1]['params_hash']
  assert rows(tmp_path)[:2] == log  # They took the same seconds.


@pytest.mark.parametrize(
  'protocol', rest_is_slow(['local_sgd', 'data_parallel'], ['local_sgd'])
)
def test_baselines_cut_nothing(protocol, tmp_path):
  summary = train.train(config(protocol=protocol, num_rounds=1), tmp_path)
  assert summary['num_blocks'] == {}
  assert summary['test_loss'] > 0


def test_a_module_may_bring_an_optimizer(tmp_path, monkeypatch):
  """Updates of zero leave the parameters as they began."""
  monkeypatch.setattr(
    own_network, 'optimizer', lambda *_: optax.set_to_zero(), raising=False
  )
  train.train(config(num_rounds=1), tmp_path)
  params, _ = export.load_parameters(tmp_path)
  begun = own_network.network(config()).init(0)
  jax.tree.map(np.testing.assert_array_equal, params, begun)


def test_a_module_whose_network_has_changed_is_refused(tmp_path, monkeypatch):
  train.train(config(num_rounds=1), tmp_path)
  wider = config(num_rounds=2)
  wider.model.options.width = 16
  network = own_network.network(wider)
  monkeypatch.setattr(own_network, 'network', lambda _: network)
  with pytest.raises(ConfigError, match=r'are .*8.* in the checkpoint, but'):
    train.train(config(num_rounds=2), tmp_path)
  longer = config(num_rounds=2)
  longer.model.options.blocks = 6
  monkeypatch.undo()
  network = own_network.network(longer)
  monkeypatch.setattr(own_network, 'network', lambda _: network)
  for protocol in ('resist', 'local_sgd'):
    with pytest.raises(ConfigError, match=r'are \(4, .* checkpoint, but \(6, '):
      train.train(config(num_rounds=2, protocol=protocol), tmp_path)


def test_memory_counts_every_moment_of_a_module(tmp_path, monkeypatch):
  """And arithmetic is not read from programs that may loop over blocks."""
  for count, made in ((0, optax.sgd(0.1)), (2, optax.adamw(0.1))):
    monkeypatch.setattr(
      own_network, 'optimizer', lambda *_, made=made: made, raising=False
    )
    with jax.numpy_dtype_promotion('standard'):  # Adam mixes dtypes.
      summary = train.train(config(num_rounds=1), tmp_path / str(count))
    memory = summary['memory_per_device']['predicted']
    assert memory['optimizer'] == count * memory['parameters']
    assert summary['flops_per_image']['compiled'] is None


@pytest.mark.parametrize(
  ('optimizer', 'parts'),
  rest_is_slow([(optax.adam, 3), (optax.sgd, 1)], quick=[(optax.adam, 3)]),
)
def test_the_moments_of_a_module_count_as_many_as_they_are(
  optimizer, parts, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    own_network,
    'optimizer',
    lambda config, schedule: optimizer(schedule),
    raising=False,
  )
  carried = config(num_rounds=1)
  carried.optimizer.carry_momentum = True
  with jax.numpy_dtype_promotion('standard'):  # Adam mixes dtypes.
    summary = train_and_compare(carried, tmp_path)
    carried.optimizer.carry_momentum = False
    alone = phases.describe(setup.prepare(carried), 'resist').bytes_per_round
  assert summary['bytes_per_round'] == parts * alone


def test_a_module_of_several_optimisers_goes_on_with_their_moments(
  tmp_path, monkeypatch
):
  def several(config, schedule):
    kinds = {'a': optax.sgd(schedule, momentum=0.9), 'b': optax.sgd(schedule)}
    return optax.multi_transform(
      kinds,
      lambda params: jax.tree.map_with_path(
        lambda path, _: 'a' if path[0].key == 'blocks' else 'b', params
      ),
    )

  monkeypatch.setattr(own_network, 'optimizer', several, raising=False)
  hashes = []
  for folder, ends in (('at once', (3,)), ('in parts', (1, 3))):
    for rounds in ends:
      made = config(num_rounds=rounds, checkpoint_every=1)
      made.optimizer.carry_momentum = True
      made.optimizer.schedule = 'constant'
      summary = train.train(made, tmp_path / folder)
    hashes.append(summary['params_hash'])
  assert hashes[0] == hashes[1]


def test_a_start_that_is_refused_leaves_the_workdir_free(tmp_path, monkeypatch):
  noise = optax.chain(optax.sgd(0.1), optax.add_noise(0.1, 0.0, key=0))
  monkeypatch.setattr(own_network, 'optimizer', lambda *_: noise, raising=False)
  made = config(num_rounds=1)
  made.optimizer.carry_momentum = True
  finish = config(num_rounds=3)
  finish.phases.update(full_after=1, protocol='data_parallel')
  with jax.numpy_dtype_promotion('standard'):  # Optax mixes dtypes.
    for refused in (made, finish):
      with pytest.raises(ConfigError, match='draws random numbers'):
        train.train(refused, tmp_path)
  # Only the first state of this one tells, when the config has been written.
  factored = optax.adafactor(0.1)
  monkeypatch.setattr(own_network, 'optimizer', lambda *_: factored)
  with jax.numpy_dtype_promotion('standard'):
    with pytest.raises(ConfigError, match='keeps a moment of shape'):
      train.train(made, tmp_path)
    assert not list(tmp_path.glob('*.json'))
    made.optimizer.carry_momentum = False  # As the line says.
    train.train(made, tmp_path)


def stand_still(monkeypatch):
  """Lets rounds change nothing, to see what else does."""
  monkeypatch.setattr(
    own_network, 'optimizer', lambda *_: optax.sgd(0.0), raising=False
  )


def rescale(_, params, factors):
  blocks = params['blocks']
  out = blocks['out'] * factors['blocks']
  return {**params, 'blocks': {**blocks, 'out': out}}


def test_other_workers_need_a_module_that_rescales(tmp_path, monkeypatch):
  stand_still(monkeypatch)
  train.train(config(num_rounds=1), tmp_path)
  before, scales = export.load_parameters(tmp_path)
  written = {p: p.read_bytes() for p in tmp_path.glob('*.json')}
  fewer = config(num_rounds=2, num_workers=2, num_devices=2)
  with pytest.raises(ConfigError, match='no function rescale'):
    train.train(fewer, tmp_path)
  assert {p: p.read_bytes() for p in tmp_path.glob('*.json')} == written

  monkeypatch.setattr(own_network, 'rescale', rescale, raising=False)
  train.train(fewer, tmp_path)
  after, others = export.load_parameters(tmp_path)
  np.testing.assert_allclose(
    after['blocks']['out'] * others['blocks'][0],
    before['blocks']['out'] * scales['blocks'][0],
    rtol=1e-6,
  )


def test_moments_of_own_optimisers_begin_anew_where_scales_change(
  tmp_path, monkeypatch
):
  """They may be squares, and a masked one has no array to rescale."""

  def several(config, schedule):
    kinds = {'a': optax.sgd(schedule), 'b': optax.adam(schedule)}
    return optax.multi_transform(
      kinds,
      lambda params: jax.tree.map_with_path(
        lambda path, _: 'a' if path[0].key == 'blocks' else 'b', params
      ),
    )

  monkeypatch.setattr(own_network, 'optimizer', several, raising=False)
  monkeypatch.setattr(own_network, 'rescale', rescale, raising=False)
  with jax.numpy_dtype_promotion('standard'):  # Adam mixes dtypes.
    for workers in (4, 2):
      made = config(
        num_rounds=6 - workers, num_workers=workers, num_devices=workers
      )
      made.optimizer.carry_momentum = True
      summary = train.train(made, tmp_path)
    assert summary['rounds'] == 4
    steps = optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation()
    monkeypatch.setattr(own_network, 'optimizer', lambda *_: steps)
    counting = config(num_rounds=1)
    counting.optimizer.carry_momentum = True
    train.train(counting, tmp_path / 'counting')
    counting.update(num_rounds=2, num_workers=2, num_devices=2)
    with pytest.raises(ConfigError, match='counts its updates'):
      train.train(counting, tmp_path / 'counting')
    monkeypatch.setattr(own_network, 'optimizer', several)
    # What the function itself raises is a line.
    monkeypatch.setattr(own_network, 'rescale', lambda *_: {}['blocks'])
    made = config(num_rounds=6)
    made.optimizer.carry_momentum = True
    with pytest.raises(ConfigError, match=r'rescale\(config, params, factors'):
      train.train(made, tmp_path)


def test_a_chain_may_lie_inside_a_dictionary(tmp_path, monkeypatch):
  network, loss = own_network.network, own_network.loss

  def nested(made):
    flat = network(made)

    def init(seed):
      params = flat.init(seed)
      return {'tower': {'blocks': params.pop('blocks')}, **params}

    return flat._replace(init=init, chains=('tower/blocks',))

  def nested_loss(made):
    inner = loss(made)

    def loss_fn(params, present, batch, key):
      params = {**params, 'blocks': params['tower']['blocks']}
      return inner(params, {'blocks': present['tower/blocks']}, batch, key)

    return loss_fn

  monkeypatch.setattr(own_network, 'network', nested)
  monkeypatch.setattr(own_network, 'loss', nested_loss)
  stand_still(monkeypatch)
  train.train(config(num_rounds=1), tmp_path)
  params, scales = export.load_parameters(tmp_path)
  assert set(scales) == {'tower/blocks'}

  def rescale(_, params, factors):
    return rescaled_blocks(params, factors, lambda name: name == 'out')

  monkeypatch.setattr(own_network, 'rescale', rescale, raising=False)
  fewer = config(num_rounds=2, num_workers=2, num_devices=2)
  train.train(fewer, tmp_path)
  after, _ = export.load_parameters(tmp_path)
  np.testing.assert_allclose(
    after['tower']['blocks']['out'], params['tower']['blocks']['out'] / 2
  )


def image_network(_):
  def draw(seed):
    rng = np.random.default_rng(seed)
    return {
      'first': rng.normal(size=(64, 10)).astype(np.float32) / 8,
      'blocks': rng.normal(size=(4, 10, 10)).astype(np.float32) / 8,
    }

  return module_task.Network(draw, ('blocks',))


def image_loss(_):
  def loss_fn(params, present, batch, key):
    del key
    images, labels = batch
    x = images.reshape(len(images), -1) @ params['first']
    for k, held in enumerate(present['blocks']):
      x = x + held * jnp.tanh(x @ params['blocks'][k])
    losses = optax.softmax_cross_entropy_with_integer_labels(x, labels)
    return losses.mean(), {}

  return loss_fn


def test_images_come_augmented_and_normalised(tmp_path, monkeypatch):
  """Without `data` the config names the data: here digits."""
  monkeypatch.delattr(own_network, 'data')
  seen = []

  def loss(made):
    loss_fn = image_loss(made)

    def changed(params, present, batch, key):
      images, labels = batch
      seen.append((images.dtype, labels.dtype, key is None))
      return loss_fn(params, present, batch, key)

    return changed

  monkeypatch.setattr(own_network, 'network', image_network)
  monkeypatch.setattr(own_network, 'loss', loss)
  summary = train.train(config(num_rounds=2), tmp_path)
  assert summary['class_names'] == [str(i) for i in range(10)]
  assert summary['image_shape'] == [8, 8, 1]
  kinds = {(str(a), str(b)) for a, b, _ in seen}
  assert kinds == {('float32', 'int32')}
  assert {c for *_, c in seen} == {True, False}
  assert summary['test_loss'] < 10


def test_images_are_evaluated_without_those_of_the_training(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.delattr(own_network, 'data')
  monkeypatch.setattr(own_network, 'network', image_network)
  monkeypatch.setattr(own_network, 'loss', image_loss)
  digits = data.load('digits')
  first, test = digits.train, digits.tests['test']
  given = data.from_arrays(
    first.images, first.labels, test_images=test.images, test_labels=test.labels
  )
  summary = train.train(config(num_rounds=2), tmp_path / 'run', dataset=given)
  np.savez(tmp_path / 'a.npz', images=test.images, labels=test.labels)
  found, _ = evaluated(
    capsys, tmp_path / 'run', tmp_path, f'--data={tmp_path / "a.npz"}'
  )
  assert found['measures']['a_loss'] == pytest.approx(summary['test_loss'])


def test_a_loss_draws_with_a_key_of_its_own(monkeypatch):
  """Not with that of its images, nor with that of the group's other devices."""
  monkeypatch.delattr(own_network, 'data')
  drawn = []

  def loss(_):
    def loss_fn(params, present, batch, key):
      if key is not None:
        drawn.append(jax.random.key_data(key))
      return batch[0].mean(), {}

    return loss_fn

  monkeypatch.setattr(own_network, 'loss', loss)
  task = setup.prepare(config()).task
  images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int32)
  key, shapes = jax.random.key(3), task.shapes()
  params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  drawn.clear()
  task.make_loss({}, None)(params, {}, (images, labels), key)
  (own,) = drawn
  for taken in (key, *jax.random.split(key)[:1]):
    assert (own != jax.random.key_data(taken)).any()

  def on_devices(part):
    loss_fn = task.make_loss({}, 'data')
    loss_fn(params, {}, (part[0], labels[:2]), key)
    return drawn.pop()

  both = jax.vmap(on_devices, axis_name='data')(
    images.reshape(2, 1, 2, 8, 8, 1)
  )
  assert (both[0] != both[1]).any()


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'model.module': 'own_netwrok'}, 'cannot be imported.*folder that holds'),
    ({'model.module': './own_network.py'}, 'imports it, such as own_network'),
    ({'model.module': 'covering'}, 'defines no function network'),
    ({'partition_strided': True}, 'ResNets alone'),
    ({'evaluation.stream_blocks': True}, 'ResNets alone'),
    ({'model.gates': True}, 'model.gates is True, which ResNets alone'),
    ({'num_workers': 8, 'num_devices': 4}, 'chain blocks: .*8 workers'),
    ({'batch_size': 300}, '200 training examples'),
    ({'model.options': 3}, 'model.options is 3'),
    ({'model.module': ''}, 'names no module that reads it'),
  ],
)
def test_a_mistake_of_the_card_is_told_in_one_line(fields, words, tmp_path):
  made = config()
  with made.unlocked(), made.ignore_type():
    made.update_from_flattened_dict(fields)
  with pytest.raises(ConfigError, match=words) as told:
    train.train(made, tmp_path / 'run')
  assert '\n' not in str(told.value)
  assert not (tmp_path / 'run').exists()


def net(init):
  return module_task.Network(init, ('blocks',))


def seed_of_int(seed):
  return {'blocks': jnp.zeros((4, 2), jnp.int32)}


def fixed_loss(config):
  """Loops over all blocks of the network, and not over those it gets."""

  def loss_fn(params, present, batch, key):
    del present, key
    x = params['embedding'][batch['seen']]
    for k in range(config.model.options.blocks):
      x = x + jnp.tanh(x @ params['blocks']['in'][k])
    return jnp.square(x).mean(), {}

  return loss_fn


def scanned_loss(config):
  """Scans over as many blocks as the network has."""

  def loss_fn(params, present, batch, key):
    del present, key
    x = params['embedding'][batch['seen']]
    x, _ = jax.lax.scan(
      lambda x, w: (jnp.tanh(x @ w), None),
      x,
      params['blocks']['in'],
      length=config.model.options.blocks,
    )
    return jnp.square(x).mean(), {}

  return loss_fn


@pytest.mark.parametrize(
  ('name', 'value', 'words'),
  [
    ('network', lambda _: {'blocks': 1}, 'returned dict'),
    ('network', lambda c: c.model.options.depth, 'network.* failed .*depth'),
    ('network', lambda _: net(lambda seed: {}), "chains names 'blocks'"),
    ('network', lambda _: net(lambda seed: [1]), 'params is a list'),
    (
      'network',
      lambda _: net(lambda: {}),
      'network.config.*takes 0 positional',
    ),
    ('network', lambda _: net(seed_of_int), r"params\['blocks'\] is int32"),
    ('network', lambda _: net(sys.exit), 'network.config.* SystemExit: 0'),
    ('loss', lambda _: lambda *_: 3.0, 'must return the pair'),
    ('loss', lambda _: lambda *_: (jnp.ones(3), {}), 'take the mean'),
    ('loss', lambda _: lambda *_: (jnp.ones(()), {'loss': 1}), 'rounds use'),
    (
      'loss',
      lambda _: lambda *_: (jnp.ones(()), {'perplexity': jnp.ones(())}),
      'a name that tests use',
    ),
    ('loss', lambda _: None, 'not callable'),
    ('loss', fixed_loss, r"worker that holds \{'blocks': 1\}: .*a block that"),
    ('loss', scanned_loss, 'on a worker that holds .*scan got `length`'),
    (
      'loss',
      lambda _: lambda p, h, b, key: (jax.random.normal(key), {}),
      'in a test, where its key is None',
    ),
    ('optimizer', lambda *_: None, 'optimizer.* returned NoneType'),
    ('optimizer', lambda _: optax.sgd(1.0), 'optimizer.*takes 1 positional'),
    ('data', lambda _: [1, 2], 'returned list'),
    ('data', np.arange(3), 'data.config. of own_network failed'),
    ('network', functools.partial(jnp.ones, -1), 'network.config.* failed'),
    ('data', lambda _: own_network.from_tables({}, {'test': {}}), 'rows?'),
  ],
)
def test_a_mistake_of_the_module_is_told_in_one_line(
  name, value, words, tmp_path, monkeypatch
):
  monkeypatch.setattr(own_network, name, value, raising=False)
  with pytest.raises(ConfigError, match=words) as told:
    train.train(config(), tmp_path / 'run')
  assert '\n' not in str(told.value)
  assert not (tmp_path / 'run').exists()


def test_a_module_that_cannot_be_read_is_not_elsewhere(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  for name, text in (('broken', 'def f(:'), ('ends', 'import sys; sys.exit()')):
    (tmp_path / f'{name}.py').write_text(text)
    with pytest.raises(ConfigError, match=r'cannot be imported .*: mend it'):
      module_task.load(name)


CARD = """
from resist_jax.run.config import get_config as defaults

def get_config():
  config = defaults()
  config.model.module = 'mine'
  config.model.options = {'width': 8, 'blocks': 4, 'text': 0}
  config.num_rounds = config.local_steps = 2
  config.batch_size = 16
  return config
"""


@pytest.mark.slow
def test_the_command_line_trains_it_and_refuses_a_wrong_name(tmp_path):
  module = importlib.util.find_spec('own_network').origin
  (tmp_path / 'mine.py').write_bytes(pathlib.Path(module).read_bytes())
  (tmp_path / 'card.py').write_text(CARD)

  def start(*flags):
    return subprocess.run(
      [sys.executable, '-m', 'resist_jax', '--config=card.py', *flags],
      cwd=tmp_path, capture_output=True, text=True, check=False,
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    )  # fmt: skip

  wrong = start('--workdir=wrong', '--config.model.module=mein')
  assert wrong.returncode == 2
  assert wrong.stderr.startswith('error: model.module is')
  option = start('--workdir=wrong', '--config.model.options.widht=4')
  assert option.returncode == 2
  assert 'Did you mean model.options.width? The card sets b' in option.stderr
  assert len(wrong.stderr.splitlines()) == 1
  assert not (tmp_path / 'wrong').exists()
  done = start('--workdir=run', '--config.model.options.width=4')
  assert done.returncode == 0, done.stderr
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['test_perplexity'] > 1
  assert summary['model'] == 'mine'


def with_metrics(monkeypatch, change):
  """Lets the module's loss return other metrics."""
  make = own_network.loss

  def loss(config):
    loss_fn = make(config)

    def changed(params, present, batch, key):
      value, metrics = loss_fn(params, present, batch, key)
      return change(value, metrics, batch, key)

    return changed

  monkeypatch.setattr(own_network, 'loss', loss)


def test_a_metric_that_is_not_finite_stops_nothing(
  tmp_path, monkeypatch, capsys
):
  """A masked accuracy is 0 / 0 where the mask is empty."""
  with_metrics(
    monkeypatch,
    lambda loss, metrics, *_: (loss, {'accuracy': metrics['accuracy'] * 0 / 0}),
  )
  fields = {'log.report': True, 'checkpoint_every': 1, 'eval_every': 1}
  fields |= {'best_by': 'test_accuracy', 'early_stopping.patience': 1}
  fields['keep_best'] = True
  summary = train.train(config(num_rounds=2, **fields), tmp_path)
  assert summary['rounds'] == 2
  assert summary['test_accuracy'] is None
  assert summary['best']['value'] is None
  for row in rows(tmp_path):
    assert row['train_accuracy'] is row['test_accuracy'] is None
  assert 'NaN' not in (tmp_path / 'metrics.jsonl').read_text()
  assert (tmp_path / 'report.html').stat().st_size > 1000
  summary = train.train(config(num_rounds=3, **fields), tmp_path)
  assert summary['rounds'] == 3
  found, out = evaluated(capsys, tmp_path, tmp_path / 'out', '--depths=none')
  assert found['measures']['test_accuracy'] is None
  assert 'nan' in out


def test_a_metric_may_be_measured_in_tests_alone(tmp_path, monkeypatch):
  with_metrics(
    monkeypatch,
    lambda loss, metrics, _, key: (loss, metrics if key is None else {}),
  )
  train.train(config(num_rounds=1), tmp_path)
  (row,) = [row for row in rows(tmp_path) if row['round'] == 1]
  assert 'train_accuracy' not in row
  assert 0 <= row['test_accuracy'] <= 1


def test_tests_that_its_data_do_not_have_are_refused(tmp_path):
  for fields, says in (
    ({'data.validation': 0.1}, "validation names 0.1, .*no test 'validation'"),
    ({'data.extra_tests': ('More',)}, "names 'More', .* makes no test 'more'"),
  ):
    with pytest.raises(ConfigError, match=says):
      train.train(config(num_rounds=1, **fields), tmp_path)
    assert not list(tmp_path.iterdir())
  setup.prepare(config(**{'data.extra_tests': ('other',)}))


def test_another_set_is_evaluated_without_the_data_of_the_training(
  finished, capsys, tmp_path, monkeypatch
):
  make = own_network.data

  def data(made):
    if made.data.name == config().data.name:
      raise FileNotFoundError('the text of the training is gone')
    return make(made)

  monkeypatch.setattr(own_network, 'data', data)
  words = ('--data=another text', '--depths=none')
  found, _ = evaluated(capsys, finished[0], tmp_path, *words)
  assert found['measures']['test_loss'] > 0


def test_an_evaluation_needs_no_optimizer(
  finished, capsys, tmp_path, monkeypatch
):
  """It may be one that only an older version took."""
  monkeypatch.setattr(own_network, 'optimizer', lambda *_: 3, raising=False)
  with pytest.raises(ConfigError, match='it returned int'):
    setup.prepare(config())
  found, _ = evaluated(capsys, finished[0], tmp_path, '--depths=none')
  assert found['measures']['test_loss'] > 0


def test_a_metric_says_by_its_sign_which_value_is_better(tmp_path, monkeypatch):
  with_metrics(
    monkeypatch,
    lambda loss, metrics, *_: (loss, {'error': 1 - metrics['accuracy']}),
  )
  fields = {'eval_every': 1, 'best_by': 'test_error'}
  with pytest.raises(ConfigError, match='write -test_error if low ones are'):
    train.train(config(num_rounds=2, **fields), tmp_path)
  assert not list(tmp_path.iterdir())
  for sign, better in (('-', min), ('+', max)):
    fields['best_by'] = f'{sign}test_error'
    summary = train.train(config(num_rounds=2, **fields), tmp_path)
    errors = [row['test_error'] for row in rows(tmp_path)]
    assert summary['best']['value'] == better(errors)


def test_a_metric_may_be_any_number(tmp_path, monkeypatch):
  """As its check says: a number of Python, and fewer bits than 32."""
  with_metrics(
    monkeypatch,
    lambda loss, metrics, batch, _: (
      loss,
      {'n': 1 + len(batch), 'short': metrics['accuracy'].astype('bfloat16')},
    ),
  )
  summary = train.train(config(num_rounds=1), tmp_path)
  assert summary['test_n'] == 3
  assert 0 <= summary['test_short'] <= 1


def test_a_loss_may_loop_from_a_constant(tmp_path, monkeypatch):
  def summed(loss, metrics, *_):
    total = jax.lax.fori_loop(0, 4, lambda _, x: x + loss / 4, 0.0)
    return total, metrics

  hashes = {}
  for name in ('plain', 'loop'):
    hashes[name] = train.train(config(num_rounds=2), tmp_path / name)
    with_metrics(monkeypatch, summed)
  assert hashes['loop']['test_loss'] == pytest.approx(
    hashes['plain']['test_loss'], rel=1e-4
  )


def test_parameters_of_any_nodes_go_on_and_are_evaluated(
  tmp_path, monkeypatch, capsys
):
  pair = collections.namedtuple('pair', ('z', 'a'))
  plain, loss = own_network.network, own_network.loss

  def network(config):
    made = plain(config)

    def init(seed):
      params = made.init(seed)
      blocks = params['blocks']
      words = {0: params['embedding']}
      return {'words': words, 'blocks': pair(blocks['in'], blocks['out'])}

    return made._replace(init=init)

  def named(config):
    loss_fn = loss(config)

    def inner(params, *args):
      first, second = params['blocks'].z, params['blocks'].a
      blocks = {'in': first, 'out': second}
      return loss_fn({'embedding': params['words'][0], 'blocks': blocks}, *args)

    return inner

  fields = {'checkpoint_every': 1, 'optimizer.schedule': 'constant'}
  fields['optimizer.carry_momentum'] = True
  before = train.train(config(num_rounds=3, **fields), tmp_path / 'plain')
  monkeypatch.setattr(own_network, 'network', network)
  monkeypatch.setattr(own_network, 'loss', named)
  train.train(config(num_rounds=1, **fields), tmp_path / 'run')
  summary = train.train(config(num_rounds=3, **fields), tmp_path / 'run')
  assert summary['test_loss'] == before['test_loss']
  found, _ = evaluated(capsys, tmp_path / 'run', tmp_path / 'out')
  assert found['measures']['test_loss'] == pytest.approx(
    summary['test_loss'], rel=1e-5
  )


def test_an_evaluation_says_that_the_data_have_changed(
  finished, capsys, tmp_path, monkeypatch
):
  folder, _ = finished
  data = own_network.data

  def fewer(config):
    made = data(config)
    tests = {'test': made.tests['other'], 'other': made.tests['other']}
    return dataclasses.replace(made, tests=tests)

  monkeypatch.setattr(own_network, 'data', fewer)
  words = [str(folder), f'--out={tmp_path}', '--depths=none']
  assert evaluate_command.main(words) == 0
  said = capsys.readouterr().err
  assert 'split test: 37 examples then, 11 now' in said


def test_what_a_module_imports_is_no_function_of_its_own():
  module = types.ModuleType('own')
  exec('from resist_jax import data\nfrom resist_jax.run import optimizer\n'
       'def rescale(): pass', vars(module))  # fmt: skip
  assert module_task.function_of(module, 'data') is None
  assert module_task.function_of(module, 'optimizer') is None
  assert module_task.function_of(module, 'nothing') is None
  assert module_task.function_of(module, 'rescale') is module.rescale


def test_options_are_the_same_in_a_training_and_in_an_evaluation(
  tmp_path, monkeypatch, capsys
):
  network, seen = own_network.network, []

  def noted(config):
    seen.append(config.model.options.to_dict())
    return network(config)

  monkeypatch.setattr(own_network, 'network', noted)
  made = config(num_rounds=1)
  made.model.options.widths = (3, [4, 5])
  made.model.options.inner = {'sizes': [1]}
  train.train(made, tmp_path)
  evaluated(capsys, tmp_path, tmp_path / 'out', '--depths=none')
  assert seen[0]['widths'] == (3, (4, 5))
  assert seen[0]['inner'] == {'sizes': (1,)}
  assert all(options == seen[0] for options in seen)
