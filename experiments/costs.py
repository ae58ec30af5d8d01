"""A model of the seconds of a round on given machines and links.

Every worker has a device and a full-duplex link of its own. A local step takes
its operations / flops seconds or, if that is longer, the bytes between device
and memory / their bandwidth. Operations, these bytes and memory are those that
a compiler counted, where the step has been compiled; else operations and memory
come from formulas. An exchange takes the bytes that the busiest worker sends /
bandwidth, plus latency * the number of messages that wait for each other: 2 (S
- 1) in a ring all-reduce; in a hand-over, one for each slot of a worker and two
for each replica, and as many for each moment that moves with a block; in a
masked psum, an all-reduce for each of them. Before an outer step, the holders
of a block agree: two more messages for each replica, or one more all-reduce.
Data parallel has T all-reduces in a round. The baselines send float32. A masked
psum replaces a hand-over where that is impossible. Nothing overlaps, nothing
else takes time, and the losses that workers exchange are too small to count.
Memory is that of a worker with its activations, without images.
"""

from collections.abc import Mapping
import dataclasses
from functools import cache
import json
import pathlib
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np

from experiments.compile import chips, known, tables
from resist_jax import accounting, models
from resist_jax.decomposition import Assigner
from resist_jax.errors import ConfigError
from resist_jax.exchange import compression, hand_over
from resist_jax.exchange.hand_over import expected_messages
from resist_jax.rounds import Protocol
from resist_jax.run import checks, phases
from resist_jax.run import config as config_lib
from resist_jax.run.config import EXCHANGES, get_config
from resist_jax.run.phases import Traffic
from resist_jax.run.resnet_task import ResNetTask
from resist_jax.run.setup import Setup

NAMES = 'local_sgd', 'data_parallel', 'resist'
FORMULA = 'formula'  # The source of what no compiler was asked.


class Machine(NamedTuple):
  """The device and the link of a worker.

  Attributes:
    flops: Floating-point operations per second.
    bandwidth: Bits per second.
    latency: Seconds of a message without content.
    memory_bandwidth: Bytes per second between the device and its memory; None
      if they are no limit.
  """

  flops: float
  bandwidth: float
  latency: float
  memory_bandwidth: float | None = None


class Cost(NamedTuple):
  """What a worker does in a round.

  Attributes:
    flops: Floating-point operations.
    bytes: Bytes that the busiest worker sends.
    messages: Messages of the busiest worker that wait for each other.
    hbm_bytes: Bytes between its device and memory in local training; None if
      nobody knows.
  """

  flops: float
  bytes: float
  messages: int
  hbm_bytes: float | None = None

  def seconds(self, machine: Machine) -> dict[str, float]:
    """Returns the seconds of `compute`, `exchange` and the whole `round`."""
    compute = self.flops / machine.flops
    if self.hbm_bytes and machine.memory_bandwidth:
      compute = max(compute, self.hbm_bytes / machine.memory_bandwidth)
    exchange = 8 * self.bytes / machine.bandwidth
    exchange += self.messages * machine.latency
    total = compute + exchange
    return {'compute': compute, 'exchange': exchange, 'round': total}


