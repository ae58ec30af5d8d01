r"""Predicts how much faster ResIST trains on given machines and links.

The cost model is that of `experiments.costs`.

  python -m experiments.plan --bandwidth=1Gbit --flops=1e13  # paper's setting
  python -m experiments.plan --config=CARD --bandwidth=100Mbit --flops=1e12
  python -m experiments.plan --bandwidth=1Gbit --flops=1.58e14 \
    --memory_bandwidth=3352GB --config.model.dtype=bfloat16  # an H100
  python -m experiments.plan --check  # compare with seconds on this CPU
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
import pathlib
import re
import statistics
import sys
import time
from typing import Any

from absl import app, flags, logging
import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter
import numpy as np

from experiments import costs
from experiments.compile import chips
from experiments.costs import FORMULA, NAMES, Cost, Machine, Plan
from experiments.runs import provenance, write_record
from resist_jax import __main__ as cli
from resist_jax import folders, report
from resist_jax.errors import refused
from resist_jax.exchange import WORKER
from resist_jax.report import plots
from resist_jax.report.colours import PROTOCOLS, shades
from resist_jax.rounds import State
from resist_jax.rounds.mesh import REPLICATED, SHARDED
from resist_jax.run import config as config_lib
from resist_jax.run import restore
from resist_jax.run.command import Options
from resist_jax.run.phases import Phase
from resist_jax.run.setup import Setup, prepare

BANDWIDTH = flags.DEFINE_string(
  'bandwidth', None, 'Bandwidth of a link, such as 1Gbit.'
)
FLOPS = flags.DEFINE_string(
  'flops', None, 'Operations that a worker trains with per second: 1e13.'
)
LATENCY = flags.DEFINE_string(
  'latency', '0.1ms', 'Latency of a message, such as 0.1ms.'
)
WORKERS = flags.DEFINE_list('workers', None, 'Numbers of workers: 2,4,8.')
MEMORY_BANDWIDTH = flags.DEFINE_string(
  'memory_bandwidth', None, 'Between a device and its memory, such as 3352GB.'
)
CHIP = flags.DEFINE_enum(
  'chip',
  'h100',
  list(chips.CHIPS),
  'The chip whose compiler counts operations and memory.',
)
IMAGE = flags.DEFINE_string(
  'image', None, 'Height, width and channels of an image: 32x32x3.'
)
CLASSES = flags.DEFINE_integer(
  'classes', None, 'Number of classes.', lower_bound=1
)
CHECK = flags.DEFINE_boolean(
  'check', False, 'Compare predictions with seconds measured on this CPU.'
)
flags.DEFINE_alias('out', 'workdir')
# The default is the paper's setting, at the depth that it recommends.
PAPER = [f'--config={config_lib.__file__}']
PAPER += ['--config.data.name=cifar100', '--config.min_depth=5']
DIGITS = ['--config=digits']
LADDER = tuple(10 ** (k / 4) for k in range(28, 45))  # 10 Mbit to 100 Gbit
PURE = {'': 1.0}
BITS = {**PURE, 'kbit': 1e3, 'Mbit': 1e6, 'Gbit': 1e9}
BYTES = {**PURE, 'GB': 1e9}
SECONDS = {**PURE, 'ms': 1e-3, 'us': 1e-6}
DATA = {'digits': ('8x8x1', 10), 'cifar10': ('32x32x3', 10)}
DATA |= {'cifar100': ('32x32x3', 100), 'imagenet2012': ('224x224x3', 1000)}
HEAD = ['S', 'blocks', 'exchange', 'compute s', 'exchange s', 'round s']
HEAD += ['local SGD s', 'data par. s', 'x SGD', 'x data', 'MB', 'MB full']
HEAD += ['ResIST by', 'full by']
LEGEND = """
Seconds are those of a round. x: how many times faster ResIST is. MB: memory of
a worker with ResIST and with the full network. The last two columns say who
counted the operations, memory traffic and memory of a step of ResIST and of the
full network; formulas give no memory traffic. Bytes that workers send come from
formulas, which equal what compiled programs send."""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns predictions as text, with the reason for a row of dashes."""
  table, why_not = [HEAD], list[str]()
  for row in rows:
    *baselines, resist = (row[name] for name in NAMES)
    full = sum(baselines[0]['memory'].values()) / 1e6
    cells = [str(row['workers']), *['-'] * 10, f'{full:.3g}', '-']
    cells.append(_by(baselines[0]))
    cells[6:8] = [f'{x["seconds"]["round"]:.3g}' for x in baselines]
    if 'why_not' in resist:
      reason = resist['why_not']
      why_not.append(f'No ResIST with {row["workers"]} workers: {reason}')
    else:
      cells[1:3] = '+'.join(map(str, resist['blocks'])), resist['exchange']
      cells[3:6] = [f'{x:.3g}' for x in resist['seconds'].values()]
      cells[8:10] = [f'{row["speedup"][name]:.2f}' for name in NAMES[:2]]
      cells[10] = f'{sum(resist["memory"].values()) / 1e6:.3g}'
      cells[12] = _by(resist)
    table.append(cells)
  return '\n'.join([report.text_table(table, right_from=0), *why_not[:1]])


