"""Evaluation of the global network, gathered whole and block by block."""

import dataclasses
from functools import partial
import itertools
import re

from covering import checkerboard, rest_is_slow
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest
import tiny

from resist_jax import data, decomposition, models, rounds
from resist_jax.accounting import hlo
from resist_jax.decomposition import Assignment
from resist_jax.exchange import WORKER
from resist_jax.rounds.mesh import SHARDED
from resist_jax.rounds.state import holders, place_assignments
from resist_jax.run import block_walk, evaluate, export
from resist_jax.run.block_walk import BlockWalk
from resist_jax.run.evaluate import Evaluator, WholeNetwork

CHAIN = (tiny.CHAIN,)
BOTH = ('stage1_chain', 'stage2_chain')
BATCH = 5
WAYS = ('whole', 'walk')
both_ways = pytest.mark.parametrize('way', rest_is_slow(WAYS, ['walk']))


def make_dataset(num_train=23, num_test=38):
  """With batches of 5, each set ends in one of 3."""
  rng = np.random.default_rng(0)

  def split(count):
    images = rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)
    labels = rng.integers(0, tiny.CLASSES, count).astype(np.int32)
    return data.Split(images, labels)

  train = split(num_train)
  tests = {'test': split(num_test), 'validation': split(8)}
  mean, std = np.array([0.4], np.float32), np.array([0.2], np.float32)
  names = tuple(map(str, range(tiny.CLASSES)))
  return data.Dataset('random', train, tests, names, mean, std)


def make_network(lengths=(2, 3), **kwargs):
  """Two stages with chains; random numbers for parameters, also in norms."""
  sizes = tuple(1 + length for length in lengths)
  net = models.ResNet(tiny.CLASSES, sizes, widths=(8, 8), **kwargs)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    values = rng.normal(path[-1].key == 'scale', 0.2, leaf.shape)
    return values.astype(np.float32)

  return net, jax.tree.map_with_path(draw, tiny.init(net))


def hand_out(params, cut, num_workers, mesh, min_depth=0):
  """Returns a state whose blocks are assigned as for a round."""
  sharding = NamedSharding(mesh, SHARDED)
  shared, whole = decomposition.split(params, cut)
  assignments, chain, lengths = {}, {}, {}
  for i, name in enumerate(cut):
    lengths[name] = len(jax.tree.leaves(whole[name])[0])
    slots = decomposition.sample_slots(
      jax.random.key(i), lengths[name], num_workers, min_depth
    )
    assignments[name] = Assignment(np.asarray(slots))
    # Empty slots hold NaN, so that using one of them shows.
    chain[name] = jax.tree.map(
      lambda x, s=slots: np.concatenate([x, np.nan * x[:1]])[s], whole[name]
    )
  shared = jax.tree.map(lambda x: np.stack([x] * num_workers), shared)
  shared, chain = jax.device_put((shared, chain), sharding)
  placed = place_assignments(assignments, mesh)
  return rounds.State(shared, chain, placed, np.int32(0), lengths)


def make_evaluator(
  way, net, scales, mesh, batch_size=BATCH, statistics_images=23, at_once=32
):
  dataset = make_dataset()
  make = {
    'whole': WholeNetwork,
    'walk': partial(BlockWalk, batches_at_once=at_once),
  }[way]
  forward = make(net, dataset, scales, mesh)
  return Evaluator(forward, dataset, mesh.size, batch_size, statistics_images)


def make(
  way,
  cut=CHAIN,
  num_workers=2,
  num_devices=2,
  min_depth=0,
  group=1,
  lengths=(2, 3),
  form=None,
  **kwargs,
):
  """Returns the network, its parameters and scales, the evaluator, a state."""
  net, params = make_network(lengths, **(form or {}))
  mesh = rounds.make_mesh(num_devices, group)
  state = hand_out(params, cut, num_workers, mesh, min_depth)
  scales = {
    name: np.linspace(0.3, 0.9, length, dtype=np.float32)
    for name, length in state.num_blocks.items()
  }
  evaluator = make_evaluator(way, net, scales, mesh, **kwargs)
  return net, params, scales, evaluator, state


def prepared(images):
  return jnp.array((images / 255 - 0.4) / 0.2, jnp.float32)


def mixed(count):
  return np.random.default_rng(0).permutation(count)


def batches(count):
  """Batches of mixed examples, of which the last may be smaller."""
  return [mixed(count)[i : i + BATCH] for i in range(0, count, BATCH)]


