"""What a protocol stores and sends, predicted from the network's sizes."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax

from resist_jax import decomposition

PyTree = Any

BYTES_PER_PARAM = 4  # float32


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


def measure(params: Mapping[str, PyTree], chains: list[str]) -> Sizes:
  """Counts parameters.

  Args:
    params: Global parameters by name, or their shapes.
    chains: Names of the partitioned chains.

  Returns:
    The sizes.
  """
  shared, chain = decomposition.split(params, chains)
  lengths = {k: jax.tree.leaves(v)[0].shape[0] for k, v in chain.items()}
  blocks = {k: _count(v) // lengths[k] for k, v in chain.items()}
  return Sizes(_count(params), _count(shared), blocks, lengths)


def _count(tree: PyTree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def params_per_worker(
  sizes: Sizes, num_workers: int, min_depth: int = 0
) -> int:
  """Returns the parameters of the largest sub-network.

  Args:
    sizes: Of the network; no partitioned chain means the full model.
    num_workers: S.
    min_depth: Blocks a worker runs at least.

  Returns:
    Shared parameters and K blocks of each partitioned chain.
  """
  return sizes.shared + sum(
    decomposition.slots_per_worker(length, num_workers, min_depth)
    * sizes.block[name]
    for name, length in sizes.num_blocks.items()
  )


def round_trip_bytes(sizes: Sizes, num_workers: int, min_depth: int = 0) -> int:
  """Counts the bytes of a round as the paper's Table 1 does.

  Every worker fetches its sub-network from somewhere and brings it back:
  `2 * 4 * (S * shared + copies * block)`; for local SGD, which cuts no chain,
  `2 * 4 * S * total`.

  Args:
    sizes: Of the network; no partitioned chain means local SGD.
    num_workers: S.
    min_depth: Blocks a worker runs at least.

  Returns:
    Bytes, of float32 parameters, of all workers together.

  >>> sizes = Sizes(41_396_900, 15_422_116, {'c': 1_180_672}, {'c': 22})
  >>> round(round_trip_bytes(sizes, num_workers=4, min_depth=6) / 1e9, 3)
  0.72
  """
  params = num_workers * sizes.shared + sum(
    decomposition.num_copies(length, num_workers, min_depth) * sizes.block[name]
    for name, length in sizes.num_blocks.items()
  )
  return 2 * BYTES_PER_PARAM * params


def expected_share(
  num_blocks: int, num_workers: int, min_depth: int = 0
) -> float:
  """Returns the expected share of workers that hold a block in a round.

  Args:
    num_blocks: L, the length of the chain.
    num_workers: S.
    min_depth: Blocks a worker runs at least.

  Returns:
    `copies / (S * L)`: 1/S without a minimum depth, the paper's residual scale
    at test time. With one, its code uses `max(1 / S, min_depth / L)`.

  >>> expected_share(22, 4)
  0.25
  """
  copies = decomposition.num_copies(num_blocks, num_workers, min_depth)
  return copies / (num_workers * num_blocks)
