"""Accuracy by hand on a tiny network, and statistics that are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from resist_jax import data
from resist_jax.evaluate import Evaluator

SCALE = 0.4


def make_dataset(num_train=20, num_test=23):
  rng = np.random.default_rng(0)

  def split(count):
    images = rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)
    labels = rng.integers(0, tiny.CLASSES, count).astype(np.int32)
    return data.Split(images, labels)

  train = split(num_train)
  tests = {'test': split(num_test), 'validation': split(6)}
  mean, std = np.array([0.4], np.float32), np.array([0.2], np.float32)
  return data.Dataset('random', train, tests, tiny.CLASSES, mean, std)


def make(norm='batch', statistics_images=20, batch_size=10):
  net, dataset = tiny.network(2, norm=norm), make_dataset()
  scales = {tiny.CHAIN: jnp.full(2, SCALE)}
  evaluator = Evaluator(net, dataset, scales, batch_size, statistics_images)
  return net, dataset, scales, evaluator, tiny.init(net)


def prepared(images):
  x = (images.astype(np.float32) / 255 - 0.4) / 0.2
  return jnp.array(x, jnp.float32)


def test_both_accuracies_by_hand_with_an_odd_last_batch():
  net, dataset, scales, evaluator, params = make()
  stats = evaluator.statistics(params)
  found = evaluator(params)
  for name, split in dataset.tests.items():
    fixed = net.apply(
      {'params': params, 'batch_stats': stats}, prepared(split.images), scales
    )
    hits = (np.asarray(fixed).argmax(-1) == split.labels).mean()
    assert found[f'{name}_accuracy'] == pytest.approx(hits)

    paper = 0
    for start in range(0, len(split), 10):  # 10, 10 and 3 images.
      part = slice(start, start + 10)
      images = prepared(split.images[part])
      logits = net.apply({'params': params}, images, scales)
      paper += (np.asarray(logits).argmax(-1) == split.labels[part]).sum()
    assert found[f'{name}_accuracy_paper'] == pytest.approx(paper / len(split))
  assert found['test_accuracy'] != found['test_accuracy_paper']


def test_statistics_of_one_batch_are_that_batchs():
  net, dataset, scales, evaluator, params = make(batch_size=20)
  stats = evaluator.statistics(params)
  images = prepared(dataset.train.images)
  stem = net.apply(
    {'params': params}, images, scales, capture_intermediates=True,
    mutable=['intermediates'],
  )[1]['intermediates']['stem']['__call__'][0]  # fmt: skip
  norm = stats['stage1_head']['norm1']
  mean, square = stem.mean((0, 1, 2)), jnp.square(stem).mean((0, 1, 2))
  np.testing.assert_allclose(norm['mean'], mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(norm['mean_square'], square, rtol=1e-4)


def test_statistics_are_means_over_equal_batches():
  """So mean and mean square of the first norm are those of the whole sample."""
  whole, params = make(batch_size=20)[3:]
  parts = make(batch_size=5)[3]
  a, b = whole.statistics(params), parts.statistics(params)
  for name in ('mean', 'mean_square'):
    np.testing.assert_allclose(
      a['stage1_head']['norm1'][name],
      b['stage1_head']['norm1'][name],
      rtol=1e-4,
      atol=1e-6,
    )


def test_group_norm_needs_no_statistics():
  _, _, _, evaluator, params = make('group')
  found = evaluator(params)
  assert evaluator.statistics(params) == {}
  assert found['test_accuracy'] == found['test_accuracy_paper']


def test_the_predictor_does_not_depend_on_its_batch():
  _, dataset, _, evaluator, params = make()
  predict = evaluator.predictor(params)
  images = dataset.tests['test'].images
  together = predict(images)
  np.testing.assert_allclose(together.sum(-1), 1, rtol=1e-5)
  alone = jnp.concatenate([predict(images[i : i + 1]) for i in range(5)])
  np.testing.assert_allclose(together[:5], alone, rtol=1e-4, atol=1e-5)


def test_a_sample_smaller_than_a_batch_is_enough():
  evaluator, params = make(statistics_images=7, batch_size=10)[3:]
  stats = evaluator.statistics(params)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stats))
