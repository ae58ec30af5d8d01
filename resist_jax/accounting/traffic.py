"""Bytes that a protocol sends, predicted from the network's sizes.

The paper counts parameters that workers fetch and bring back. *Wire bytes* are
what devices really send to other devices, all of them together; `hlo.py` reads
the same number from a compiled program.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np
import optax

from resist_jax.decomposition import (
  Assignment,
  num_copies,
  slots_per_worker,
  split,
)
from resist_jax.exchange import BYTES_PER_NUMBER, Load, all_reduce_bytes
from resist_jax.rounds import Protocol
from resist_jax.rounds.moments import take_apart

PyTree = Any
# The assignments before and after a round, by chain.
Moves = Mapping[str, tuple[Assignment, Assignment]]


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


def _count(tree: PyTree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def params_per_worker(sizes: Sizes, protocol: Protocol) -> int:
  """Returns the parameters of the largest sub-network.

  Args:
    sizes: Sizes of the network.
    protocol: Who holds what.

  Returns:
    Shared parameters, and K blocks of each partitioned chain.
  """
  return sizes.shared + sum(
    slots_per_worker(*protocol.division(name)) * sizes.block[name]
    for name in sizes.num_blocks
  )


def round_trip_bytes(sizes: Sizes, protocol: Protocol) -> int:
  """Counts the bytes of a round as the paper's Table 1 does.

  Every worker fetches its sub-network from somewhere and brings it back:
  `2 * 4 * (S * shared + copies * block)`; for local SGD, which cuts no chain,
  `2 * 4 * S * total`.

  Args:
    sizes: Sizes of the network; no partitioned chain means local SGD.
    protocol: Who holds what.

  Returns:
    Bytes of float32 parameters, of all workers together.

  >>> sizes = Sizes(41_396_900, 15_422_116, {'c': 1_180_672}, {'c': 22})
  >>> protocol = Protocol(4, 50, {'c': 22}, min_depth=6)
  >>> round(round_trip_bytes(sizes, protocol) / 1e9, 3)
  0.72
  """
  params = protocol.num_workers * sizes.shared + sum(
    num_copies(*protocol.division(name)) * sizes.block[name]
    for name in sizes.num_blocks
  )
  return 2 * BYTES_PER_NUMBER * params


def paper_bytes(
  sizes: Sizes, protocol: Protocol, moments: Sequence[Sizes] | None = None
) -> int:
  """Counts the bytes of a protocol's round as the paper does.

  Args:
    sizes: Sizes of the network, as the protocol cuts it.
    protocol: Who sends what. Averaged gradients travel at every step, carried
      moments with the parameters.
    moments: Sizes of each moment of the optimiser; None for one moment of the
      parameters' size, such as momentum.

  Returns:
    Bytes of float32 numbers, whatever the wire format.
  """
  if protocol.average_gradients:
    return round_trip_bytes(sizes, protocol) * protocol.steps
  parts = _parts(sizes, protocol, moments)
  shared = 2 * BYTES_PER_NUMBER * protocol.num_workers * sizes.shared
  return protocol.num_shared * shared + sum(
    round_trip_bytes(part, protocol) for part in parts
  )


def _parts(sizes, protocol, moments) -> list[Sizes]:
  """Returns the sizes of all that is exchanged."""
  if not protocol.carry:
    return [sizes]
  return [sizes, *([sizes] if moments is None else moments)]


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


def branches(protocol: Protocol, moves: Moves) -> dict[str, int]:
  """Returns which branches an exchange takes, for `hlo.wire_bytes`.

  Args:
    protocol: Who sends what.
    moves: The assignments before and after the round.

  Returns:
    The branch taken in each scope that the exchange names.
  """
  return {
    f'{name}/{scope}': branch
    for name, pair in moves.items()
    for scope, branch in protocol.exchange.branches(*pair).items()
  } | {
    f'settle_{name}/{scope}': branch
    for name, (before, _) in moves.items()
    if protocol.outer is not None
    for scope, branch in protocol.exchange.branches(
      before, before.staying()
    ).items()
  }


def wire_bytes(
  sizes: Sizes,
  protocol: Protocol,
  num_devices: int,
  moves: Moves | None = None,
  devices_per_worker: int = 1,
  moments: Sequence[Sizes] | None = None,
  outer: Sequence[Sizes] | None = None,
) -> float:
  """Predicts what a round puts on the wire between workers.

  Args:
    sizes: Sizes of the network, as the protocol cuts it.
    protocol: Who sends what.
    num_devices: D, or the number of groups of devices.
    moves: The assignments before and after the round; None for the mean over
      all assignments.
    devices_per_worker: G; in a group, each device sends its own copy.
    moments: See `paper_bytes`.
    outer: Sizes of each moment of the outer optimiser; None for moments of the
      parameters' size, as many as it keeps.

  Returns:
    Bytes that all devices together send.
  """
  S, D, form = protocol.num_workers, num_devices, protocol.exchange.format
  # Where workers may be excluded, all of them first exchange their losses, and
  # the norms of their updates.
  losses = all_reduce_bytes(S, S, D) if protocol.exclude_faulty else 0
  judging = 2 * losses if protocol.judges_updates else losses
  if protocol.average_gradients:
    step = all_reduce_bytes(sizes.total, S, D, form.values) + losses
    end = judging if protocol.judges_updates else 0
    return devices_per_worker * (protocol.steps * step + end)
  parts = _parts(sizes, protocol, moments)
  shared = all_reduce_bytes(sizes.shared, S, D) + judging
  total: float = judging + protocol.num_shared * shared
  total += all_reduce_bytes(parts[0].shared, S, D, form.changes)
  moved = sum(part.shared for part in parts[1:])  # Moments travel together.
  of_moments = protocol.exchange.of_moments
  total += all_reduce_bytes(moved, S, D, of_moments.format.values)
  for name in protocol.num_blocks:
    load = Load(
      protocol.division(name),
      tuple(part.block[name] for part in parts),
      protocol.exclude_faulty,
    )
    pair = moves[name] if moves else (None, None)
    if protocol.outer is None:
      total += _carried_bytes(protocol.exchange, load, D, pair)
    else:
      kept = [sizes] * num_moments(protocol.outer) if outer is None else outer
      total += _outer_bytes(protocol, load, name, D, pair, kept)
    if protocol.average:
      total += _average_bytes(protocol, load, D, pair)
  return devices_per_worker * total


def _carried_bytes(exchange, load, num_devices, pair) -> float:
  """Returns the bytes of a chain and its carried moments."""
  if exchange.moments is None or len(load.block_sizes) == 1:
    return exchange.bytes(load, num_devices, *pair)
  block, *moments = load.block_sizes
  # What is sent besides the blocks is the same, and XLA sends it once.
  alone, carried, besides = (
    load._replace(block_sizes=sizes) for sizes in ((block,), (*moments,), ())
  )
  return (
    exchange.bytes(alone, num_devices, *pair)
    + exchange.moments.bytes(carried, num_devices, *pair)
    - exchange.moments.bytes(besides, num_devices, *pair)
  )


def _average_bytes(protocol, load, num_devices, pair) -> float:
  """Returns the bytes of moving the averages of a chain's blocks."""
  moving = load._replace(block_sizes=load.block_sizes[:1], excludes=False)
  sent = protocol.exchange.bytes(moving, num_devices, *pair)
  if protocol.outer is None and protocol.exclude_faulty:
    return sent
  # What is sent besides the blocks was sent before, and XLA sends it once.
  besides = moving._replace(block_sizes=())
  return sent - protocol.exchange.bytes(besides, num_devices, *pair)


def num_moments(optimizer: optax.GradientTransformation) -> int:
  """Returns how many numbers an optimiser keeps for each parameter."""
  state = optimizer.init(np.float32(0))
  return len(take_apart(optimizer, state).moments)


def _outer_bytes(protocol, load, name, num_devices, pair, outer) -> float:
  """Returns the bytes of a chain: it settles, then moves with all moments."""
  before, after = pair
  exchange, stay = protocol.exchange, before and before.staying()
  block = load.block_sizes[0]
  alone = load._replace(block_sizes=(block,))
  moving = load._replace(
    block_sizes=(block, *(moment.block[name] for moment in outer)),
    excludes=False,
  )
  twice = 0.0
  if not protocol.exclude_faulty:
    # What is sent besides the blocks is the same, and XLA sends it once.
    besides = moving._replace(block_sizes=())
    twice = exchange.bytes(besides, num_devices, before, after)
  # Carried moments move while the blocks stay; both share their fixed costs.
  return (
    exchange.bytes(load, num_devices, before, after)
    - exchange.bytes(alone, num_devices, before, after)
    + exchange.bytes(alone._replace(stays=True), num_devices, before, stay)
    + exchange.bytes(moving, num_devices, before, after)
    - twice
  )
