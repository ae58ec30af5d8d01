"""A vision transformer cut among workers, by the protocols of `protocols`.

  python -m experiments.vision_transformer             # Digits: all cells.
  python -m experiments.vision_transformer --data=cifar10 --data_dir=FOLDER

Patches, pre-norm blocks, learned positions, and the mean over the patches as
input of the classifier. `--data` takes every set that `resist_jax.data` loads.
"""

from collections.abc import Mapping
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import protocols, transformer
from experiments.protocols import Budget, Task
from experiments.transformer import BLOCKS, Shape
from resist_jax import data
from resist_jax.errors import ConfigError

PyTree = Any
PATCHES = 4  # In a row and in a column of an image.
# The length follows from the patches.
SCALES = {
  'smoke': (Shape(8, 8, 2, PATCHES**2), Budget(2, 2, 3, 1e-3, test_every=1)),
  'cpu': (Shape(8, 32, 4, PATCHES**2), Budget(16, 20, 60, 3e-3, test_every=10)),
}


def patches(images: jax.Array) -> jax.Array:
  """Cuts images into `PATCHES` rows and columns of patches.

  Args:
    images: `[B, H, W, C]`; H and W are multiples of `PATCHES`.

  Returns:
    The pixels of each patch, `[B, PATCHES * PATCHES, H * W * C / PATCHES^2]`.
  """
  B, H, W, C = images.shape
  n = PATCHES
  parts = images.reshape(B, n, H // n, n, W // n, C)
  return parts.transpose(0, 1, 3, 2, 4, 5).reshape(B, n * n, -1)


def init(
  shape: Shape, pixels: int, classes: int, seed: int
) -> dict[str, PyTree]:
  """Draws initial parameters.

  Args:
    shape: Sizes.
    pixels: Numbers in a patch.
    classes: How many.
    seed: Seed of the draw.

  Returns:
    The parameters; those of the blocks are stacked, `[L, ...]`.
  """
  embed, rest = jax.random.split(jax.random.key(seed))
  kernel = jax.random.normal(embed, (pixels, shape.width)) / pixels**0.5
  return {
    'patches': kernel,
    **transformer.init(shape, rest),
    # All classes are equally likely at first.
    'classifier': jnp.zeros((shape.width, classes)),
    'bias': jnp.zeros(classes),
  }


def logits(
  params: Mapping[str, PyTree], scales: jax.Array, images: jax.Array, heads: int
) -> jax.Array:
  """Classifies images.

  Args:
    params: A network or sub-network, with K blocks.
    scales: `float32[K]`, the factor on the branches of each block.
    images: `float32[B, H, W, C]`, normalised.
    heads: Number of attention heads.

  Returns:
    `float32[B, classes]`.
  """
  x = patches(images) @ params['patches']
  x = transformer.apply(params, scales, x, heads, causal=False)
  return x.mean(axis=1) @ params['classifier'] + params['bias'][None]


def task(dataset: data.Dataset, scale: str) -> Task:
  """Returns what `protocols` trains.

  Args:
    dataset: Images and their labels.
    scale: A key of `SCALES`.

  Returns:
    The task; its results are the loss and the accuracy on the test images.

  Raises:
    ConfigError: If images cannot be cut into patches.
  """
  shape, budget = SCALES[scale]
  train, test = dataset.train, dataset.tests['test']
  height, width, channels = train.images.shape[1:]
  if dataset.streamed:
    problem = 'does not fit in memory: take a smaller set'
    if dataset.resized:
      problem = (
        'has images of several sizes, or large ones: give all of them one size '
        'of at most 224 pixels'
      )
    raise ConfigError(f'--data={dataset.name} {problem}.')
  if height % PATCHES or width % PATCHES:
    raise ConfigError(
      f'--data={dataset.name} has images of {height}x{width} pixels: take a '
      f'set whose heights and widths are multiples of {PATCHES}.'
    )

  def found(params, scales, images):
    images = data.normalise(images, dataset.mean, dataset.std)
    return logits(params, scales, images, shape.heads)

  def make_loss(in_training):
    def loss_fn(params, present, batch, key):
      del key
      scales = transformer.scales(params, present, in_training)
      image, label = batch
      loss = optax.softmax_cross_entropy_with_integer_labels(
        found(params, scales, image), label
      )
      return loss.mean(), {}

    return loss_fn

  def batches(S, seed, index):
    chosen = data.batch_indices(
      len(train), budget.batch, seed, index, budget.local_steps, S
    )
    return train.images[chosen], train.labels[chosen]

  return Task(
    dataset.name,
    budget,
    BLOCKS,
    functools.partial(
      init,
      shape,
      height * width * channels // PATCHES**2,
      dataset.num_classes,
    ),
    make_loss,
    batches,
    functools.partial(_tested, jax.jit(found), test),
    {'shape': shape._asdict(), 'test_images': len(test)},
  )


def _tested(found, test: data.Split, params, scale: float) -> dict[str, float]:
  """Returns loss and accuracy on test images, a part of them at a time."""
  scales = jnp.full(len(jax.tree.leaves(params[BLOCKS])[0]), scale)
  loss = hits = 0.0
  for begin in range(0, len(test), 500):
    labels = np.asarray(test.labels[begin : begin + 500])
    scores = found(params, scales, np.asarray(test.images[begin : begin + 500]))
    loss += float(
      optax.softmax_cross_entropy_with_integer_labels(scores, labels).sum()
    )
    hits += int((scores.argmax(axis=-1) == labels).sum())
  return {'test_loss': loss / len(test), 'test_accuracy': hits / len(test)}


def main() -> int:
  """Runs the experiment."""
  parser = protocols.parser(__doc__, list(SCALES))
  parser.add_argument(
    '--data',
    default='digits',
    help='as in --config.data.name (default: digits)',
  )
  options = parser.parse_args()

  def load():
    dataset = data.load(options.data, options.data_dir)
    return task(dataset, options.scale)

  return protocols.main('vision_transformer', options, load)


if __name__ == '__main__':
  sys.exit(main())
