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

LADDER = tuple(10 ** (k / 4) for k in range(28, 45))  # 10 Mbit to 100 Gbit
UNITS = {'': 1.0, 'kbit': 1e3, 'Mbit': 1e6, 'Gbit': 1e9, 'ms': 1e-3, 'us': 1e-6}
# Image shape and classes, so that no data need be there.
DATA = {
  'digits': ((8, 8, 1), 10),
  'cifar10': ((32, 32, 3), 10),
  'cifar100': ((32, 32, 3), 100),
  'imagenet2012': ((224, 224, 3), 1000),
}
NUMBER, POSITIVE = r'(\d+\.?\d*(?:e[+-]?\d\d?)?)', '(?=[0.]*[1-9])'
# Pattern, example, what makes the value, and the default.
FLAGS: dict[str, tuple[str, str, Callable[..., Any], Any]] = {
  'bandwidth': (
    f'{POSITIVE}{NUMBER}(|[kMG]bit)', '100Mbit or 1e9',
    lambda x, unit: float(x) * UNITS[unit], None,
  ),
  'latency': (
    f'{NUMBER}(ms|us)', '1ms', lambda x, unit: float(x) * UNITS[unit], '0.1ms'
  ),
  'flops': (POSITIVE + NUMBER, '1e12', float, None),
  'workers': (
    r'([1-9]\d*(?:,[1-9]\d*)*)', '2,4,8',
    lambda s: tuple(sorted({int(x) for x in s.split(',')})), None,
  ),
  'image': (
    r'([1-9]\d*)x([1-9]\d*)x([1-9]\d*)', '32x32x3',
    lambda *sides: tuple(map(int, sides)), None,
  ),
  'classes': (r'([1-9]\d*)', '100', int, None),
}  # fmt: skip
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
    config_lib.validate(config)
    network = config_lib.build_model(config, classes)
    params = jax.eval_shape(
      lambda: network.init(jax.random.key(0), jnp.zeros((1, *image)))
    )['params']
    chains = [chain_name(stage) for stage in config.partition]
    sizes = accounting.measure(params, chains)
    nothing: Any = None
    self.image = image
    self.setup = build.Setup(
      config, nothing, network, sizes.num_blocks, sizes, nothing
    )

  def protocol(self, name: str, num_workers: int) -> Protocol:
    """Returns a protocol; a masked psum where a hand-over is impossible."""
    protocol = dataclasses.replace(
      self.setup.protocol(name), num_workers=num_workers
    )
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
    S, T, chains = (
      protocol.num_workers,
      protocol.local_steps,
      protocol.num_blocks,
    )
    lengths = {name: protocol.slots_per_worker(name) for name in chains}
    flops = footprint.predicted_flops(self.setup.network, self.image, lengths)
    sizes = self.setup.sizes_for(protocol)
    sent = accounting.wire_bytes(sizes, protocol, S) / S
    times = T if protocol.average_gradients else 1 + protocol.carry_velocity
    messages = times * 2 * (S - 1)
    for name in chains if protocol.exchange == 'hand_over' else ():
      dealer = protocol.dealer(name)
      more = (
        max(blocks_sent(dealer)) - accounting.expected_messages(dealer, S) / S
      )
      block = wire.message_bytes(sizes.block[name], protocol.format.values)
      sent += times * more * block
      messages += times * (dealer.num_columns + 2 * len(dealer.borrowers))
    return Cost(T * self.setup.config.batch_size * flops, sent, messages)

  def predict(self, num_workers: int, machine: Machine) -> dict[str, Any]:
    """Predicts a round of every protocol.

    Args:
      num_workers: S.
      machine: Of each worker.

    Returns:
      JSON values: per protocol, what it costs, or `why_not`; and how many times
      as fast as the others ResIST is.
    """
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
    seconds = {name: found[name]['seconds']['round'] for name in NAMES}
    return found | {
      'speedup': {k: s / seconds['resist'] for k, s in seconds.items()}
    }


def paper_setting() -> Any:
  """Returns the paper's setting on CIFAR-100, at the depth it recommends."""
  config = config_lib.get_config()
  config.update({'data': {'name': 'cifar100'}, 'min_depth': 5})
  return config


