"""What a protocol sends and stores, predicted from the network's sizes.

The paper's count is of parameters that workers fetch and bring back. *Wire
bytes* are what really leaves a device for another one, all devices together;
`hlo.py` reads the same number from the compiled program.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax

from resist_jax import decomposition
from resist_jax.decomposition.assignments import Assigner, Assignment, Route
from resist_jax.exchange import collectives, compression
from resist_jax.rounds.state import MinDepth, Protocol, min_depth_of

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
  sizes: Sizes,
  num_workers: int,
  min_depth: MinDepth = 0,
  depths: Sequence[int] = (),
) -> int:
  """Returns the parameters of the largest sub-network.

  Args:
    sizes: Of the network; no partitioned chain means the full model.
    num_workers: S.
    min_depth: Blocks a worker runs at least.
    depths: See `decomposition.slots_per_worker`.

  Returns:
    Shared parameters and K blocks of each partitioned chain.
  """
  return sizes.shared + sum(
    decomposition.slots_per_worker(
      length, num_workers, min_depth_of(name, min_depth), depths
    )
    * sizes.block[name]
    for name, length in sizes.num_blocks.items()
  )


def round_trip_bytes(
  sizes: Sizes,
  num_workers: int,
  min_depth: MinDepth = 0,
  depths: Sequence[int] = (),
) -> int:
  """Counts the bytes of a round as the paper's Table 1 does.

  Every worker fetches its sub-network from somewhere and brings it back:
  `2 * 4 * (S * shared + copies * block)`; for local SGD, which cuts no chain,
  `2 * 4 * S * total`.

  Args:
    sizes: Of the network; no partitioned chain means local SGD.
    num_workers: S.
    min_depth: Blocks a worker runs at least.
    depths: See `decomposition.slots_per_worker`.

  Returns:
    Bytes, of float32 parameters, of all workers together.

  >>> sizes = Sizes(41_396_900, 15_422_116, {'c': 1_180_672}, {'c': 22})
  >>> round(round_trip_bytes(sizes, num_workers=4, min_depth=6) / 1e9, 3)
  0.72
  """
  params = num_workers * sizes.shared + sum(
    decomposition.num_copies(
      length, num_workers, min_depth_of(name, min_depth), depths
    )
    * sizes.block[name]
    for name, length in sizes.num_blocks.items()
  )
  return 2 * BYTES_PER_PARAM * params


def paper_bytes(sizes: Sizes, protocol: Protocol) -> int:
  """Counts the bytes of a protocol's round as the paper does.

  Args:
    sizes: Of the network, as the protocol cuts it.
    protocol: Who sends what. Gradients that are averaged travel at every step,
      and momentum that is carried travels with the parameters.

  Returns:
    Bytes, of float32 numbers whatever the wire format.
  """
  sent = round_trip_bytes(
    sizes, protocol.num_workers, protocol.min_depth, protocol.depths
  )
  if protocol.average_gradients:
    return sent * protocol.local_steps
  return sent * 2 if protocol.carry_velocity else sent


def expected_share(
  num_blocks: int,
  num_workers: int,
  min_depth: int | None = 0,
  depths: Sequence[int] = (),
) -> float:
  """Returns the expected share of workers that hold a block in a round.

  Args:
    num_blocks: L, the length of the chain.
    num_workers: S.
    min_depth: Blocks a worker runs at least.
    depths: See `decomposition.slots_per_worker`.

  Returns:
    `copies / (S * L)`: 1/S without a minimum depth, the paper's residual scale
    at test time. With one, its code uses `max(1 / S, min_depth / L)`.

  >>> expected_share(22, 4)
  0.25
  """
  sizes = num_blocks, num_workers, min_depth, depths
  copies = decomposition.num_copies(*sizes)
  return copies / (num_workers * num_blocks)


def all_reduce_bytes(
  count: int, num_workers: int, num_devices: int, encoding: str = 'float32'
) -> int:
  """Predicts the wire bytes of giving all workers the sum of their vectors.

  Exact sums go round a ring: each device sends `2 (D - 1) / D` of the vector.
  Rounded ones are a reduce-scatter and an all-gather of encoded parts, see
  `collectives.sum_over_workers`.

  Args:
    count: Length of the vectors.
    num_workers: S.
    num_devices: D.
    encoding: See `compression.encode`.

  Returns:
    Bytes, of all devices together.

  >>> all_reduce_bytes(1_000_000, num_workers=4, num_devices=4)
  24000000
  """
  S, D = num_workers, num_devices
  if encoding == 'float32':
    return 2 * (D - 1) * BYTES_PER_PARAM * count
  message = compression.message_bytes(collectives.part_size(count, S), encoding)
  return (S * (S - S // D) + S * (D - 1)) * message


def messages(
  dealer: Assigner, before: Assignment, after: Assignment, num_devices: int
) -> int:
  """Counts the blocks that a hand-over sends from device to device.

  Args:
    dealer: Of the chain.
    before: A deal.
    after: The deal after it.
    num_devices: D.

  Returns:
    Guests that go home, blocks that move on, and guests that are lent.
  """
  per_device = dealer.num_workers // num_devices
  taken = [dealer.moves(j)[t] for j, t in enumerate(after.shifts)]
  for deal in (before, after):
    taken += [dealer.lendings(g)[t] for g, t in enumerate(deal.loans)]
  return sum(_away(route, per_device) for route in taken)


def expected_messages(dealer: Assigner, num_devices: int) -> float:
  """Returns the mean of `messages` over all deals.

  Args:
    dealer: Of the chain.
    num_devices: D.

  Returns:
    Blocks a round.

  >>> expected_messages(Assigner(22, 4), num_devices=4)
  16.0
  """
  per_device = dealer.num_workers // num_devices

  def mean(routes: list[Route]) -> float:
    return sum(_away(route, per_device) for route in routes) / len(routes)

  moved = sum(mean(dealer.moves(j)) for j in range(dealer.num_columns))
  guests = range(len(dealer.borrowers))
  # The route of loan 0 is never taken.
  return moved + 2 * sum(mean(dealer.lendings(g)[1:]) for g in guests)


def _away(route: Route, per_device: int) -> int:
  return sum(s // per_device != t // per_device for s, t in route)


def branches(
  name: str, before: Assignment, after: Assignment
) -> dict[str, int]:
  """Tells which routes a hand-over takes, for `hlo.wire_bytes`.

  Args:
    name: Of the chain.
    before: A deal of it.
    after: The deal after it.

  Returns:
    The branch taken in each scope that `hand_over` names.
  """
  found = {f'{name}_move_{j}': int(t) for j, t in enumerate(after.shifts)}
  for action, deal in (('return', before), ('lend', after)):
    for g, loan in enumerate(deal.loans):
      found[f'{name}_{action}_{g}'] = int(loan)
  return found


def wire_bytes(
  sizes: Sizes,
  protocol: Protocol,
  num_devices: int,
  deals: Mapping[str, tuple[Assignment, Assignment]] | None = None,
  devices_per_worker: int = 1,
) -> float:
  """Predicts what a round puts on the wire between workers.

  Args:
    sizes: Of the network, as the protocol cuts it.
    protocol: Who sends what.
    num_devices: D, or groups of them.
    deals: For each chain that is handed over, the deals before and after the
      round; without, the mean over all deals.
    devices_per_worker: G; in a group, each sends its own copy.

  Returns:
    Bytes, of all devices together.
  """
  S, D, encoding = protocol.num_workers, num_devices, protocol.format.values
  # Where workers are left out, all know each other's losses first.
  losses = all_reduce_bytes(S, S, D) if protocol.leave_out else 0
  if protocol.average_gradients:
    step = all_reduce_bytes(sizes.total, S, D, encoding)
    sent = protocol.local_steps * (step + losses)
    return devices_per_worker * sent
  total: float = losses
  total += all_reduce_bytes(sizes.shared, S, D, protocol.format.changes)
  if protocol.carry_velocity:
    total += all_reduce_bytes(sizes.shared, S, D, encoding)
  times = 2 if protocol.carry_velocity else 1  # Momentum goes where blocks go.
  for name, length in protocol.num_blocks.items():
    if protocol.exchange == 'masked_psum':
      # Counts each block's holders, and the good ones apart.
      total += all_reduce_bytes((1 + protocol.leave_out) * length, S, D)
      chain: float = all_reduce_bytes(
        length * sizes.block[name], S, D, encoding
      )
    else:
      dealer = protocol.dealer(name)
      sent = (
        messages(dealer, *deals[name], D)
        if deals
        else expected_messages(dealer, D)
      )
      chain = sent * compression.message_bytes(sizes.block[name], encoding)
    total += times * chain
  return devices_per_worker * total