def plainly(net, params, scales):
  """Computes statistics and logits by `network.apply` on whole parameters."""
  dataset = make_dataset()
  run = jax.jit(
    partial(
      net.clone(platform='gpu').apply,
      mutable=['batch_stats'],
      residual_scale=scales,
    )
  )

  def own(images):
    return run({'params': params}, prepared(images))

  # The sample is all of the training set here, less what fills no batch.
  measured = [
    own(dataset.train.images[part])[1].get('batch_stats', {})
    for part in batches(len(dataset.train))
    if len(part) == BATCH
  ]
  stats = jax.tree.map(lambda *x: sum(x) / len(x), *measured)
  variables = {'params': params, 'batch_stats': stats}
  splits = list(dataset.tests.values())
  images = np.concatenate([split.images for split in splits])
  together = run(variables, prepared(images))[0]
  fixed = np.split(together, [len(splits[0])])
  paper = [
    np.concatenate([own(split.images[p])[0] for p in batches(len(split))])
    for split in splits
  ]
  return stats, fixed, paper


def logits_seen(patch, evaluator, state):
  """Runs an evaluation; returns its result and all logits, in order."""
  walks = isinstance(evaluator.forward, BlockWalk)
  watch = _watch_walk if walks else _watch_whole
  seen = watch(patch, evaluator)
  found = evaluator(state)
  # The first ones come from training images, for the statistics.
  return found, np.concatenate(seen[-(-4 // evaluator.num_devices) :])


def _watch_walk(patch, evaluator):
  del evaluator
  seen, count = [], block_walk._count

  def listen(logits, labels):
    seen.append(np.asarray(logits)[np.asarray(labels) >= 0])
    return count(logits, labels)

  patch.setattr(block_walk, '_count', listen)
  return seen


def _watch_whole(patch, evaluator):
  """Records what the network returns inside the compiled program."""
  forward, by_device, seen = evaluator.forward, {}, []
  apply, program = models.ResNet.apply, forward.program

  def apply_and_record(self, *args, **kwargs):
    logits, measured = apply(self, *args, **kwargs)
    row = lax.axis_index(WORKER)
    jax.debug.callback(lambda d, x: by_device.update({int(d): x}), row, logits)
    return logits, measured

  def listen(*args):
    found = program(*args)
    jax.effects_barrier()
    rows = np.stack([by_device.pop(d) for d in range(evaluator.num_devices)])
    assert not by_device
    seen.append(rows[np.asarray(args[-1]) >= 0])
    return found

  patch.setattr(models.ResNet, 'apply', apply_and_record)
  patch.setattr(forward, 'program', listen)
  assert program._cache_size() == 0  # Nothing was traced without recording.
  return seen


# What is cut, S, D, and more.
CASES = {
  'several walks': (BOTH, 2, 1, {'at_once': 3}),
  'workers take turns, replicas': (BOTH, 4, 2, {'min_depth': 2}),
  'more workers than blocks': (BOTH, 4, 4, {'min_depth': 1}),
  'nothing is cut': ((), 4, 4, {}),
  'group norm': (CHAIN, 2, 2, {'form': {'norm': 'group'}}),
  'post-activation': (CHAIN, 2, 2, {'form': {'pre_activation': False}}),
  'bottleneck': (
    CHAIN,
    2,
    2,
    {'form': {'bottleneck': True, 'stem': 'imagenet'}},
  ),
}


@pytest.mark.parametrize(
  ('case', 'way'),
  rest_is_slow(
    list(itertools.product(CASES, WAYS)),
    quick=[
      ('several walks', 'walk'),
      ('workers take turns, replicas', 'whole'),
    ],
  ),
)
def test_evaluation_equals_the_assembled_network(case, way, monkeypatch):
  cut, workers, devices, kwargs = CASES[case]
  net, params, scales, evaluator, state = make(
    way, cut, workers, devices, **kwargs
  )
  want, fixed, paper = plainly(net, params, scales)
  found, logits = logits_seen(monkeypatch, evaluator, state)
  stats = evaluator.statistics(state)
  assert jax.tree.structure(stats) == jax.tree.structure(want)
  close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, stats, want)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(stats))

  expected = [part for pair in zip(fixed, paper, strict=True) for part in pair]
  close(logits, np.concatenate(expected), rtol=1e-3, atol=1e-4)
  accuracies = {}
  for i, (name, split) in enumerate(make_dataset().tests.items()):
    in_order, in_batches = split.labels, split.labels[mixed(len(split))]
    for key, want, labels in (
      ('accuracy', fixed, in_order),
      ('accuracy_paper', paper, in_batches),
    ):
      hits = np.asarray(want[i]).argmax(-1) == labels
      accuracies[f'{name}_{key}'] = hits.mean()
  assert found.measures == accuracies
  assert found.broken == {}


def test_sets_may_be_sorted_by_class():
  """Batches of one class each would hide how far the classes are apart."""
  *_, evaluator, state = make('whole', batch_size=20, statistics_images=200)
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(2, dtype=np.int32), 100)
  dark = rng.integers(0, 100, (200, 4, 4, 1))
  images = (dark + 150 * labels[:, None, None, None]).astype(np.uint8)
  found = []
  for order in (np.arange(200), rng.permutation(200)):
    split = data.Split(images[order], labels[order])
    dataset = dataclasses.replace(
      evaluator.dataset, train=split, tests={'test': split}
    )
    tried = dataclasses.replace(evaluator, dataset=dataset)
    found.append((tried.statistics(state), tried(state).measures))
  (ours, measures), (theirs, others) = found
  jax.tree.map(partial(np.testing.assert_allclose, rtol=0.3), ours, theirs)
  accuracies = measures['test_accuracy_paper'], others['test_accuracy_paper']
  assert abs(accuracies[0] - accuracies[1]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize('group', [1, 2])
def test_both_ways_give_the_same(group):
  """On lone devices and on groups of them."""
  devices = {'num_devices': 2 * group, 'group': group}
  cases = [make(way, BOTH, **devices) for way in WAYS]
  stats = [evaluator.statistics(state) for *_, evaluator, state in cases]
  close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, *stats)
  whole, walk = (evaluator(state) for *_, evaluator, state in cases)
  assert whole.measures == walk.measures
  # A walk over training images and one over tests fetch what is gathered once.
  assert walk.wire_bytes == 2 * whole.wire_bytes > 0