def blocks_sent(dealer: Dealer) -> list[float]:
  """Returns how many blocks each worker sends in a hand-over, mean of deals.

  >>> blocks_sent(Dealer(3, 2))
  [0.5, 0.5]
  """
  sent = [0.0] * dealer.num_workers
  ways = [dealer.moves(j) for j in range(dealer.num_columns)]
  for g in range(len(dealer.borrowers)):
    lend = dealer.lendings(g)[1:]  # Nobody lends to itself.
    ways += [lend, [[(t, s) for s, t in route] for route in lend]]
  for routes in ways:
    for source, target in (pair for route in routes for pair in route):
      sent[source] += (source != target) / len(routes)
  return sent


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns what is predicted on one machine, for a terminal."""
  row_format = (
    '{:>4}{:>8}{:>13}{:>10}{:>10}{:>9}{:>11}{:>9}{:>9}{:>9}{:>9}{:>8}'
  )
  lines = [
    f'{"ResIST, seconds":>45}{"others, s":>20}{"times as fast":>18}'
    f'{"MB held":>17}',
    row_format.format(
      *('S', 'blocks', 'exchange', 'compute', 'exchange', 'round'),
      *('local SGD', 'data p.', 'l. SGD', 'data p.', 'ResIST', 'full'),
    ),
  ]
  why_not = []
  for row in rows:
    mine, (sgd, data) = row['resist'], (row[k] for k in NAMES[:2])
    others = [f'{x["seconds"]["round"]:.3g}' for x in (sgd, data)]
    full = f'{sum(sgd["memory"].values()) / 1e6:.3g}'
    if 'why_not' in mine:
      why_not.append(f'\nNo ResIST of {row["workers"]}: {mine["why_not"]}')
      cells = [*'-----', *others, *'---', full]
    else:
      cells = ['+'.join(map(str, mine['blocks'])), mine['exchange']]
      cells += [f'{x:.3g}' for x in mine['seconds'].values()] + others
      cells += [f'{row["speedup"][k]:.2f}' for k in NAMES[:2]]
      cells += [f'{sum(mine["memory"].values()) / 1e6:.3g}', full]
    lines.append(row_format.format(row['workers'], *cells))
  return '\n'.join(lines + why_not[:1])


def _draw(rows: Sequence[Mapping[str, Any]], bandwidth: float) -> Figure:
  """Draws ResIST's speed-up against the speed of links, for some S."""
  figure = Figure(figsize=(7, 4.4), layout='constrained')
  axes = figure.add_subplot()
  able = sorted({row['workers'] for row in rows if row['speedup']})
  shown = (
    [able[i * len(able) // 6] for i in range(6)] if len(able) > 6 else able
  )
  for S, colour in zip(shown, plots.colours(len(shown)), strict=True):
    mine = [row for row in rows if row['workers'] == S]
    whole = mine[0]['resist']['exchange'] == 'masked_psum'
    axes.plot(
      [row['bandwidth'] for row in mine],
      [row['speedup']['local_sgd'] for row in mine],
      color=colour,
      linestyle='--' if whole else '-',
      label=f'{S} workers' + (', masked psum' if whole else ''),
    )
  axes.axvline(bandwidth, color='#888888', linestyle=':', label='yours')
  axes.set(xscale='log', xlabel="speed of a worker's link (bit/s)")
  axes.set(ylabel='ResIST: times as fast as local SGD', ylim=(0, None))
  axes.xaxis.set_major_formatter(EngFormatter())
  axes.grid(color='#e4e4e4', linewidth=0.8)
  axes.spines[['top', 'right']].set_visible(False)
  figure.legend(loc='outside right upper', frameon=False)
  return figure


def _check(config: Any, workers: Sequence[int]) -> list[dict[str, Any]]:
  """Measures rounds, each worker on a virtual device, beside predictions."""
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
      cost = plan.cost(phase.protocol)
      if machine is None:
        machine = _measure(setup, cost)
      batches = setup.batches(0)

      def one_round(run=phase.run, deals=deals, setup=setup, batches=batches):
        nonlocal state
        state, _ = run(state, next(deals), setup.constants, batches, 0)
        return state.shared

      measured = _median_seconds(one_round, 5)
      predicted = cost.seconds(machine)
      rows.append(
        {
          'workers': S,
          'protocol': name,
          **machine._asdict(),
          'predicted': predicted,
          'measured': measured,
          'ratio': predicted['round'] / measured,
        }
      )
  return rows


def _measure(setup: build.Setup, cost: Cost) -> Machine:
  """Measures a step of local SGD, whose round costs this, and an all-reduce."""
  phase, state, _ = entry.enter(setup, None)
  run, index, T = phase.run.compiled, np.int32(0), setup.config.local_steps
  everywhere = jax.sharding.NamedSharding(setup.mesh, state_lib.SHARDED)
  batch = jax.device_put(setup.batches(0)[:, 0], everywhere)
  local = run['begin'](state.shared, state.chain, state.velocity)

  def steps():
    nonlocal local
    for _ in range(T):
      local = run['step'](local, {}, setup.constants, batch, index, index)
    return local

  shape = setup.config.num_workers, setup.sizes.total
  vectors = jax.device_put(np.ones(shape, np.float32), everywhere)
  specs = {'in_specs': state_lib.SHARDED, 'out_specs': state_lib.REPLICATED}
  add_up = jax.jit(
    jax.shard_map(lambda x: lax.psum(x, WORKER), mesh=setup.mesh, **specs)
  )
  reduce = _median_seconds(lambda: add_up(vectors), 9)
  flops = cost.flops / _median_seconds(steps, 3)
  return Machine(flops, 8 * cost.bytes / reduce, 0.0)


def _median_seconds(function: Callable[[], Any], times: int) -> float:
  found = []
  for _ in range(times + 1):  # The first is to warm up.
    began = time.perf_counter()
    jax.block_until_ready(function())
    found.append(time.perf_counter() - began)
  return statistics.median(found[1:])


def _reader(pattern: str, like: str, convert: Callable[..., Any]):
  """Returns what reads a flag's text."""

  def read(text: str) -> Any:
    found = re.fullmatch(pattern, text)
    if not found:
      raise argparse.ArgumentTypeError(f'{text!r} is not like {like}.')
    return convert(*found.groups())

  return read


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Any]:
  """Returns flags and config, which is the paper's setting without a card."""
  parser = argparse.ArgumentParser(
    'python -m experiments.plan', exit_on_error=False, allow_abbrev=False
  )
  parser.add_argument('--config', help='card; --config.FIELD=VALUE overrides')
  for name, (pattern, like, convert, default) in FLAGS.items():
    read = _reader(pattern, like, convert)
    parser.add_argument(f'--{name}', type=read, default=default, help=like)
  parser.add_argument('--check', action='store_true')
  parser.add_argument('--out', type=pathlib.Path, default='runs/plan')
  args, rest = parser.parse_known_args(argv)
  rest, given = ['plan', *rest], flags.FlagValues()
  where: dict[str, Any] = {'flag_values': given, 'sys_argv': rest}
  if args.config:
    rest.append(f'--config={args.config}')
    config_flags.DEFINE_config_file('config', **where)
  else:
    config = digits.get_config() if args.check else paper_setting()
    config_flags.DEFINE_config_dict('config', config, **where)
  try:
    more = given(rest)[1:]
    given.config.to_dict()  # A card that failed to load fails here.
  except Exception as error:  # A card is a program: it can raise anything.
    line = (str(error).strip() or repr(error)).splitlines()[-1]
    raise ValueError(line.replace('\\n', '. ')) from error
  if more:
    raise ValueError(f'unexpected argument {more[0]!r}.')
  return args, given.config


def _plan(args: argparse.Namespace, config: Any) -> Plan:
  name = re.split('[/:]', config.data.name)[0]
  image, classes = DATA.get(name, (None, None))
  image, classes = args.image or image, args.classes or classes
  if not image or not classes:
    raise ValueError(f'of {name} say --image=32x32x3 and --classes=10.')
  if not args.bandwidth or not args.flops:
    raise ValueError('--bandwidth=1Gbit and --flops=1e13 are needed.')
  return Plan(config, image, classes)


def main() -> None:
  """Predicts, or checks predictions."""
  try:
    args, config = _parse(sys.argv[1:])
    plan = None if args.check else _plan(args, config)
  except (argparse.ArgumentError, ValueError) as error:
    print('error:', ' '.join(str(error).split()), file=sys.stderr)
    sys.exit(2)
  args.out.mkdir(parents=True, exist_ok=True)
  record = {'command': ' '.join(['python -m experiments.plan', *sys.argv[1:]])}
  if plan is None:
    workers = args.workers or (2, 4)
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', max(workers))
    name, rows = 'check', _check(config, workers)
    for row in rows:
      print(
        f'{row["workers"]} workers, {row["protocol"]:13} predicted '
        f'{row["predicted"]["round"]:.3f} s, measured {row["measured"]:.3f} s, '
        f'ratio {row["ratio"]:.2f}'
      )
  else:
    workers = args.workers or tuple(2**k for k in range(1, 11))
    speeds = sorted({args.bandwidth, *LADDER})
    machines = [Machine(args.flops, b, args.latency) for b in speeds]
    name = 'plan'
    rows = [plan.predict(S, machine) for S in workers for machine in machines]
    print(__doc__[__doc__.index('The model') : __doc__.index('  python')])
    print(_table([row for row in rows if row['bandwidth'] == args.bandwidth]))
    picture = plots.render_png(_draw(rows, args.bandwidth))
    (args.out / 'plan.png').write_bytes(picture)
  record |= {'provenance': provenance(), 'rows': rows}
  path = args.out / f'{name}.json'
  path.write_text(json.dumps(record, indent=2) + '\n')
  print('written to', path)


if __name__ == '__main__':
  main()
