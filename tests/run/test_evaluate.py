"""The global model, met block by block, is the one that can be assembled."""

from functools import partial
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest
import tiny

from resist_jax import data, decomposition, models
from resist_jax.rounds import state as state_lib
from resist_jax.run import evaluate
from resist_jax.run.evaluate import Evaluator

CHAIN = (tiny.CHAIN,)
BOTH = ('stage1_chain', 'stage2_chain')
BATCH = 5


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
  return data.Dataset('random', train, tests, tiny.CLASSES, mean, std)


def make_network(lengths=(2, 3), **kwargs):
  """Two stages with chains; random numbers for parameters, also in norms."""
  sizes = tuple(1 + length for length in lengths)
  net = models.ResNet(tiny.CLASSES, sizes, widths=(8, 8), **kwargs)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    values = rng.normal(path[-1].key == 'scale', 0.2, leaf.shape)
    return values.astype(np.float32)

  shapes = jax.eval_shape(lambda: tiny.init(net))
  return net, jax.tree.map_with_path(draw, shapes)


def hand_out(params, cut, num_workers, num_devices, min_depth=0):
  """Returns `(mesh, shared, chain, slots)`, blocks dealt as for a round."""
  mesh = state_lib.make_mesh(num_devices)
  sharding = NamedSharding(mesh, state_lib.SHARDED)
  shared, whole = decomposition.split(params, cut)
  slots, chain = {}, {}
  for i, name in enumerate(cut):
    length = len(jax.tree.leaves(whole[name])[0])
    deal = decomposition.sample_slots(
      jax.random.key(i), length, num_workers, min_depth
    )
    slots[name] = np.asarray(deal)
    # An empty slot holds what nobody may use.
    chain[name] = jax.tree.map(
      lambda x, s=slots[name]: np.concatenate([x, np.nan * x[:1]])[s],
      whole[name],
    )
  shared = jax.tree.map(lambda x: np.stack([x] * num_workers), shared)
  return mesh, *jax.device_put((shared, chain), sharding), slots


def make(
  cut=CHAIN,
  num_workers=2,
  num_devices=2,
  min_depth=0,
  batch_size=BATCH,
  statistics_images=23,
  at_once=32,
  **kwargs,
):
  """Returns the network, its parameters, the evaluator and what it takes."""
  net, params = make_network(**kwargs)
  mesh, *parts = hand_out(params, cut, num_workers, num_devices, min_depth)
  scales = {
    name: jnp.linspace(0.3, 0.9, net.stage_sizes[models.stage_of(name) - 1] - 1)
    for name in cut
  }
  evaluator = Evaluator(
    net, make_dataset(), scales, batch_size, statistics_images, mesh, at_once
  )
  return net, params, evaluator, parts


def prepared(images):
  return jnp.array((images / 255 - 0.4) / 0.2, jnp.float32)


def batches(count):
  return [slice(i, min(i + BATCH, count)) for i in range(0, count, BATCH)]


