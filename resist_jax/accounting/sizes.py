"""Numbers that a network has: in all, outside of its chains, and in a block."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax

from resist_jax.decomposition import num_copies, split
from resist_jax.rounds import Protocol, State
from resist_jax.rounds.moments import Parts, take_apart

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Parameter counts of a network.

  Attributes:
    total: All parameters.
    shared: Those outside the partitioned chains.
    block: For each partitioned chain, those of one block.
    num_blocks: For each partitioned chain, its length L.
  """

  total: int
  shared: int
  block: dict[str, int]
  num_blocks: dict[str, int]


def measure(params: Mapping[str, PyTree], chains: Sequence[str]) -> Sizes:
  """Counts parameters.

  Args:
    params: Global parameters by name, or their shapes, or a moment of them.
    chains: Names of the partitioned chains; a moment may have none of one.

  Returns:
    The sizes.
  """
  shared, chain = split(params, chains)
  lengths = {
    k: next((x.shape[0] for x in jax.tree.leaves(v) if x.shape), 0)
    for k, v in chain.items()
  }
  blocks = {k: _count(v) // max(lengths[k], 1) for k, v in chain.items()}
  return Sizes(_count(params), _count(shared), blocks, lengths)


def measure_state(state: State) -> Sizes:
  """Counts the parameters of a network whose parts the workers hold.

  Args:
    state: Its arrays are `[S, ...]`; only shapes are read.

  Returns:
    The sizes.
  """
  return _of_halves(state.shared, state.chain, state)


def measure_moments(parts: Parts | None, state: State) -> list[Sizes] | None:
  """Counts the numbers of each moment of an optimiser.

  Args:
    parts: `state.carried` or `state.outer`.
    state: Its arrays are `[S, ...]`; only shapes are read.

  Returns:
    Sizes of each moment; None without an optimiser.
  """
  if parts is None:
    return None
  return [_of_halves(m['shared'], m['chain'], state) for m in parts.moments]


def _of_halves(shared: PyTree, chain: PyTree, state: State) -> Sizes:
  lengths = {name: int(length) for name, length in state.num_blocks.items()}
  blocks = {name: _count(chain[name], 2) for name in lengths}
  outside = _count(shared, 1)
  inside = sum(lengths[name] * blocks[name] for name in lengths)
  return Sizes(outside + inside, outside, blocks, lengths)


def _count(tree: PyTree, axes: int = 0) -> int:
  """Counts the numbers of arrays, without their leading axes."""
  return sum(math.prod(leaf.shape[axes:]) for leaf in jax.tree.leaves(tree))


def params_per_worker(sizes: Sizes, protocol: Protocol) -> int:
  """Returns the parameters of the largest sub-network.

  Args:
    sizes: Sizes of the network.
    protocol: Who holds what.

  Returns:
    Shared parameters, and K blocks of each partitioned chain.
  """
  return sizes.shared + sum(
    protocol.slots_per_worker(name) * sizes.block[name]
    for name in sizes.num_blocks
  )


def expected_share(protocol: Protocol, chain: str) -> float:
  """Returns the expected share of workers that hold a block in a round.

  Args:
    protocol: Who holds what.
    chain: Name of a partitioned chain.

  Returns:
    `copies / (S * L)`: 1/S without a minimum depth, the paper's residual scale
    at test time. With one, its code uses `max(1 / S, min_depth / L)`.

  >>> expected_share(Protocol(4, 50, {'c': 22}), 'c')
  0.25
  """
  division = protocol.division(chain)
  copies = num_copies(*division)
  return copies / (division.num_workers * division.num_blocks)


def num_moments(optimizer: optax.GradientTransformation) -> int:
  """Returns how many numbers an optimiser keeps for each parameter."""
  state = optimizer.init(np.float32(0))
  return len(take_apart(optimizer, state).moments)