class Plan:
  """Predictions for a config with any protocol and number of workers."""

  def __init__(
    self,
    config: Any,
    image: tuple[int, ...],
    classes: int,
    chip: str = 'h100',
    records: pathlib.Path = tables.FOLDER,
  ):
    """Validates the config.

    Args:
      config: The config; its fields `protocol` and `num_workers` are ignored.
      image: `(H, W, C)`.
      classes: Number of classes.
      chip: A key of `compile.chips.CHIPS`, whose compiler is believed.
      records: Where the records of compiled programs are.

    Raises:
      ConfigError: If the config cannot be used.
    """
    config = config.copy_and_resolve_references()
    if config.model.module:
      raise ConfigError(
        f'model.module is {config.model.module}, but only residual networks of '
        'the package can be planned: name a card without it.'
      )
    config.update({'protocol': 'resist', 'num_workers': 2, 'num_devices': 0})
    if config.depths:
      raise ConfigError(
        f'depths is {config.depths}, but a plan gives all workers equally many '
        'blocks: set it to ().'
      )
    if config.devices_per_worker > 1:
      raise ConfigError(
        f'devices_per_worker is {config.devices_per_worker}, but a plan gives '
        'each worker one device: set it to 1.'
      )
    checks.validate(config)
    network = config_lib.build_model(config, classes)
    params = jax.eval_shape(
      lambda: network.init(jax.random.key(0), np.zeros((1, *image), np.float32))
    )['params']
    cuts = config_lib.cut_chains(config)
    sizes = accounting.measure(params, list(cuts))
    self.image, self.network, blocks = image, network, sizes.num_blocks
    self._compiled = known.steps(chip, records)
    # A TPU's compiler keeps what norms read, and others also what they write.
    self._fused = bool(chips.CHIPS[chip].generation)
    none: Any = None  # Predictions need neither data nor devices.
    task = ResNetTask(network, none, config)
    self._passes = task.passes  # Data parallel workers distil nothing.
    self.setup = Setup(config, task, blocks, sizes, none)

  def traffic(self, name: str, num_workers: int) -> tuple[Traffic, str]:
    """Returns what a protocol sends, and the name of its exchange.

    Args:
      name: One of `NAMES`.
      num_workers: S.

    Returns:
      `(traffic, exchange)`; a masked psum where a hand-over is impossible.

    Raises:
      ValueError: If the workers cannot share the blocks in any way.
    """
    config = self.setup.config
    found = phases.describe(self.setup, name)

    def sending(exchange, wire_format):
      value = EXCHANGES[exchange](wire_format)
      protocol = dataclasses.replace(
        found.protocol, num_workers=num_workers, exchange=value
      )
      protocol.check()
      return dataclasses.replace(found, protocol=protocol)

    if name != 'resist':
      return sending(config.exchange, 'float32'), 'all_reduce'
    try:
      return sending(config.exchange, config.wire_format), config.exchange
    except ValueError:
      return sending('masked_psum', config.wire_format), 'masked_psum'

  def step(self, traffic: Traffic) -> known.Step | None:
    """Returns what a compiler said of a worker's step; None if none did."""
    if self._passes_of(traffic.protocol) > 1:  # None was compiled with them.
      return None
    network = self.network.with_chain_lengths(_lengths(traffic))
    batch_size = self.setup.config.batch_size
    description = known.described(network, self.image, batch_size)
    same = (step for of, step in self._compiled if of == description)
    return next(same, None)

  def memory(self, traffic: Traffic) -> dict[str, int]:
    """Returns the bytes that a worker holds, by part; see `accounting`."""
    protocol = traffic.protocol
    dtype = np.dtype(self.network.dtype)
    lengths = _lengths(traffic)
    network: Any = self.network  # It hashes, which type checkers do not see.
    numbers = _num_activations(
      network, tuple(self.image), tuple(lengths.items()), self._fused
    )
    held = accounting.predicted_memory(
      traffic.sizes,
      protocol,
      protocol.num_workers,
      dtype.itemsize * numbers * self.setup.config.batch_size,
    )
    compiled = self.step(traffic)
    if not compiled:
      return held
    # The exchange is another program, which keeps some of the parameters.
    return {'step': compiled.memory, 'exchange': held['exchange']}

  def cost(self, traffic: Traffic, exchange: str) -> Cost:
    """Returns the mean over all assignments, with a device for each worker."""
    protocol, sizes = traffic.protocol, traffic.sizes
    S, T = protocol.num_workers, protocol.local_steps
    lengths = _lengths(traffic)
    compiled = self.step(traffic)
    passes = self._passes_of(protocol)
    flops = compiled.flops if compiled else self._flops(lengths, passes)
    hbm_bytes = T * compiled.hbm_bytes if compiled else None
    without_losses = dataclasses.replace(protocol, exclude_faulty=False)
    sent = accounting.wire_bytes(sizes, without_losses, S) / S
    times = T if protocol.average_gradients else 1 + protocol.carry
    messages = (times + protocol.num_shared) * 2 * (S - 1)
    moving = times + bool(protocol.average)  # Copies of a block that it takes.
    if protocol.outer is not None:
      moving += accounting.num_moments(protocol.outer)
    # What holders of a block have learned is averaged before the outer step.
    settling = protocol.outer is not None
    if exchange == 'masked_psum':
      messages += len(lengths) * (moving + settling) * 2 * (S - 1)
    # Only a hand-over sends blocks one by one, and not equally many from all.
    for name in lengths if EXCHANGES.get(exchange) is hand_over else ():
      assigns = Assigner(*protocol.division(name))
      mean = expected_messages(assigns, S) / S
      block = compression.message_bytes(
        sizes.block[name], protocol.exchange.format.values
      )
      sent += moving * (max(blocks_sent(assigns)) - mean) * block
      messages += moving * assigns.num_columns
      messages += (moving + settling) * 2 * assigns.num_replicas
    return Cost(T * flops, sent, messages, hbm_bytes)

  def _passes_of(self, protocol: Protocol) -> int:
    """Returns the forward passes of a step."""
    return 1 if protocol.average_gradients else self._passes

  def _flops(self, lengths, passes: int) -> float:
    """Predicts the operations of a step."""
    per_image = models.predicted_flops(
      self.network, self.image, lengths, passes
    )
    return self.setup.config.batch_size * per_image

  def predict(self, num_workers: int, machine: Machine) -> dict[str, Any]:
    """Predicts a round of each protocol, and the speed-up by ResIST.

    Args:
      num_workers: S.
      machine: The device and the link of a worker.

    Returns:
      JSON values by name. For each protocol: exchange, blocks of a worker,
      memory in bytes, the source of its numbers, cost and seconds; or `why_not`
      if it is impossible.
      `speedup`: how many times faster ResIST is than each protocol.
    """
    row: dict[str, Any] = {'workers': num_workers, **machine._asdict()}
    for name in NAMES:
      try:
        traffic, exchange = self.traffic(name, num_workers)
      except ValueError as error:
        return row | {name: {'why_not': str(error)}, 'speedup': {}}
      cost, protocol = self.cost(traffic, exchange), traffic.protocol
      compiled = self.step(traffic)
      row[name] = {
        'exchange': exchange,
        'blocks': [protocol.slots_per_worker(k) for k in protocol.num_blocks],
        'memory': self.memory(traffic),
        'source': compiled.source if compiled else FORMULA,
        **cost._asdict(),
        'seconds': cost.seconds(machine),
      }
    s = {name: row[name]['seconds']['round'] for name in NAMES}
    return row | {'speedup': {name: s[name] / s['resist'] for name in NAMES}}


