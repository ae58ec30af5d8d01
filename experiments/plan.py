"""What ResIST would gain on given machines and links, before trying it.

The model: every worker has a device and a full-duplex link of its own. Compute
takes T * batch * operations on an image / flops; nothing else takes time, and
nothing overlaps. An exchange takes the bytes that the busiest worker sends /
bandwidth, and latency * messages that wait for each other: 2 (S - 1) in a ring
all-reduce, one a column and two a guest in a hand-over. Data parallel has T
all-reduces a round. Baselines send float32. Where a hand-over is impossible, a
masked psum stands in. Memory: parameters, momentum, gradients of a worker, and
what a rounded exchange keeps; no activations.

  python -m experiments.plan --bandwidth=1Gbit --flops=1e13  # paper's setting
  python -m experiments.plan --config=experiments/configs/digits.py \
    --bandwidth=100Mbit --flops=1e12 --latency=1ms --workers=2,4,8 --out=DIR
  python -m experiments.plan --check  # measured beside predicted, on this CPU
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import pathlib
import re
import statistics
import sys
import time
from typing import Any, NamedTuple

from absl import flags
import jax
from jax import lax
import jax.numpy as jnp
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from ml_collections import config_flags
import numpy as np

from experiments.configs import digits
from experiments.provenance import provenance
from resist_jax import accounting, build, entry, footprint, plots, wire
from resist_jax import config as config_lib
from resist_jax import state as state_lib
from resist_jax.dealing import Dealer
from resist_jax.exchange import WORKER
from resist_jax.model import chain_name
from resist_jax.state import Protocol

Rows = Sequence[Mapping[str, Any]]

LADDER = tuple(10 ** (k / 4) for k in range(28, 45))  # 10 Mbit to 100 Gbit
UNITS = {'': 1, 'kbit': 1e3, 'Mbit': 1e6, 'Gbit': 1e9, 'ms': 1e-3, 'us': 1e-6}
NAMES = 'local_sgd', 'data_parallel', 'resist'
DATA = {
  'digits': ((8, 8, 1), 10),
  'cifar10': ((32, 32, 3), 10),
  'cifar100': ((32, 32, 3), 100),
  'imagenet2012': ((224, 224, 3), 1000),
}


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
    config_lib.validate(config)
    network = config_lib.build_model(config, classes)
    params = jax.eval_shape(
      lambda: network.init(jax.random.key(0), jnp.zeros((1, *image)))
    )['params']
    chains = [chain_name(stage) for stage in config.partition]
    sizes = accounting.measure(params, chains)
    self.image, none = image, Any  # Neither data nor devices.
    self.setup = build.Setup(
      config, none, network, sizes.num_blocks, sizes, none
    )

  def protocol(self, name: str, num_workers: int) -> Protocol:
    """Returns a protocol; a masked psum where a hand-over is impossible."""
    protocol = self.setup.protocol(name)
    protocol = dataclasses.replace(protocol, num_workers=num_workers)
    if name != 'resist':
      return dataclasses.replace(protocol, wire_format='float32')
    for chain, length in protocol.num_blocks.items():
      protocol.slots_per_worker(chain)
      try:
        Dealer(length, num_workers, protocol.min_depth)
      except ValueError:
        protocol = dataclasses.replace(protocol, exchange='masked_psum')
    return protocol

  def cost(self, protocol: Protocol) -> Cost:
    """Returns the mean over all deals, with a device for each worker."""
    S, T = protocol.num_workers, protocol.local_steps
    lengths = {k: protocol.slots_per_worker(k) for k in protocol.num_blocks}
    flops = footprint.predicted_flops(self.setup.network, self.image, lengths)
    sizes = self.setup.sizes_for(protocol)
    sent = accounting.wire_bytes(sizes, protocol, S) / S
    times = T if protocol.average_gradients else 1 + protocol.carry_velocity
    messages = times * 2 * (S - 1)
    for name in lengths if protocol.exchange == 'hand_over' else ():
      dealer = protocol.dealer(name)
      mean = accounting.expected_messages(dealer, S) / S
      block = wire.message_bytes(sizes.block[name], protocol.format.values)
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
        'memory': footprint.predicted_memory(sizes, protocol, num_workers),
        **cost._asdict(),
        'seconds': cost.seconds(machine),
      }
    rounds = {name: found[name]['seconds']['round'] for name in NAMES}
    speedup = {name: s / rounds['resist'] for name, s in rounds.items()}
    return found | {'speedup': speedup}


def blocks_sent(dealer: Dealer) -> list[float]:
  """Returns how many blocks each worker sends in a hand-over, mean of deals.

  >>> blocks_sent(Dealer(3, 2))
  [0.5, 0.5]
  """
  sent = [0.0] * dealer.num_workers
  ways = [dealer.moves(j) for j in range(dealer.num_columns)]
  for g in range(len(dealer.borrowers)):
    lend = dealer.lendings(g)[1:]  # Nobody lends to itself.
    ways += [lend, [tuple((t, s) for s, t in route) for route in lend]]
  for routes in ways:
    for source, target in (pair for route in routes for pair in route):
      sent[source] += (source != target) / len(routes)
  return sent


def _table(rows: Rows) -> str:
  """Returns predictions for a terminal, with a reason for dashes."""
  cells = [
    ['S', 'blocks', 'exchange', 'compute s', 'exchange s', 'round s']
    + ['local SGD s', 'data par. s', 'x local SGD', 'x data par.']
    + ['MB held', 'of full']
  ]
  reasons = []
  for row in rows:
    *others, mine = (row[name] for name in NAMES)
    line = ['-'] * 10
    held = [sum(x['memory'].values()) for x in row.values() if _known(x)]
    if row['speedup']:
      line[:2] = '+'.join(map(str, mine['blocks'])), mine['exchange']
      line[2:5] = [f'{x:.3g}' for x in mine['seconds'].values()]
      line[7:9] = [f'{row["speedup"][name]:.2f}' for name in NAMES[:2]]
      line[9] = f'{held[-1] / 1e6:.3g}'
    else:
      reasons.append(f'No ResIST at S={row["workers"]}: {mine["why_not"]}')
    line[5:7] = [f'{x["seconds"]["round"]:.3g}' for x in others]
    cells.append([str(row['workers']), *line, f'{held[0] / 1e6:.3g}'])
  return '\n'.join([_aligned(cells), *reasons[:1]])


def _known(value: Any) -> bool:
  return isinstance(value, dict) and 'memory' in value


def _aligned(cells: Sequence[Sequence[str]]) -> str:
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(x.rjust(w) for x, w in zip(line, widths, strict=True))
    for line in cells
  )


def draw(rows: Rows, bandwidth: float, title: str) -> Figure:
  """Draws ResIST's speed-up against the link, for a few S.

  Args:
    rows: Of `Plan.predict`, by bandwidth for each S.
    bandwidth: To be marked.
    title: Of the picture.

  Returns:
    The figure.
  """
  figure = Figure(figsize=(7, 4.8), layout='constrained')
  axes = figure.add_subplot()
  able = sorted({row['workers'] for row in rows if row['speedup']})
  shown = [*able[:4], *able[4:][-1:]]
  for S, colour in zip(shown, plots.colours(len(shown)), strict=True):
    mine = [row for row in rows if row['workers'] == S]
    exchange = mine[0]['resist']['exchange'].replace('_', ' ')
    axes.plot(
      [row['bandwidth'] for row in mine],
      [row['speedup']['local_sgd'] for row in mine],
      color=colour,
      linestyle='--' if exchange == 'masked psum' else '-',
      label=f'{S} workers, {exchange}',
    )
  axes.axvline(
    bandwidth, color='#888888', linestyle=':', label='link asked for'
  )
  axes.set(xscale='log', xlabel="speed of a worker's link", ylim=(0, None))
  axes.set_title(title, fontsize=9, loc='left')
  axes.set_ylabel('times as fast as local SGD')
  axes.xaxis.set_major_formatter(EngFormatter('bit/s'))
  axes.grid(color='#e4e4e4', linewidth=0.8)
  axes.spines[['top', 'right']].set_visible(False)
  figure.legend(loc='outside lower center', frameon=False, ncols=3, fontsize=9)
  return figure


def check(config: Any, workers: Sequence[int]) -> list[dict[str, Any]]:
  """Measures rounds, each worker on a virtual device, beside predictions.

  Args:
    config: What to train.
    workers: Each S.

  Returns:
    JSON values for each S and protocol.
  """
  rows = []
  for S in workers:
    machine = None
    for name in NAMES:  # Local SGD first.
      config = config.copy_and_resolve_references()
      config.update({'protocol': name, 'num_workers': S, 'num_devices': S})
      setup = build.prepare(config)
      image = setup.dataset.train.images.shape[1:]
      plan = Plan(config, image, setup.dataset.num_classes)
      phase, state, deals = entry.enter(setup, None)
      cost, batches = plan.cost(phase.protocol), setup.batches(0)
      machine = machine or _measure(setup, cost)
      seconds = []
      for _ in range(6):
        began = time.perf_counter()
        state, _ = phase.run(state, next(deals), setup.constants, batches, 0)
        jax.block_until_ready(state.shared)
        seconds.append(time.perf_counter() - began)
      predicted, measured = (
        cost.seconds(machine),
        statistics.median(seconds[1:]),
      )
      row = {'workers': S, 'protocol': name, **machine._asdict()}
      row |= {'predicted': predicted, 'measured': measured}
      rows.append(row | {'ratio': predicted['round'] / measured})
  return rows


def _measure(setup: build.Setup, cost: Cost) -> Machine:
  """Times steps of local SGD and an all-reduce, all workers at once."""
  phase, state, _ = entry.enter(setup, None)
  run, index = phase.run.compiled, np.int32(0)
  on_workers = jax.sharding.NamedSharding(setup.mesh, state_lib.SHARDED)
  batch = jax.device_put(setup.batches(0)[:, 0], on_workers)
  local = run['begin'](state.shared, state.chain, state.velocity)

  def steps():
    nonlocal local
    for _ in range(phase.protocol.local_steps):
      local = run['step'](local, {}, setup.constants, batch, index, index)
    return local

  shape = phase.protocol.num_workers, setup.sizes.total
  vectors = jax.device_put(np.ones(shape, np.float32), on_workers)
  specs = {'in_specs': state_lib.SHARDED, 'out_specs': state_lib.REPLICATED}
  add_up = jax.jit(
    jax.shard_map(lambda x: lax.psum(x, WORKER), mesh=setup.mesh, **specs)
  )
  reduce = _median_seconds(lambda: add_up(vectors))
  return Machine(
    cost.flops / _median_seconds(steps), 8 * cost.bytes / reduce, 0.0
  )


def _median_seconds(function: Callable[[], Any]) -> float:
  found = []
  for _ in range(6):
    began = time.perf_counter()
    jax.block_until_ready(function())
    found.append(time.perf_counter() - began)
  return statistics.median(found[1:])  # The first was to warm up.


def _amount(text: str) -> float:
  found = re.fullmatch(r'(\d+\.?\d*(?:e[+-]?\d\d?)?)([kMG]bit|ms|us|)', text)
  if not found:
    raise argparse.ArgumentTypeError(f'{text!r}; write 1e9, 100Mbit or 1ms.')
  return float(found[1]) * UNITS[found[2]]


def _integers(text: str) -> tuple[int, ...]:
  if not re.fullmatch(r'[1-9]\d*([x,][1-9]\d*)*', text):
    raise argparse.ArgumentTypeError(f'{text!r}; write 2,4,8 or 32x32x3.')
  return tuple(map(int, re.split('[x,]', text)))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(
    description=__doc__, exit_on_error=False, allow_abbrev=False,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )  # fmt: skip
  parser.add_argument('--config', help='card; --config.FIELD=VALUE overrides')
  parser.add_argument('--bandwidth', type=_amount, help='1Gbit')
  parser.add_argument('--flops', type=_amount, help='1e13')
  parser.add_argument('--latency', type=_amount, default='0.1ms')
  parser.add_argument('--workers', type=_integers, help='2,4,8')
  parser.add_argument('--image', type=_integers, help='32x32x3')
  parser.add_argument('--classes', type=int)
  parser.add_argument('--check', action='store_true')
  parser.add_argument('--out', type=pathlib.Path, default='runs/plan')
  return parser.parse_known_args(argv)


def _config(args: argparse.Namespace, rest: list[str]) -> Any:
  """Returns the card, or the paper's setting at the depth it recommends."""
  given = flags.FlagValues()