def _by(prediction: Mapping[str, Any]) -> str:
  """Returns who counted, in a word."""
  return 'formula' if prediction['source'] == FORMULA else 'compiler'


def _sources(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns what `compiler` means, in lines."""
  found = {row[name].get('source') for row in rows for name in NAMES}
  return [f'compiler: {source}' for source in sorted(found - {None, FORMULA})]


def _draw(rows: Sequence[Mapping[str, Any]], bandwidth: float) -> Figure:
  """Draws ResIST's speed-up by bandwidth, for a few numbers of workers."""
  figure = Figure(figsize=(11, 4.8), layout='constrained')
  axes, held = figure.subplots(1, 2)
  axes.set_xscale('log')
  able = sorted({row['workers'] for row in rows if row['speedup']})
  shown = [*able[:4], *able[4:][-1:]]  # More lines could not be told apart.
  for S, colour in zip(shown, shades(len(shown)), strict=True):
    line = [row for row in rows if row['workers'] == S]
    exchange = line[0]['resist']['exchange'].replace('_', ' ')
    axes.plot(
      [row['bandwidth'] for row in line],
      [row['speedup']['local_sgd'] for row in line],
      color=colour,
      linestyle='--' if exchange == 'masked psum' else '-',
      label=f'{S} workers, {exchange}',
    )
  axes.axvline(bandwidth, color='#888888', linestyle=':', label='your link')
  axes.axhline(1, color='#888888', linewidth=0.8)
  axes.set(xlabel="speed of a worker's link")
  axes.set(ylabel='ResIST, times as fast as local SGD')
  axes.xaxis.set_major_formatter(EngFormatter('bit/s'))
  plots.style_axes(axes)
  axes.legend(frameon=False, fontsize=8)
  _draw_memory(held, [row for row in rows if row['bandwidth'] == bandwidth])
  return figure


def _draw_memory(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
  """Draws a worker's memory by the number of workers, and who counted it."""
  for name, protocol in (('local SGD', 'local_sgd'), ('ResIST', 'resist')):
    line = [row for row in rows if 'memory' in row[protocol]]
    workers = [row['workers'] for row in line]
    sizes = [sum(row[protocol]['memory'].values()) for row in line]
    colour = PROTOCOLS[protocol][1]
    axes.plot(workers, sizes, color=colour, label=name)
    for row, size in zip(line, sizes, strict=True):
      counted = _by(row[protocol]) == 'compiler'
      fill = colour if counted else 'white'
      axes.plot(row['workers'], size, 'o', color=colour, markerfacecolor=fill)
  for fill, word in (('#888888', 'a compiler'), ('white', 'a formula')):
    axes.plot([], [], 'o', color='#888888', markerfacecolor=fill, label=word)
  axes.set(xlabel='workers', ylabel='memory of a worker')
  numbers = sorted({row['workers'] for row in rows})
  axes.set_xscale('log', base=2)
  axes.set_xlim(numbers[0] / 1.3, numbers[-1] * 1.3)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:.0f}'))
  axes.yaxis.set_major_formatter(EngFormatter('B'))
  axes.set_ylim(bottom=0)
  plots.style_axes(axes)
  axes.legend(frameon=False, fontsize=8)


def _check(config: Any, workers: Sequence[int]) -> list[dict[str, Any]]:
  """Measures rounds, a virtual device for each worker, and predicts them."""
  rows = []
  for S in workers:
    machine = None
    for name in NAMES:  # Local SGD comes first and calibrates the machine.
      setup = prepare(_alone(config, name, S))
      task: Any = setup.task
      plan = Plan(setup.config, task.image_shape, task.dataset.num_classes)
      phase, state = restore.start(setup, None)
      exchange = config.exchange if setup.chains else 'all_reduce'
      cost, batches = plan.cost(phase, exchange), setup.pipeline.batches(0)
      seconds = []
      for _ in range(6):
        began = time.perf_counter()
        state, _ = phase.trainer.round(state, batches)
        jax.block_until_ready(state.shared)
        seconds.append(time.perf_counter() - began)
      machine = machine or _measure(setup, phase, state, cost)
      predicted = cost.seconds(machine)
      measured = statistics.median(seconds[1:])  # The first round compiles.
      ratio = predicted['round'] / measured
      print(
        f'S={S} {name:13} predicted {predicted["round"]:.3f} s, measured '
        f'{measured:.3f} s, ratio {ratio:.2f}'
      )
      row = {
        'workers': S,
        'protocol': name,
        **machine._asdict(),
        'ratio': ratio,
      }
      rows.append(row | {'predicted': predicted, 'measured': measured})
  return rows


def _alone(config: Any, name: str, num_workers: int) -> Any:
  """Returns a config whose rounds are all those of one protocol."""
  made = config.copy_and_resolve_references()
  made.update(
    {'protocol': name, 'num_workers': num_workers, 'num_devices': num_workers}
  )
  made.phases.update({'full_before': 0, 'full_after': 0})
  if name != 'resist':  # What a protocol has no use for is refused.
    made.shared_every = 0
  if name == 'data_parallel':
    made.distillation.weight = made.faults.loss_factor = 0.0
    made.local_steps_alpha = 0.0
    if made.wire_format == 'int8':
      made.wire_format = 'float32'
  return made


def _measure(setup: Setup, phase: Phase, state: State, cost: Cost) -> Machine:
  """Times steps of local SGD and an all-reduce, all workers at once."""
  assert phase.trainer.programs is not None
  run, index = phase.trainer.programs.programs, np.int32(0)
  on_workers = jax.sharding.NamedSharding(setup.mesh, SHARDED)
  numbers: Any = setup.pipeline.batches(0)  # All examples of the round.
  batch = jax.device_put(numbers[:, 0], on_workers)
  local = run['begin'](state.shared, state.chain, state.carried, index)

  def steps():
    nonlocal local
    for _ in range(phase.protocol.local_steps):
      local = run['step'](local, {}, setup.constants, batch, index, index)
    return local

  vectors = np.ones((setup.config.num_workers, setup.sizes.total), np.float32)
  vectors = jax.device_put(vectors, on_workers)
  specs = {'in_specs': SHARDED, 'out_specs': REPLICATED}
  add_up = jax.jit(
    jax.shard_map(
      partial(jax.lax.psum, axis_name=WORKER), mesh=setup.mesh, **specs
    )
  )
  reduce = _median_seconds(lambda: add_up(vectors))
  flops = cost.flops / _median_seconds(steps)
  return Machine(flops, 8 * cost.bytes / reduce, latency=0.0)


def _median_seconds(function: Callable[[], Any]) -> float:
  found = []
  for _ in range(6):
    began = time.perf_counter()
    jax.block_until_ready(function())
    found.append(time.perf_counter() - began)
  return statistics.median(found[1:])


def _amount(
  flag: flags.FlagHolder,
  units: Mapping[str, float],
  like: str,
  least: float = 1.0,
) -> float:
  text = flag.value or ''
  found = re.fullmatch(r'(\d+\.?\d*(?:e[+-]?\d\d?)?)([A-Za-z]*)', text)
  value = -1.0
  if found and found[2] in units:
    value = float(found[1]) * units[found[2]]
  if value < least:
    raise ValueError(f'--{flag.name} is {text!r}; write it like {like}.')
  return value


def _plan(config: Any) -> Plan:
  name = re.split('[/:]', config.data.name)[0]
  shape, classes = DATA.get(name, ('?', 0))
  shape, classes = IMAGE.value or shape, CLASSES.value or classes
  if not re.fullmatch(r'([1-9]\d*x){2}[1-9]\d*', shape) or not classes:
    raise ValueError(f'{name} needs --image, such as 32x32x3, and --classes.')
  image = tuple(map(int, shape.split('x')))
  return Plan(config, image, classes, CHIP.value)


def _predict(plan: Plan, workers: Sequence[int], bandwidth: float) -> list:
  """Prints predictions for a bandwidth; returns those of other ones, too."""
  flops = _amount(FLOPS, PURE, '1e13')
  latency = _amount(LATENCY, SECONDS, '1ms', 0.0)
  memory = None
  if MEMORY_BANDWIDTH.value is not None:
    memory = _amount(MEMORY_BANDWIDTH, BYTES, '3352GB')
  links = sorted({bandwidth, *LADDER})
  machines = [Machine(flops, link, latency, memory) for link in links]
  rows = [plan.predict(S, machine) for S in workers for machine in machines]
  print((costs.__doc__ or '').split('\n\n', 1)[1])
  print(_table([row for row in rows if row['bandwidth'] == bandwidth]))
  print(LEGEND, *_sources(rows), sep='\n')
  return rows


def main(given: list[str], options: Options) -> None:
  """Prints and writes predictions, or their comparison with measurements."""
  logging.set_verbosity(logging.WARNING)  # JAX tells which platforms it tried.
  out, config = pathlib.Path(options.workdir), options.config
  default = [2, 4] if CHECK.value else [2**k for k in range(1, 11)]
  try:
    folders.check_writable(out, '--out')
    workers = [int(S) for S in WORKERS.value or default]
    if min(workers) < 1:
      raise ValueError('--workers must be at least 1.')
    if CHECK.value:
      jax.config.update('jax_num_cpu_devices', max(workers))
      rows, picture = _check(config, workers), None
    else:
      bandwidth = _amount(BANDWIDTH, BITS, '100Mbit or 1e9')
      rows = _predict(_plan(config), workers, bandwidth)
      picture = plots.render_png(_draw(rows, bandwidth))
  except ValueError as error:
    sys.exit(refused(error))
  command = ' '.join(['python -m experiments.plan', *given])
  record = {'command': command, 'provenance': provenance(), 'rows': rows}
  path = out / ('plan.json' if picture else 'check.json')
  write_record(path, record)
  if picture:
    (out / 'plan.png').write_bytes(picture)
  print('written to', path)


if __name__ == '__main__':
  words = sys.argv[1:]
  if not any(re.match('--?config(=|$)', word) for word in words):
    checks = any(re.match('--?check(=|$)', word) for word in words)
    sys.argv[1:1] = DIGITS if checks else PAPER
  sys.argv.insert(1, '--workdir=runs/plan')
  app.run(partial(main, words), flags_parser=partial(cli.parse, answers=False))
