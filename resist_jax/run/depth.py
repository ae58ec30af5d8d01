"""Shallower networks inside a trained one: some blocks of its cut chains.

A block that is left out adds nothing: its residual scale is 0. So one program
computes the networks of all depths.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from resist_jax import accounting
from resist_jax.errors import ConfigError
from resist_jax.rounds import Protocol
from resist_jax.run.config import chosen_depths

Scales = Mapping[str, np.ndarray]


class Shallower(NamedTuple):
  """A network inside a trained one.

  Attributes:
    order: `first`: the first blocks of each chain; `random`: others.
    blocks: How many of the longest chain.
    draw: Number of the random choice.
    scales: Residual scale of each block, `float32[L]` by chain; 0 for those
      that are left out.
  """

  order: str
  blocks: int
  draw: int
  scales: dict[str, np.ndarray]

  def row(self, measures: Mapping[str, float]) -> dict[str, Any]:
    """Returns what is written of it, with what a test of it measured."""
    named = {'order': self.order, 'blocks': self.blocks, 'draw': self.draw}
    return {**named, **measures}


def networks(
  lengths: Mapping[str, int],
  scales: Scales,
  depths: Sequence[int],
  draws: int,
  trained: Mapping[str, float],
) -> Iterator[Shallower]:
  """Yields shallower networks inside a trained one.

  Args:
    lengths: L of each chain to shorten; a shorter one than the longest keeps
      the same share of its blocks.
    scales: Residual scales of the whole network; 1 for any other chain.
    depths: Blocks of the longest chain to keep, each from 0 to L.
    draws: Random choices of blocks for each depth.
    trained: See `trained_scales`.
  """
  longest = max(lengths.values(), default=0)
  for blocks in depths:
    drawn_often = draws if 0 < blocks < longest else 0
    for draw in range(-1, drawn_often):  # -1: the first ones.
      kept = {}
      for name, length in lengths.items():
        number = round(blocks * length / longest)
        chosen = np.arange(number) if draw < 0 else drawn(number, length, draw)
        whole = scales.get(name, np.ones(length, np.float32))
        most = trained.get(name, 1.0)
        kept[name] = keep(np.asarray(whole), chosen, most)
      order = 'first' if draw < 0 else 'random'
      yield Shallower(order, blocks, max(draw, 0), {**scales, **kept})


def drawn(count: int, length: int, draw: int) -> np.ndarray:
  """Returns blocks of a chain at random, ascending, `int[count]`.

  Args:
    count: How many.
    length: L, the blocks of the chain.
    draw: Number of the draw; the same one gives the same blocks.
  """
  rng = np.random.default_rng([length, count, draw])
  return np.sort(rng.permutation(length)[:count])


def trained_scales(
  config: ml_collections.ConfigDict,
  lengths: Mapping[str, int],
  cuts: Mapping[str, int | None],
) -> dict[str, float]:
  """Returns the residual scale of each chain's blocks on a worker.

  Args:
    config: Config of the run.
    lengths: L of each chain.
    cuts: See `Task.cuts`.
  """
  if config.residual_scale != 'training' or config.protocol != 'resist':
    return dict.fromkeys(lengths, 1.0)
  least, depths = {name: cuts[name] for name in lengths}, chosen_depths(config)
  protocol = Protocol(
    config.num_workers, 1, dict(lengths), min_depth=least, depths=depths
  )
  return {
    name: 1 / accounting.expected_share(protocol, name) for name in lengths
  }


def keep(
  scale: np.ndarray, blocks: np.ndarray, trained: float = 1.0
) -> np.ndarray:
  """Returns the residual scales of a chain of which some blocks are kept.

  Each kept scale grows by L / len(blocks), so that equal scales keep their sum,
  but not beyond `trained` or its old value, whichever is larger. With as many
  blocks as a worker trained, they run at the scale of training.

  Args:
    scale: `float32[L]`, those of the whole chain.
    blocks: Which blocks are kept.
    trained: The scale that a worker trained them at.

  Returns:
    `float32[L]`, 0 for all others.

  >>> keep(np.full(4, 0.5, np.float32), np.array([0, 3])).tolist()
  [1.0, 0.0, 0.0, 1.0]
  """
  kept = np.zeros_like(scale)
  if len(blocks):
    raised = scale[blocks] * len(scale) / len(blocks)
    kept[blocks] = np.minimum(raised, np.maximum(scale[blocks], trained))
  return kept


def choose(length: int) -> list[int]:
  """Chooses depths to measure: all, or up to 8 that grow evenly by a factor.

  Args:
    length: L, the blocks of the longest chain.

  >>> choose(5), choose(22)
  ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 5, 8, 13, 22])
  """
  if length < 8:
    return list(range(length + 1))
  grown = np.geomspace(1, length, 7)  # Besides 0.
  return [0, *np.unique(np.rint(grown).astype(int)).tolist()]


def asked(words: str, longest: int) -> list[int]:
  """Returns the depths that the text of `--depths` asks for.

  Args:
    words: Numbers such as `0,2,8`, or `some`, or `none`.
    longest: L of the longest chain; 0 without any.

  Raises:
    ConfigError: If it is another text.
  """
  if words == 'none' or not longest:
    return []
  if words == 'some':
    return choose(longest)
  try:
    depths = sorted(set(map(int, words.split(','))))
  except ValueError:
    depths = [-1]
  if not 0 <= depths[0] <= depths[-1] <= longest:
    raise ConfigError(
      f'--depths is {words!r}: give numbers from 0 to {longest}, the blocks of '
      'the longest chain that is cut, or some, or none.'
    )
  return depths
