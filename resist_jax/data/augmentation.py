"""Random changes to training images."""

import re
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from resist_jax.data.sets import Dataset
from resist_jax.data.streaming import StreamedImages

# A mirrored image of these is another character, or none at all.
CHARACTERS = frozenset(
  {
    'binary_alpha_digits',
    'digits',
    'mnist',
    'emnist',
    'kmnist',
    'svhn_cropped',
    'omniglot',
    'cmaterdb',
  }
)


class Augmentation(NamedTuple):
  """What happens to training images.

  Attributes:
    pad: Pixels of black on every side before a crop; 0 for no crop.
    flip: Mirror half of them.
    resized_crop: Cut parts of random size out on the host, and resize them.
  """

  pad: int
  flip: bool
  resized_crop: bool


def choose(kind: str, dataset: Dataset) -> Augmentation:
  """Chooses by the set what `auto` means.

  Args:
    kind: `crop`, `resized_crop`, either with `_flip`, `flip`, `none` or `auto`.
    dataset: What is augmented.

  Returns:
    What happens to its training images.
  """
  images = dataset.train.images
  height = images.shape[1]
  if kind == 'auto':
    if isinstance(images, StreamedImages) and images.resized:
      kind = 'resized_crop_flip'
    elif height < 24:  # A shift by one pixel of eight is a lot.
      kind = 'flip'
    else:
      kind = 'crop_flip'
    # TFDS names may go on with a config and a version: emnist/letters:3.1.0.
    if re.split('[/:]', dataset.name)[0] in CHARACTERS:
      kind = kind.removesuffix('flip').removesuffix('_')
  pad = height // 8 if kind in ('crop', 'crop_flip') else 0  # CIFAR: 4 of 32.
  return Augmentation(pad, 'flip' in kind, kind.startswith('resized'))


def augment(
  key: jax.Array,
  images: jax.Array,
  pad: int,
  flip: bool,
  axis_name: str | None = None,
) -> jax.Array:
  """Crops each image at random after padding with black, and mirrors half.

  Args:
    key: A PRNG key.
    images: `uint8[B, H, W, C]`.
    pad: Pixels on every side; 0 leaves the crop out. CIFAR: 4.
    flip: Mirror left and right with probability 1/2.
    axis_name: A mesh axis over which a batch is spread in equal parts, of which
      `images` is one; what happens to it does not depend on how many there are.

  Returns:
    `uint8[B, H, W, C]`.
  """
  B = len(images)
  parts = 1 if axis_name is None else lax.axis_size(axis_name)

  def mine(draws):
    if axis_name is None:
      return draws
    first = lax.axis_index(axis_name) * B
    return lax.dynamic_slice_in_dim(draws, first, B)

  crop_key, flip_key = jax.random.split(key)
  if pad:
    sides = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    corners = mine(jax.random.randint(crop_key, (parts * B, 2), 0, 2 * pad + 1))
    crop = jax.vmap(
      lambda image, corner: lax.dynamic_slice(
        image, (corner[0], corner[1], 0), images.shape[1:]
      )
    )
    images = crop(jnp.pad(images, sides), corners)
  if flip:
    mirrored = mine(jax.random.bernoulli(flip_key, 0.5, (parts * B, 1, 1, 1)))
    images = jnp.where(mirrored, images[:, :, ::-1], images)
  return images