@pytest.mark.parametrize('group', rest_is_slow([1, 2], [2]))
def test_gathering_a_chain_sends_as_many_bytes_as_predicted(group):
  *_, evaluator, state = make('whole', BOTH, 4, 4, min_depth=1, group=group)
  _, predicted = evaluator.forward.gather(state)
  read, mesh = 0, evaluator.forward._mesh
  for name, blocks in state.chain.items():
    slots = np.asarray(state.assignments[name].slots)
    where = holders(slots, state.num_blocks[name])
    program = evaluate.gather_blocks.lower(mesh, blocks, *where).compile()
    read += hlo.wire_bytes(program.as_text(), {}, group)
  assert predicted == read > 0


def test_no_device_ever_holds_a_chain_that_is_cut(monkeypatch):
  """A walk builds it neither inside a program nor between two."""
  length = 7  # No other array has a dimension of 7.
  _, params, _, evaluator, state = make(
    'walk', num_workers=4, num_devices=4, lengths=(2, length)
  )
  programs = {}

  def watch(name, jitted):
    def run(*args):
      # Mesh and network are the same in all calls.
      leaves = jax.tree.leaves(args[2:] if name == 'apply_piece' else args)
      key = name, *(str(getattr(leaf, 'shape', leaf)) for leaf in leaves)
      if key not in programs:
        programs[key] = jitted.lower(*args).compile()
      shapes = [x.shape for x in jax.live_arrays() if x.ndim > 1]
      assert not [shape for shape in shapes if length in shape]
      return jitted(*args)

    return run

  for name in ('apply_piece', 'fetch_block', '_count'):
    program = getattr(block_walk, name)
    monkeypatch.setattr(block_walk, name, watch(name, program))
  evaluator(state)
  for program in programs.values():
    assert not re.search(rf'\[(\d+,)*{length}(,\d+)*\]', program.as_text())
  # A device receives one block, and holds nothing much larger meanwhile.
  (fetch,) = (
    program for key, program in programs.items() if 'fetch_block' in key
  )
  sizes, block = fetch.memory_analysis(), sum(
    x[0].nbytes for x in jax.tree.leaves(params[tiny.CHAIN])
  )  # fmt: skip
  assert block <= sizes.output_size_in_bytes < 1.1 * block
  assert sizes.temp_size_in_bytes < 3 * block


