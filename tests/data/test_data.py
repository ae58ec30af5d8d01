"""Batches are a pure function, images are TFDS's, and mistakes are clear."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tfds_sets

from resist_jax import data
from resist_jax.data import augmentation, prepared
from resist_jax.data.augmentation import Augmentation, augment
from resist_jax.errors import ConfigError


def indices(round_index, N=50, B=8, T=3, S=4, seed=0, sharded=False):
  return data.batch_indices(N, B, seed, round_index, T, S, sharded)


def test_batches_follow_seed_and_round():
  np.testing.assert_array_equal(indices(3), indices(3))
  assert (indices(3) != indices(4)).any()
  assert (indices(3) != indices(3, seed=1)).any()
  assert indices(0).shape == (4, 3, 8)


def test_an_epoch_of_a_worker_repeats_nothing():
  steps = np.concatenate([indices(r) for r in range(4)], axis=1)  # 12 steps
  for worker in range(4):
    for epoch in (steps[worker, :6], steps[worker, 6:]):  # 50 // 8 batches
      assert len(np.unique(epoch)) == 48
  assert (steps[0, :6] != steps[1, :6]).any()  # Each in its own order.
  assert (steps[0, :6] != steps[0, 6:]).any()  # Another every epoch.


def test_shards_are_disjoint_and_cover_the_set():
  steps = np.concatenate(
    [indices(r, N=48, B=4, T=3, sharded=True) for r in range(2)], axis=1
  )
  seen = [set(steps[worker, :3].ravel()) for worker in range(4)]
  assert [len(s) for s in seen] == [12] * 4
  assert len(set.union(*seen)) == 48
  assert [set(steps[worker, 3:].ravel()) for worker in range(4)] == seen


def epochs(sharded=False, S=4):
  """Asks for four epochs of 48 examples: `int32[S, 4, 48 / steps]`."""
  rounds = [
    data.batch_indices(48, 4, 0, r, 3, S, sharded, mirrors=True)
    for r in range(4 if sharded else 16)
  ]
  return np.concatenate(rounds, axis=1).reshape(S, 4, -1)


@pytest.mark.parametrize('sharded', [False, True])
def test_alternating_flips_show_each_side_in_every_other_epoch(sharded):
  asked = epochs(sharded)
  plain = np.concatenate(
    [
      indices(r, N=48, B=4, sharded=sharded) for r in range(asked.shape[2] // 3)
    ],
    axis=1,
  ).reshape(asked.shape)
  # Which images, and in which order, is as without.
  np.testing.assert_array_equal(np.maximum(asked, ~asked), plain)
  mirrored = np.zeros((4, 4, 48), bool)
  for worker, epoch in np.ndindex(4, 4):
    numbers = asked[worker, epoch]
    mirrored[worker, epoch, np.maximum(numbers, ~numbers)] = numbers < 0
  for worker in range(4):
    mine = np.unique(plain[worker])
    first, second, third, fourth = mirrored[worker][:, mine]
    np.testing.assert_array_equal(first, ~second)
    np.testing.assert_array_equal(first, third)
    np.testing.assert_array_equal(second, fourth)
  if not sharded:  # Half of the workers see the other side.
    np.testing.assert_array_equal(mirrored[0], ~mirrored[1])
    assert 12 < mirrored[0, 0].sum() < 36


def test_digits_are_the_digits():
  digits = data.load('digits')
  test = digits.tests['test']
  assert digits.train.images.shape == (1437, 8, 8, 1)
  assert test.images.shape == (360, 8, 8, 1)
  assert digits.num_classes == 10
  assert digits.train.images.max() == 255
  assert set(np.bincount(test.labels)) <= {35, 36, 37}


def test_digits_are_split_as_scikit_learn_does():
  """Digests of its load_digits and stratified train_test_split, seed 0."""
  digits = data.load('digits')
  found = [
    hashlib.sha256(part.images.tobytes() + part.labels.tobytes()).hexdigest()
    for part in (digits.train, digits.tests['test'])
  ]
  assert [digest[:16] for digest in found] == [
    '6612d0a064c751fd', 'eb33daa4a6fa9662',
  ]  # fmt: skip


def test_normalised_training_images_have_mean_0_and_deviation_1():
  digits = data.load('digits')
  x = data.normalise(jnp.array(digits.train.images), digits.mean, digits.std)
  assert abs(float(x.mean())) < 1e-4
  assert abs(float(x.std()) - 1) < 1e-4


def test_validation_is_held_out():
  whole, held = data.load('digits'), data.load('digits', validation=0.2)
  validation = held.tests['validation']
  assert len(validation) == round(0.2 * 1437)
  assert len(validation) + len(held.train) == len(whole.train)
  parts = [*map(bytes, validation.images), *map(bytes, held.train.images)]
  assert sorted(parts) == sorted(map(bytes, whole.train.images))


def test_a_validation_that_leaves_nothing_to_train_on_is_refused():
  with pytest.raises(ConfigError, match=r'data\.validation is 0\.9999.*lower'):
    data.load('digits', validation=0.9999)


@pytest.mark.filterwarnings('ignore')  # TFDS's own, while it writes a set.
@pytest.mark.parametrize(
  ('name', 'shape', 'classes'),
  [
    ('cifar10', (32, 32, 3), 10),
    ('fashion_mnist', (28, 28, 1), 10),
    ('a_set_of_my_own', (16, 16, 3), 5),
  ],
)
def test_a_prepared_tfds_set_is_read_to_the_last_pixel(
  name, shape, classes, tmp_path
):
  written = tfds_sets.write(tmp_path, name, shape, classes)
  dataset = data.load(name, str(tmp_path))
  assert dataset.num_classes == classes
  got = {'train': dataset.train, 'test': dataset.tests['test']}
  for split, (images, labels) in written.items():
    assert got[split].images.shape == images.shape
    pairs = zip(images, labels, strict=True)
    want = sorted((bytes(image), label) for image, label in pairs)
    pairs = zip(got[split].images, got[split].labels, strict=True)
    assert sorted((bytes(image), label) for image, label in pairs) == want


@pytest.mark.parametrize(
  ('name', 'says'),
  [
    ('cifar1O', 'unknown data set .*Did you mean cifar10'),
    ('imdb_reviews', 'not one of images'),
    ('mnist', 'is not prepared in .*pip install'),
    ('imagenet2012', 'by hand, .*manual.*ILSVRC2012_img_train.tar.*Then run'),
  ],
)
@pytest.mark.filterwarnings('ignore')
def test_a_wrong_data_set_gets_a_clear_line(name, says, tmp_path):
  with pytest.raises(ConfigError, match=says) as caught:
    data.load(name, str(tmp_path))
  assert '\n' not in str(caught.value)
  assert not list(tmp_path.iterdir())


def digits_of(monkeypatch, image, labels):
  """Puts other images and labels in the place of digits."""
  source = [{'image': image, 'label': label} for label in labels]
  names = tuple(map(str, range(10)))

  def open_split(split):
    part = prepared.Part(split, 0, len(source))
    return prepared.Examples(f'digits, split {split}', source, [part])

  found = prepared.Prepared(
    'digits', 'digits', image.shape, names, ('train', 'test'), open_split
  )
  monkeypatch.setattr(data.sources, 'digits', lambda: found)
  return data.load('digits')


def test_labels_out_of_range_are_found(monkeypatch):
  image = np.zeros((8, 8, 1), np.uint8)
  with pytest.raises(ConfigError, match=r'3 of .*label 10, .* 0 to 9'):
    digits_of(monkeypatch, image, [0, 1, 2, 10])


def test_a_constant_channel_is_no_division_by_zero(monkeypatch):
  image = np.full((8, 8, 1), 7, np.uint8)
  dataset = digits_of(monkeypatch, image, [0] * 4)
  x = data.normalise(jnp.array(dataset.train.images), dataset.mean, dataset.std)
  assert np.isfinite(np.asarray(x)).all()


def test_every_crop_is_a_window_of_the_padded_image():
  rng = np.random.default_rng(0)
  images = rng.integers(1, 256, (64, 6, 6, 2)).astype(np.uint8)
  chosen = Augmentation(pad=2)
  got = np.asarray(augment(jax.random.key(0), jnp.array(images), chosen))
  padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
  corners = set()
  for image, source in zip(got, padded, strict=True):
    found = [
      (i, j)
      for i in range(5)
      for j in range(5)
      if (source[i : i + 6, j : j + 6] == image).all()
    ]
    assert len(found) == 1
    corners.add(found[0])
  assert len(corners) > 15  # Of 25: they differ from image to image.


@pytest.mark.parametrize('pad', [1, 2, 4, 7])
def test_a_tpu_cuts_the_same_windows(pad):
  rng = np.random.default_rng(0)
  shape = (64, 9 + 2 * pad, 12 + 2 * pad, 3)
  images = jnp.array(rng.integers(0, 256, shape, np.uint8))
  corners = jnp.array(rng.integers(0, 2 * pad, (64, 2), endpoint=True))
  corners = corners.at[:2].set(jnp.array([[0, 0], [2 * pad, 2 * pad]]))
  got = augmentation.crop_by_shifts(images, corners, pad)
  assert got.dtype == jnp.uint8
  want = augmentation.crop_windows(images, corners, pad)
  np.testing.assert_array_equal(got, want)


def test_a_pad_is_chosen_for_padded_crops_alone():
  digits = data.load('digits')
  assert data.choose('crop', digits).pad == 1
  assert data.choose('crop', digits, pad=3).pad == 3
  assert data.choose('flip', digits, pad=3).pad == 0
  with pytest.raises(ConfigError, match=r'pad is 8, .*only 8 pixels.*lower'):
    data.choose('crop', digits, pad=8)


@pytest.mark.parametrize(
  ('fields', 'says'),
  [
    ({'kind': 'crop-flip'}, "kind is 'crop-flip'. Did you mean crop_flip"),
    ({'kind': None}, 'kind is None'),
    ({'fill': 'reflect'}, "fill is 'reflect'. Did you mean reflection"),
    ({'flips': 'alternate'}, "flips is 'alternate'.*random, alternating"),
  ],
)
def test_an_augmentation_that_is_none_is_refused(fields, says):
  with pytest.raises(ConfigError, match=says):
    data.choose(**{'kind': 'auto', 'dataset': data.load('digits'), **fields})


def test_a_pad_fits_the_shorter_side():
  pixels = np.zeros((12, 64, 16, 3), np.uint8)
  flat = data.from_arrays(pixels, np.arange(12) % 3)
  assert data.choose('crop', flat).pad == 2
  assert data.choose('auto', flat) == data.Augmentation(flip=True)
  with pytest.raises(ConfigError, match='a side of only 16 pixels'):
    data.choose('crop', flat, pad=20)


def test_flips_alternate_where_images_are_flipped_at_all():
  digits = data.load('digits')
  chosen = data.choose('crop_flip', digits, flips='alternating')
  assert (chosen.flip, chosen.alternate) == (False, True)
  chosen = data.choose('auto', digits, flips='alternating')
  assert (chosen.flip, chosen.alternate) == (False, False)


def test_a_crop_can_show_its_image_mirrored_at_the_edges():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (64, 6, 6, 1)).astype(np.uint8)
  chosen = Augmentation(pad=2, reflect=True)
  got = np.asarray(augment(jax.random.key(0), jnp.array(images), chosen))
  # By hand: rows and columns 2, 1, [0, ..., 5], 4, 3.
  at = np.array([2, 1, *range(6), 4, 3])
  for image, source in zip(got, images[:, at][:, :, at], strict=True):
    assert any(
      (source[i : i + 6, j : j + 6] == image).all()
      for i in range(5)
      for j in range(5)
    )
  black = augment(jax.random.key(0), jnp.array(images), Augmentation(pad=2))
  assert (got != black).any()


def test_about_half_are_mirrored_and_none_otherwise_changed():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (200, 4, 4, 1)).astype(np.uint8)
  chosen = Augmentation(flip=True)
  got = np.asarray(augment(jax.random.key(0), jnp.array(images), chosen))
  same = (got == images).all((1, 2, 3))
  mirrored = (got == images[:, :, ::-1]).all((1, 2, 3))
  assert (same | mirrored).all()
  assert 70 < mirrored.sum() < 130


def test_without_augmentation_images_pass_through():
  images = jnp.arange(32, dtype=jnp.uint8).reshape(2, 4, 4, 1)
  got = augment(jax.random.key(0), images, Augmentation())
  np.testing.assert_array_equal(got, images)


def test_a_split_is_immutable():
  split = data.load('digits').train
  with pytest.raises(dataclasses.FrozenInstanceError):
    split.labels = None