def sent(record: Mapping[str, Any]) -> float:
  """Predicts the bytes of a run in which each worker had a device.

  Args:
    record: Its result; only the rounds of its `curve` count.

  Returns:
    Bytes that all devices together would send, the mean over assignments.
  """
  config, summary = record['config'], record['summary']
  text = json.dumps(config, sort_keys=True)
  data = tuple(summary['image_shape']), len(summary['class_names'])
  rows = ((r['protocol'], r.get('rounds', 1)) for r in record['curve'])
  return sum(_sent_in_a_round(text, data, *row) for row in rows)


def sent_in_a_round(record: Mapping[str, Any]) -> float:
  """Returns the bytes of a round in which each worker has a device.

  Args:
    record: Result of a run, which counted them if its workers had one each.
  """
  summary = record['summary']
  if summary['num_devices'] == summary['num_workers']:
    return summary['wire_bytes_per_round']
  return sent({**record, 'curve': record['curve'][:1]})


@cache
def _sent_in_a_round(text: str, data, protocol: str, rounds: int) -> float:
  config = get_config()
  with config.unlocked():
    config.update(ConfigDict(json.loads(text)))
  workers = config.num_workers
  traffic, _ = Plan(config, *data).traffic(protocol, workers)
  made = traffic.protocol.lasting(rounds)
  return accounting.wire_bytes(traffic.sizes, made, workers)


def _lengths(traffic: Traffic) -> dict[str, int]:
  protocol = traffic.protocol
  return {k: protocol.slots_per_worker(k) for k in protocol.num_blocks}


def blocks_sent(assigns: Assigner) -> list[float]:
  """Returns how many blocks each worker sends in a hand-over, on average."""
  sent = [0.0] * assigns.num_workers
  ways = [assigns.column_routes(j) for j in range(assigns.num_columns)]
  for r in range(assigns.num_replicas):
    lend = assigns.replica_routes(r)[1:]  # No worker lends to itself.
    ways += [lend, [tuple((t, s) for s, t in route) for route in lend]]
  for routes in ways:
    for source, target in (pair for route in routes for pair in route):
      sent[source] += (source != target) / len(routes)
  return sent


@cache  # It is asked again for every link.
def _num_activations(network, image, lengths, fused) -> int:
  return models.num_activations(network, image, dict(lengths), fused)
