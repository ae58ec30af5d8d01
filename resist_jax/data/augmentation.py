"""What is done to pixels: crops and flips in training, and their scale."""

from functools import partial
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from resist_jax.data.sets import Dataset
from resist_jax.errors import ConfigError, check_choice

AUGMENTATIONS = (
  'resized_crop_flip', 'resized_crop', 'crop_flip', 'crop', 'flip', 'none',
)  # fmt: skip
FILLS = ('black', 'reflection')
FLIPS = ('random', 'alternating')

# Data sets of characters, which are never flipped: a mirrored character is
# another one, or none.
CHARACTERS = frozenset(
  {
    'binary_alpha_digits',
    'digits',
    'mnist',
    'mnist_corrupted',
    'emnist',
    'kmnist',
    'svhn',
    'svhn_cropped',
    'omniglot',
    'cmaterdb',
  }
)


class Augmentation(NamedTuple):
  """How training images are augmented.

  Attributes:
    pad: Pixels added on every side before a random crop of the original size; 0
      disables the crop.
    flip: Whether to mirror each image left to right with probability 1/2.
    resized_crop: Whether to crop a part of random area and aspect ratio and
      resize it. This runs on the host, while an image is decoded.
    reflect: Whether the added pixels mirror those inside, or are black.
    alternate: Whether each image is mirrored in every other epoch instead, see
      `order.batch_indices`; then `flip` is off.
  """

  pad: int = 0
  flip: bool = False
  resized_crop: bool = False
  reflect: bool = False
  alternate: bool = False


def choose(
  kind: str,
  dataset: Dataset,
  pad: int = -1,
  fill: str = 'black',
  flips: str = 'random',
) -> Augmentation:
  """Returns the augmentation that the config field `data.augment` names.

  `auto` depends on the data set: random resized crops for images that are
  resized while they stream, no crop for images with a side of less than 24
  pixels, padded crops otherwise, and flips unless the images show characters.

  Args:
    kind: One of `AUGMENTATIONS`, or `auto`.
    dataset: The data set to augment.
    pad: Pixels on every side of padded crops; -1: an eighth of the shorter
      side, 4 of 32 (paper).
    fill: Content of the added pixels, one of `FILLS`.
    flips: How to flip images where `kind` includes flips, one of `FLIPS`.

  Returns:
    The augmentation of its training images.

  Raises:
    ConfigError: If `pad` is not smaller than the shorter side of the images, or
      if there is no such `kind`, `fill` or `flips`.
  """
  for name, value, known in (
    ('kind', kind, ('auto', *AUGMENTATIONS)),
    ('fill', fill, FILLS),
    ('flips', flips, FLIPS),
  ):
    check_choice(name, value, known)
  images = dataset.train.images
  side = min(images.shape[1:3])
  if kind == 'auto':
    if dataset.resized:
      kind = 'resized_crop_flip'
    elif side < 24:  # A shift by one of 8 pixels is already large.
      kind = 'flip'
    else:
      kind = 'crop_flip'
    if dataset.name in CHARACTERS:
      kind = kind.removesuffix('flip').removesuffix('_')
  if kind not in ('crop', 'crop_flip'):
    pad = 0
  elif pad < 0:
    pad = side // 8
  elif pad >= side:
    raise ConfigError(
      f'data.pad is {pad}, but the images of {dataset.name!r} have a side of '
      f'only {side} pixels: lower it.'
    )
  flip, alternate = 'flip' in kind, flips == 'alternating'
  return Augmentation(
    pad,
    flip and not alternate,
    kind.startswith('resized'),
    fill == 'reflection',
    flip and alternate,
  )


def augment(
  key: jax.Array,
  images: jax.Array,
  augmentation: Augmentation,
  axis_name: str | None = None,
) -> jax.Array:
  """Pads images, crops them at random, and flips half of them.

  Args:
    key: A PRNG key.
    images: `uint8[B, H, W, C]`.
    augmentation: Which of these happens, and how.
    axis_name: The mesh axis that splits the batch into equal parts, if
      `images` is one of them. The result does not depend on the number of
      parts.

  Returns:
    The augmented images, `uint8[B, H, W, C]`.
  """
  B, pad = len(images), augmentation.pad
  num_parts = 1 if axis_name is None else lax.axis_size(axis_name)

  def local(draws):
    """Takes this part's share of the draws for the whole batch."""
    if axis_name is None:
      return draws
    first = lax.axis_index(axis_name) * B
    return lax.dynamic_slice_in_dim(draws, first, B)

  crop_key, flip_key = jax.random.split(key)
  if pad:
    sides = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    shape = (num_parts * B, 2)
    corners = local(jax.random.randint(crop_key, shape, 0, 2 * pad + 1))
    mode = 'reflect' if augmentation.reflect else 'constant'
    images = jnp.pad(images, sides, mode)
    # A TPU would cut windows at different places in a loop over the images.
    images = lax.platform_dependent(
      images,
      corners,
      tpu=partial(crop_by_shifts, pad=pad),
      default=partial(crop_windows, pad=pad),
    )
  if augmentation.flip:
    shape = (num_parts * B, 1, 1, 1)
    flipped = local(jax.random.bernoulli(flip_key, 0.5, shape))
    images = jnp.where(flipped, images[:, :, ::-1], images)
  return images


def crop_windows(images: jax.Array, corners: jax.Array, pad: int) -> jax.Array:
  """Cuts a window out of each image.

  Args:
    images: `uint8[B, H + 2 pad, W + 2 pad, C]`.
    corners: `int32[B, 2]`, the upper left pixels of the windows.
    pad: How many pixels were added on every side.

  Returns:
    The windows, `uint8[B, H, W, C]`.
  """
  height, width, channels = images.shape[1:]
  window = (height - 2 * pad, width - 2 * pad, channels)
  return jax.vmap(
    lambda image, corner: lax.dynamic_slice(
      image, (corner[0], corner[1], 0), window
    )
  )(images, corners)


def crop_by_shifts(
  images: jax.Array, corners: jax.Array, pad: int
) -> jax.Array:
  """Cuts the same windows by shifting all images at once.

  Each bit of a corner's row or column shifts the image by so many pixels or
  leaves it where it is.

  Args:
    images: See `crop_windows`.
    corners: See `crop_windows`.
    pad: See `crop_windows`.

  Returns:
    The windows, `uint8[B, H, W, C]`.
  """
  bits = (2 * pad).bit_length()
  # As many pixels more as all shifts together drop.
  more = (0, 2**bits - 1 - 2 * pad)
  images = jnp.pad(images, ((0, 0), more, more, (0, 0)))
  for axis, first in ((1, corners[:, 0]), (2, corners[:, 1])):
    for bit in reversed(range(bits)):
      shifts = (first >> bit & 1).astype(bool)[:, None, None, None]
      size = images.shape[axis] - 2**bit
      near = lax.slice_in_dim(images, 0, size, axis=axis)
      far = lax.slice_in_dim(images, 2**bit, None, axis=axis)
      images = jnp.where(shifts, far, near)
  return images


def normalise(
  images: jax.Array, mean: np.ndarray, std: np.ndarray
) -> jax.Array:
  """Scales pixels to mean 0 and deviation 1 over the training set.

  Args:
    images: `uint8[B, H, W, C]`.
    mean: See `Dataset.mean`.
    std: See `Dataset.std`.

  Returns:
    `float32[B, H, W, C]`.
  """
  scale = (1 / (255 * std)).reshape(1, 1, 1, -1)
  offset = (mean / std).reshape(1, 1, 1, -1)
  return images.astype(jnp.float32) * scale - offset