def test_a_walk_compiles_few_programs():
  """One for a kind of piece, a way of batch norm and a size of batch."""
  net, *_, evaluator, state = make('walk', lengths=(3, 4))
  block_walk.apply_piece.clear_cache()
  evaluator(state)
  count = block_walk.apply_piece._cache_size()
  kinds = len({name for name, _ in net.pieces()})
  # Stem and classifier have no norm, so both ways of it share a program.
  assert count == 3 * kinds - 2
  evaluator(state)
  assert block_walk.apply_piece._cache_size() == count


def test_a_gathered_network_compiles_few_programs():
  """One for a way of batch norm and a size of batch, one for each chain."""
  *_, evaluator, state = make('whole', BOTH)
  evaluate.gather_blocks.clear_cache()
  for _ in range(2):
    evaluator(state)
    assert evaluator.forward.program._cache_size() == 3
    assert evaluate.gather_blocks._cache_size() == 2


@both_ways
def test_statistics_of_one_batch_are_those_of_the_batch(way):
  net, params, _, evaluator, state = make(way, batch_size=23)
  stats = evaluator.statistics(state)
  images = prepared(make_dataset().train.images)
  stem = net.apply(
    {'params': params}, images, capture_intermediates=True,
    mutable=['intermediates'],
  )[1]['intermediates']['stem']['__call__'][0]  # fmt: skip
  norm = stats['stage1_head']['norm1']
  mean, square = stem.mean((0, 1, 2)), jnp.square(stem).mean((0, 1, 2))
  np.testing.assert_allclose(norm['mean'], mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(norm['mean_square'], square, rtol=1e-4)


def test_images_are_counted_whose_logits_are_not_finite():
  logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]]
  logits[[1, 2, 4], [1, 0, 2]] = np.nan, np.inf, -np.inf
  labels = np.array([0, 1, 2, 1, -1])  # The last row is filled up.
  # The largest of numbers that include NaN is NaN: that row counts as right.
  assert evaluate.count(logits, labels).tolist() == [2, 2]
  stacked = np.stack([logits, np.ones_like(logits)])
  both = evaluate.count(stacked, np.stack([labels, labels]))
  assert both.tolist() == [[2, 2], [1, 0]]


@pytest.mark.parametrize(
  ('where', 'way'), checkerboard(['head', CHAIN[0]], WAYS)
)
def test_a_network_that_gives_no_numbers_does_not_pass_as_tested(where, way):
  """In shared parts, and in the blocks of a chain."""
  *_, evaluator, state = make(way)

  def poison(path, x):
    if where not in jax.tree_util.keystr(path):
      return x
    spoilt = np.array(x)
    spoilt[..., 0] = np.inf
    return jax.device_put(spoilt, x.sharding)

  held = state.shared, state.chain
  shared, chain = jax.tree_util.tree_map_with_path(poison, held)
  found = evaluator(state._replace(shared=shared, chain=chain))
  assert found.broken == {
    'test_accuracy': 38,
    'test_accuracy_paper': 38,
    'validation_accuracy': 8,
    'validation_accuracy_paper': 8,
  }


@both_ways
def test_group_norm_needs_no_statistics(way):
  *_, evaluator, state = make(way, form={'norm': 'group'})
  found = evaluator(state).measures
  assert evaluator.statistics(state) == {}
  assert found['test_accuracy'] == found['test_accuracy_paper']


@both_ways
def test_the_predictor_does_not_depend_on_its_batch(way):
  net, params, scales, evaluator, state = make(way)
  variables = {'params': params, 'batch_stats': evaluator.statistics(state)}
  dataset = evaluator.dataset
  shape = dataset.train.images.shape[1:]
  predict = export.Predictor(
    net, variables, scales, dataset.mean, dataset.std, dataset.class_names,
    shape,
  )  # fmt: skip
  images = dataset.tests['test'].images
  together = predict(images)
  np.testing.assert_allclose(together.sum(-1), 1, rtol=1e-5)
  alone = jnp.concatenate([predict(images[i : i + 1]) for i in range(3)])
  np.testing.assert_allclose(together[:3], alone, rtol=1e-4, atol=1e-5)


@both_ways
def test_a_sample_smaller_than_a_batch_is_enough(way):
  *_, evaluator, state = make(way, statistics_images=7, batch_size=10)
  stats = evaluator.statistics(state)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))
