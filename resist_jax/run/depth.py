"""Shallower networks inside a trained one: some blocks of its cut chains.

A block that is left out adds nothing: its residual scale is 0. So one program
computes the networks of all depths.
"""

from collections.abc import Mapping

import numpy as np

Scales = Mapping[str, np.ndarray]


def first(count: int, length: int) -> np.ndarray:
  """Returns the first blocks of a chain, `int[count]`.

  Args:
    count: How many.
    length: L, the blocks of the chain.
  """
  return np.arange(min(count, length))


def drawn(count: int, length: int, draw: int) -> np.ndarray:
  """Returns blocks of a chain at random, ascending, `int[count]`.

  Args:
    count: How many.
    length: L, the blocks of the chain.
    draw: Number of the draw; the same one gives the same blocks.
  """
  rng = np.random.default_rng([length, count, draw])
  return np.sort(rng.permutation(length)[:count])


def keep(scale: np.ndarray, blocks: np.ndarray) -> np.ndarray:
  """Returns the residual scales of a chain of which some blocks are kept.

  The sum of the scales stays what it is in the whole chain, as far as none is
  larger than 1 or than it was: as many blocks as a worker trained with run at
  the scale that they were trained at.

  Args:
    scale: `float32[L]`, those of the whole chain.
    blocks: Which blocks are kept.

  Returns:
    `float32[L]`, 0 for all others.

  >>> keep(np.full(4, 0.5, np.float32), np.array([0, 3])).tolist()
  [1.0, 0.0, 0.0, 1.0]
  """
  kept = np.zeros_like(scale)
  if len(blocks):
    raised = scale[blocks] * len(scale) / len(blocks)
    kept[blocks] = np.minimum(raised, np.maximum(scale[blocks], 1))
  return kept


def choose(length: int, most: int = 8) -> list[int]:
  """Chooses the depths to measure: all, or some that grow evenly by a factor.

  Args:
    length: L, the blocks of the longest chain.
    most: How many depths at most, 0 and L included.

  >>> choose(5), choose(22)
  ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5, 8, 13, 22])
  """
  if length < most:
    return list(range(length + 1))
  grown = np.geomspace(1, length, most - 1)
  return [0, *np.unique(np.rint(grown).astype(int)).tolist()]