def plainly(net, params, scales):
  """The same by `network.apply` on whole parameters: statistics and logits."""
  dataset = make_dataset()
  run = jax.jit(
    partial(
      net.clone(for_cpu=False).apply,
      mutable=['batch_stats'],
      residual_scale=scales,
    )
  )

  def own(images):
    return run({'params': params}, prepared(images))

  # The sample is all of the training set here, less what fills no batch.
  measured = [
    own(dataset.train.images[part])[1].get('batch_stats', {})
    for part in batches(len(dataset.train) // BATCH * BATCH)
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


def logits_seen(patch, evaluator, parts):
  """Runs an evaluation; returns its result and all logits, in order."""
  seen, hits = [], evaluate._hits

  def listen(logits, labels):
    seen.append(np.asarray(logits)[np.asarray(labels) >= 0])
    return hits(logits, labels)

  patch.setattr(evaluate, '_hits', listen)
  found = evaluator(*parts)
  # The first to come are those of the walk over training images.
  return found, np.concatenate(seen[-(-4 // evaluator._mesh.size) :])


# What is cut, S, D, and more.
CASES = {
  'several walks': (BOTH, 2, 1, {'at_once': 3}),
  'workers take turns, copies': (BOTH, 4, 2, {'min_depth': 2}),
  'more workers than blocks': (BOTH, 4, 4, {'min_depth': 1}),
  'nothing is cut': ((), 4, 4, {}),
  'group norm': (CHAIN, 2, 2, {'norm': 'group'}),
  'post-activation': (CHAIN, 2, 2, {'pre_activation': False}),
  'bottleneck': (CHAIN, 2, 2, {'bottleneck': True, 'stem': 'imagenet'}),
}


@pytest.mark.parametrize('case', CASES)
def test_it_equals_the_assembled_network(case, monkeypatch):
  cut, workers, devices, kwargs = CASES[case]
  net, params, evaluator, parts = make(cut, workers, devices, **kwargs)
  want, fixed, paper = plainly(net, params, evaluator.scales)
  stats = evaluator.statistics(*parts)
  assert jax.tree.structure(stats) == jax.tree.structure(want)
  close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, stats, want)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(stats))

  found, logits = logits_seen(monkeypatch, evaluator, parts)
  expected = [part for pair in zip(fixed, paper, strict=True) for part in pair]
  close(logits, np.concatenate(expected), rtol=1e-3, atol=1e-4)
  for i, (name, split) in enumerate(make_dataset().tests.items()):
    for key, want in (('accuracy', fixed), ('accuracy_paper', paper)):
      hits = np.asarray(want[i]).argmax(-1) == split.labels
      assert found[f'{name}_{key}'] == hits.mean()


def test_no_device_ever_holds_a_chain_that_is_cut(monkeypatch):
  """Neither inside a program, nor between two."""
  length = 7  # No other array has a dimension of 7.
  _, params, evaluator, parts = make(
    num_workers=4, num_devices=4, lengths=(2, length)
  )
  programs = {}

  def watch(name, jitted):
    def run(*args):
      # Mesh and network are the same in all calls.
      leaves = jax.tree.leaves(args[2:] if name == '_apply' else args)
      key = name, *(str(getattr(leaf, 'shape', leaf)) for leaf in leaves)
      if key not in programs:
        programs[key] = jitted.lower(*args).compile()
      shapes = [x.shape for x in jax.live_arrays() if x.ndim > 1]
      assert not [shape for shape in shapes if length in shape]
      return jitted(*args)

    return run

  for name in ('_apply', '_fetch', '_hits'):
    monkeypatch.setattr(evaluate, name, watch(name, getattr(evaluate, name)))
  evaluator(*parts)
  for program in programs.values():
    assert not re.search(rf'\[(\d+,)*{length}(,\d+)*\]', program.as_text())
  # What comes to a device is one block, and nothing much larger on the way.
  (fetch,) = (program for key, program in programs.items() if '_fetch' in key)
  sizes, block = fetch.memory_analysis(), sum(
    x[0].nbytes for x in jax.tree.leaves(params[tiny.CHAIN])
  )  # fmt: skip
  assert block <= sizes.output_size_in_bytes < 1.1 * block
  assert sizes.temp_size_in_bytes < 3 * block


def test_few_programs_are_compiled():
  """One for a kind of piece, a way of batch norm and a size of batch."""
  net, _, evaluator, parts = make(lengths=(3, 4))
  evaluate._apply.clear_cache()
  evaluator(*parts)
  count = evaluate._apply._cache_size()
  kinds = len({name for name, _ in net.pieces()})
  # Stem and classifier have no norm: two ways fall together.
  assert count == 3 * kinds - 2
  evaluator(*parts)
  assert evaluate._apply._cache_size() == count


def test_statistics_of_one_batch_are_that_batchs():
  net, params, evaluator, parts = make(batch_size=23)
  stats = evaluator.statistics(*parts)
  images = prepared(make_dataset().train.images)
  stem = net.apply(
    {'params': params}, images, capture_intermediates=True,
    mutable=['intermediates'],
  )[1]['intermediates']['stem']['__call__'][0]  # fmt: skip
  norm = stats['stage1_head']['norm1']
  mean, square = stem.mean((0, 1, 2)), jnp.square(stem).mean((0, 1, 2))
  np.testing.assert_allclose(norm['mean'], mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(norm['mean_square'], square, rtol=1e-4)


def test_group_norm_needs_no_statistics():
  *_, evaluator, parts = make(norm='group')
  found = evaluator(*parts)
  assert evaluator.statistics(*parts) == {}
  assert found['test_accuracy'] == found['test_accuracy_paper']


def test_the_predictor_does_not_depend_on_its_batch():
  _, params, evaluator, parts = make()
  predict = evaluator.predictor(params, evaluator.statistics(*parts))
  images = make_dataset().tests['test'].images
  together = predict(images)
  np.testing.assert_allclose(together.sum(-1), 1, rtol=1e-5)
  alone = jnp.concatenate([predict(images[i : i + 1]) for i in range(3)])
  np.testing.assert_allclose(together[:3], alone, rtol=1e-4, atol=1e-5)


def test_a_sample_smaller_than_a_batch_is_enough():
  *_, evaluator, parts = make(statistics_images=7, batch_size=10)
  stats = evaluator.statistics(*parts)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))
