"""Bytes that a protocol sends: predicted from sizes, and read from programs.

The paper counts parameters that workers fetch and bring back. *Wire bytes* are
what devices really send to other devices, all of them together.
"""

from collections.abc import Mapping, Sequence

from resist_jax.accounting import hlo
from resist_jax.accounting.sizes import Sizes, num_moments, params_per_worker
from resist_jax.decomposition import Assignment, num_copies
from resist_jax.exchange import BYTES_PER_NUMBER, Load, all_reduce_bytes
from resist_jax.rounds import Protocol, Round

# The assignments before and after a round, by chain.
Moves = Mapping[str, tuple[Assignment, Assignment]]


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


def compiled_wire_bytes(
  run: Round, branches: Mapping[str, int], inside: bool = False
) -> int:
  """Reads what a compiled round sends between the devices of two workers.

  Args:
    run: A round that `Round.compile` returned.
    branches: The branches taken in the round, see `traffic.branches`.
    inside: Read what devices of the same worker send each other instead.

  Returns:
    Bytes that all devices together send.
  """
  times = {
    'begin': 1,
    'share': run.protocol.num_shared,
    'finish': 1,
    'round': 1,
  }
  return sum(
    times.get(name, run.protocol.steps)
    * hlo.wire_bytes(program.as_text(), branches, run.group_size, inside)
    for name, program in run.programs.items()
  )


def predicted_group_bytes(
  sizes: Sizes,
  protocol: Protocol,
  devices_per_worker: int,
  statistics: int,
  num_metrics: int,
) -> int:
  """Predicts what a local step sends between the devices of a worker.

  Args:
    sizes: Sizes of the network, as the protocol cuts it.
    protocol: Who holds what.
    devices_per_worker: G.
    statistics: Numbers that batch norm averages in a step, and gradients of
      these.
    num_metrics: How many metrics the loss function reports, the loss included.

  Returns:
    Bytes that all devices together send: rings of gradients, metrics, and
    statistics of batch norm with their gradients.
  """
  S = protocol.num_workers
  params = params_per_worker(sizes, protocol)
  numbers = params + num_metrics + statistics
  return S * 2 * (devices_per_worker - 1) * BYTES_PER_NUMBER * numbers
