"""What a round costs on given machines and links, predicted.

The model: every worker has a device and a full-duplex link of its own. Compute
takes T * batch * operations on an image / flops; nothing else takes time, and
nothing overlaps. An exchange takes the bytes that the busiest worker sends /
bandwidth, and latency * messages that wait for each other: 2 (S - 1) in a ring
all-reduce, one a column and two a guest in a hand-over. Data parallel has T
all-reduces a round. Baselines send float32. Where a hand-over is impossible, a
masked psum stands in. What workers tell each other of their losses is too small
to count. Memory is a worker's, without activations.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from resist_jax import accounting, models
from resist_jax.decomposition.assignments import Assigner
from resist_jax.exchange import compression
from resist_jax.rounds import state as state_lib
from resist_jax.run import checks
from resist_jax.run import config as config_lib
from resist_jax.run.setup import Setup

NAMES = 'local_sgd', 'data_parallel', 'resist'


class Machine(NamedTuple):
  """A worker's operations and bits per second, and seconds a message."""

  flops: float
  bandwidth: float
  latency: float


class Cost(NamedTuple):
  """Operations of a worker in a round, bytes and messages of the busiest."""

  flops: float
  bytes: float
  messages: int

  def seconds(self, machine: Machine) -> dict[str, float]:
    """Returns those of a round, by what they are spent on."""
    compute = self.flops / machine.flops
    exchange = 8 * self.bytes / machine.bandwidth
    exchange += self.messages * machine.latency
    total = compute + exchange
    return {'compute': compute, 'exchange': exchange, 'round': total}


class Plan:
  """Predictions for a config whose protocol and num_workers are free."""

  def __init__(self, config: Any, image: tuple[int, ...], classes: int):
    config = config.copy_and_resolve_references()
    config.update({'protocol': 'resist', 'num_workers': 2, 'num_devices': 0})
    checks.validate(config)
    network = config_lib.build_model(config, classes)
    params = jax.eval_shape(
      lambda: network.init(jax.random.key(0), np.zeros((1, *image), np.float32))
    )['params']
    chains = list(config_lib.cut_chains(config))
    sizes = accounting.measure(params, chains)
    self.image, blocks = image, sizes.num_blocks
    none: Any = None  # Neither data nor devices.
    self.setup = Setup(config, none, network, blocks, sizes, none)

  def protocol(self, name: str, num_workers: int) -> state_lib.Protocol:
    """Returns a protocol; a masked psum where a hand-over is impossible."""
    protocol = self.setup.protocol(name)
    protocol = dataclasses.replace(protocol, num_workers=num_workers)
    if name != 'resist':
      return dataclasses.replace(protocol, wire_format='float32')
    for chain in protocol.num_blocks:
      protocol.slots_per_worker(chain)
      try:
        protocol.dealer(chain)
      except ValueError:
        protocol = dataclasses.replace(protocol, exchange='masked_psum')
    return protocol

  def cost(self, protocol: state_lib.Protocol) -> Cost:
    """Returns the mean over all deals, with a device for each worker."""
    S, T = protocol.num_workers, protocol.local_steps
    lengths = {k: protocol.slots_per_worker(k) for k in protocol.num_blocks}
    flops = models.predicted_flops(self.setup.network, self.image, lengths)
    sizes = self.setup.sizes_for(protocol)
    exact = dataclasses.replace(protocol, leave_out=False)
    sent = accounting.wire_bytes(sizes, exact, S) / S
    times = T if protocol.average_gradients else 1 + protocol.carry_velocity
    messages = times * 2 * (S - 1)
    for name in lengths if protocol.exchange == 'hand_over' else ():
      dealer = protocol.dealer(name)
      mean = accounting.expected_messages(dealer, S) / S
      block = compression.message_bytes(
        sizes.block[name], protocol.format.values
      )
      sent += times * (max(blocks_sent(dealer)) - mean) * block
      messages += times * (dealer.num_columns + 2 * len(dealer.borrowers))
    return Cost(T * self.setup.config.batch_size * flops, sent, messages)

  def predict(self, num_workers: int, machine: Machine) -> dict[str, Any]:
    """Returns a round of each protocol, or why not, and ResIST's speed-up."""
    found: dict[str, Any] = {'workers': num_workers, **machine._asdict()}
    for name in NAMES:
      try:
        protocol = self.protocol(name, num_workers)
      except ValueError as error:
        return found | {name: {'why_not': str(error)}, 'speedup': {}}
      cost, sizes = self.cost(protocol), self.setup.sizes_for(protocol)
      found[name] = {
        'exchange': protocol.exchange if protocol.num_blocks else 'all_reduce',
        'blocks': [protocol.slots_per_worker(k) for k in protocol.num_blocks],
        'memory': accounting.predicted_memory(sizes, protocol, num_workers),
        **cost._asdict(),
        'seconds': cost.seconds(machine),
      }
    s = {name: found[name]['seconds']['round'] for name in NAMES}
    return found | {'speedup': {name: s[name] / s['resist'] for name in NAMES}}


def blocks_sent(dealer: Assigner) -> list[float]:
  """Returns how many blocks each worker sends in a hand-over, mean of deals."""
  sent = [0.0] * dealer.num_workers
  ways = [dealer.moves(j) for j in range(dealer.num_columns)]
  for g in range(len(dealer.borrowers)):
    lend = dealer.lendings(g)[1:]  # Nobody lends to itself.
    ways += [lend, [tuple((t, s) for s, t in route) for route in lend]]
  for routes in ways:
    for source, target in (pair for route in routes for pair in route):
      sent[source] += (source != target) / len(routes)
  return sent
