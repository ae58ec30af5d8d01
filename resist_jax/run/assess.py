"""How good a trained network is: in which classes, and at which depth."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from resist_jax import data
from resist_jax.run import depth
from resist_jax.run.evaluate import Batches, Evaluator, Results, count
from resist_jax.run.export import Predictor

PyTree = Any


@partial(jax.jit, static_argnums=0)
def _apply(network, params, statistics, pixels, scales):
  return network.apply(
    {'params': params, 'batch_stats': statistics},
    pixels,
    scales,
    mutable=[] if statistics else ['batch_stats'],
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
  """Applies an exported network; see `evaluate.Forward`.

  Attributes:
    model: The network.
    scales: Residual scale of each block, `float32[L]` by chain.
  """

  model: Predictor
  scales: Mapping[str, np.ndarray]

  def gather(self, state: Any) -> tuple[None, int]:
    """Returns nothing: the network is here."""
    del state
    return None, 0

  def logits(self, images: np.ndarray, statistics: PyTree) -> tuple[Any, Any]:
    """Classifies a batch.

    Args:
      images: `uint8[B, H, W, C]`.
      statistics: The collection `batch_stats`; empty to use those of the batch.

    Returns:
      Logits, and the statistics of the batch if they were used.
    """
    model = self.model
    pixels = data.normalise(jax.numpy.asarray(images), model.mean, model.std)
    params = model.variables['params']
    found, own = _apply(model.network, params, statistics, pixels, self.scales)
    return found, own.get('batch_stats', {})

  def apply(
    self, batches: Sequence[Batches], gathered: Any, statistics: PyTree
  ) -> Results:
    """Applies the network to batches; see `evaluate.Forward`."""
    del gathered
    counts, measured = [], []
    for group in batches:
      used = statistics if group.fixed else {}
      found, own = self.logits(group.images()[0], used)
      counts.append(count(found, group.labels()[0])[None])
      measured.append(jax.tree.map(lambda x: np.asarray(x)[None], own))
    return Results(counts, measured, 0)


def evaluator(
  model: Predictor,
  dataset: data.Dataset,
  batch_size: int = 100,
  statistics_images: int = 2000,
) -> Evaluator:
  """Returns what tests an exported network as training does.

  Args:
    model: The network.
    dataset: The sets to test on, and the training images.
    batch_size: See `Evaluator`.
    statistics_images: See `Evaluator`; 0 keeps the statistics of the model.
  """
  fixed = None if statistics_images else model.variables['batch_stats']
  forward = Exported(model, model.scales)
  return Evaluator(
    forward, dataset, 1, batch_size, statistics_images, fixed=fixed
  )


def confusion(
  model: Predictor, split: data.Split, batch_size: int
) -> np.ndarray:
  """Counts which classes are taken for which, with fixed statistics.

  Args:
    model: The network.
    split: The images to classify.
    batch_size: Images at once.

  Returns:
    `int[n, n]`: a row for each class, a column for what it was taken for.
  """
  n = len(model.class_names)
  found = np.zeros((n, n), int)
  forward, statistics = Exported(model, model.scales), _fixed(model)
  for start in range(0, len(split), batch_size):
    rows = np.arange(start, start + batch_size)
    rows[rows >= len(split)] = -1  # Filled up, so that one program is enough.
    logits, _ = forward.logits(split.images[rows], statistics)
    real = rows >= 0
    taken = np.asarray(logits.argmax(axis=-1))[real]
    np.add.at(found, (split.labels[rows[real]], taken), 1)
  return found


def _fixed(model: Predictor) -> PyTree:
  return model.variables['batch_stats']


@dataclasses.dataclass(frozen=True)
class AtDepth:
  """The accuracy of a shallower network.

  Attributes:
    order: `first`: the first blocks of each chain; `random`: others.
    blocks: How many of the longest chain that is cut.
    draw: Number of the random choice.
    accuracies: See `task.Evaluation.measures`.
  """

  order: str
  blocks: int
  draw: int
  accuracies: dict[str, float]


def by_depth(
  test: Evaluator,
  model: Predictor,
  lengths: Mapping[str, int],
  depths: Sequence[int],
  draws: int,
) -> Iterator[AtDepth]:
  """Tests shallower networks inside the trained one.

  Norm statistics are measured anew for each of them.

  Args:
    test: What tests the whole network.
    model: The network.
    lengths: L of each chain to shorten; a shorter one than the longest keeps
      the same share of its blocks.
    depths: Blocks of the longest chain to keep, each from 0 to L.
    draws: Random choices of blocks for each depth.

  Yields:
    The accuracies.
  """
  longest = max(lengths.values())
  for blocks in depths:
    drawn = draws if 0 < blocks < longest else 0
    for order, draw in [('first', 0), *(('random', i) for i in range(drawn))]:
      scales = {}
      for name, length in lengths.items():
        number = round(blocks * length / longest)
        chosen = (
          depth.first(number, length)
          if order == 'first'
          else depth.drawn(number, length, draw)
        )
        whole = model.scales.get(name, np.ones(length, np.float32))
        scales[name] = depth.keep(np.asarray(whole), chosen)
      forward = Exported(model, {**model.scales, **scales})
      found = dataclasses.replace(test, forward=forward)(None)
      yield AtDepth(order, blocks, draw, found.measures)
