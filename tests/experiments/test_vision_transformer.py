"""The vision transformer sees each pixel once, and reads any set of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tfds_sets

from experiments import vision_transformer as vit
from experiments.transformer import Shape
from resist_jax import data
from resist_jax.errors import ConfigError


def test_a_patch_is_a_part_of_the_image():
  images = np.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
  found = np.asarray(vit.patches(jnp.asarray(images)))
  assert found.shape == (2, 16, 18)
  want = images[1, 2:4, 9:12].reshape(-1)  # The second row, the last column.
  np.testing.assert_array_equal(found[1, 7], want)


def test_all_patches_count_and_their_places_matter():
  shape = Shape(2, 16, 2, 16)
  params = jax.jit(vit.init, static_argnums=(0, 1, 2))(shape, 4, 10, 0)
  kernel = jax.random.normal(jax.random.key(1), (16, 10))
  params['classifier'] = kernel
  images = np.random.default_rng(2).normal(size=(1, 8, 8, 1))
  images = images.astype(np.float32)

  logits = jax.jit(vit.logits, static_argnums=3)

  def found(x):
    return np.asarray(logits(params, jnp.ones(2), x, 2))

  for row, column in np.ndindex(4, 4):
    other = images.copy()
    other[:, 2 * row, 2 * column] += 1
    assert np.abs(found(other) - found(images)).max() > 1e-4
  turned = np.roll(images, 2, axis=1)  # The same patches elsewhere.
  assert np.abs(found(turned) - found(images)).max() > 1e-4
  params['position'] = jnp.zeros_like(params['position'])
  np.testing.assert_allclose(found(turned), found(images), atol=1e-5)


@pytest.mark.experiments
def test_a_set_of_tfds_becomes_a_task(tmp_path):
  splits = tfds_sets.write(tmp_path, 'cifar10')
  task = vit.task(data.load('cifar10', str(tmp_path)), 'smoke')
  images, labels = task.batches(2, 0, 0)
  assert images.shape == (2, 2, 2, 32, 32, 3)
  known = {x.tobytes(): y for x, y in zip(*splits['train'], strict=True)}
  rows = zip(images.reshape(-1, 32, 32, 3), labels.reshape(-1), strict=True)
  assert all(known[image.tobytes()] == label for image, label in rows)
  found = task.test(jax.jit(task.init)(0), 1.0)
  np.testing.assert_allclose(found['test_loss'], np.log(10), rtol=1e-5)
  share = np.mean(splits['test'][1] == 0)  # All classes are equal: the first.
  np.testing.assert_allclose(found['test_accuracy'], share)


def test_images_that_cannot_be_cut_are_refused():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (20, 10, 8, 1)).astype(np.uint8)
  dataset = data.from_arrays(images, np.arange(20) % 2)
  with pytest.raises(ConfigError, match='10x8 pixels: take a set'):
    vit.task(dataset, 'smoke')
