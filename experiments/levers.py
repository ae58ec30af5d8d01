"""What each lever that the paper does not have changes, ResIST and local SGD.

  python -m experiments.levers --scale=cpu90 --seeds=2 --data_dir=FOLDER --busy

Each run adds levers to the recipe of the scale `cpu90` on CIFAR-10, which is
shortened to some ten minutes of two cores for ResIST: a quarter of the epochs,
half of the channels, without the whitened stem and the rate of biases. These
are levers here. Local SGD gets every lever that means something to it.
"Gain" is the mean difference from the run of the same seed without a lever.
Bytes are what all workers would send if each had a device of its own.

Results and a table are written to experiments/results/levers/SCALE/.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import costs
from experiments.experiment import (
  Cell,
  Experiment,
  Record,
  Results,
  main,
  of_runs,
  spread,
)
from experiments.table import Table
from experiments.table2 import NAMES

WORKERS = (4, 8)
PROTOCOLS = ('resist', 'local_sgd')
# A quarter of the epochs of cpu90, in a network of half the width, without the
# two parts of its recipe that are levers here.
SHORT = {
  'model.stem': 'strided',
  'optimizer.bias_rate': 1.0,
  'model.widths': (32, 64, 128),
  'num_rounds': 24,
  'optimizer.warmup_rounds': 4,
  'eval_every': 4,
  'checkpoint_every': 2,
}


class Lever(NamedTuple):
  """One thing that runs change.

  Attributes:
    title: For readers.
    fields: Returns the fields that it sets, for the config without it.
    alone: Whether it means nothing to local SGD.
  """

  title: str
  fields: Callable[[ConfigDict], Mapping[str, Any]]
  alone: bool = False


def _set(**fields: Any) -> Callable[[ConfigDict], Mapping[str, Any]]:
  named = {name.replace('__', '.'): value for name, value in fields.items()}
  return lambda config: named


def _outer(momentum: float) -> Callable[[ConfigDict], Mapping[str, Any]]:
  return _set(outer__lr=1.0, outer__momentum=momentum, outer__nesterov=True)


def _all(
  *several: Callable[[ConfigDict], Mapping[str, Any]],
) -> Callable[[ConfigDict], Mapping[str, Any]]:
  """Returns what several levers set, none of them the same field."""
  return lambda config: {
    name: value for one in several for name, value in one(config).items()
  }


def _finish(config: ConfigDict) -> Mapping[str, Any]:
  return {'phases.full_after': max(1, config.num_rounds * 15 // 100)}


def _growing(config: ConfigDict) -> Mapping[str, Any]:
  """Rounds are twice as long from half of the largest rate on."""
  return {'local_steps_alpha': config.lr / 2 * (2 * config.local_steps) ** 0.5}


def _times(factor: float) -> Callable[[ConfigDict], Mapping[str, Any]]:
  """Rounds have so many times as many steps, and there are fewer of them."""

  def fields(config: ConfigDict) -> Mapping[str, Any]:
    steps = max(1, int(config.local_steps * factor))
    share = config.local_steps / steps
    return {
      'local_steps': steps,
      'num_rounds': max(1, round(config.num_rounds * share)),
      'eval_every': max(1, round(config.eval_every * share)),
      'optimizer.warmup_rounds': round(config.optimizer.warmup_rounds * share),
    }

  return fields


def _sharing(config: ConfigDict) -> Mapping[str, Any]:
  return {'shared_every': max(1, config.local_steps // 2)}


def _deeper(config: ConfigDict) -> Mapping[str, Any]:
  return {'min_depth': config.min_depth + 1}


def _longer(config: ConfigDict) -> Mapping[str, Any]:
  """There are more rounds, each with as many steps."""
  return {
    'num_rounds': config.num_rounds * 5 // 2,
    'eval_every': config.eval_every * 5 // 2,
    'optimizer.warmup_rounds': config.optimizer.warmup_rounds * 5 // 2,
  }


LEVERS = {
  'none': Lever('none', _set()),
  'finish': Lever('local SGD at the end', _finish, alone=True),
  'finish_parallel': Lever(
    'data parallel at the end',
    _all(_finish, _set(phases__protocol='data_parallel')),
  ),
  'outer05': Lever('outer momentum 0.5', _outer(0.5)),
  'outer08': Lever('outer momentum 0.8', _outer(0.8)),
  'carry': Lever('momentum carried', _set(optimizer__carry_momentum=True)),
  'outer05_carry': Lever(
    'outer momentum 0.5, momentum carried',
    _all(_outer(0.5), _set(optimizer__carry_momentum=True)),
  ),
  'outer05_deeper': Lever(
    'outer momentum 0.5, a block more',
    _all(_outer(0.5), _deeper),
    alone=True,
  ),
  'bias': Lever('bias rate 64', _set(optimizer__bias_rate=64.0)),
  'whitened': Lever('whitened stem', _set(model__stem='whitened')),
  'fast': Lever(
    'outer momentum 0.5, bias rate 64, whitened stem',
    _all(_outer(0.5), _set(optimizer__bias_rate=64.0, model__stem='whitened')),
  ),
  'longer': Lever('2.5 times the rounds', _longer, alone=True),
  'outer05_longer': Lever(
    'outer momentum 0.5, 2.5 times the rounds',
    _all(_outer(0.5), _longer),
    alone=True,
  ),
  'training': Lever(
    'scaled in training', _set(residual_scale='training'), alone=True
  ),
  'gates': Lever('gates', _set(model__gates=True)),
  'gates_zero': Lever(
    'gates that begin at zero', _set(model__gates=True, model__gate_start=0.0)
  ),
  'init': Lever('initial values of He et al.', _set(model__init='he')),
  'average': Lever('average, decay 0.8', _set(average__decay=0.8)),
  'growing': Lever('rounds grow as the rate falls', _growing),
  'half': Lever('half the steps in a round', _times(0.5)),
  'double': Lever('twice the steps in a round', _times(2)),
  'distillation': Lever(
    'distillation, weight 0.5', _set(distillation__weight=0.5)
  ),
  'sharing': Lever('shared part twice a round', _sharing, alone=True),
  'deeper': Lever('a block more for each worker', _deeper, alone=True),
  'spread': Lever('spread over the chain', _set(dealing='spread'), alone=True),
}


def cell(lever: str, protocol: str, workers: int, scale: str) -> Cell:
  """Returns what is trained.

  Args:
    lever: A key of `LEVERS`.
    protocol: One of `PROTOCOLS`.
    workers: 4 or 8.
    scale: `cpu90` or `smoke`.

  Returns:
    The cell.
  """
  short = SHORT if scale == 'cpu90' else {}
  base = {'protocol': protocol, 'model.init': 'torch', **short}
  argument = f's{workers}'
  config = Cell('', 'cifar10', argument, base).config(scale)
  fields = {**base, **LEVERS[lever].fields(config)}
  return Cell(f's{workers}_{protocol}_{lever}', 'cifar10', argument, fields)


def applies(lever: str, protocol: str) -> bool:
  """Returns whether a lever means something to a protocol."""
  return protocol == 'resist' or not LEVERS[lever].alone


def cells(scale: str) -> list[Cell]:
  """Returns the cells to train, those of four workers first."""
  return [
    cell(lever, protocol, workers, scale)
    for workers in WORKERS
    for protocol in PROTOCOLS
    for lever in LEVERS
    if applies(lever, protocol)
  ]


def gains(with_it: Sequence[Record], without: Sequence[Record]) -> list[float]:
  """Returns differences in accuracy, in points, of runs of the same seed.

  Args:
    with_it: Results with a lever.
    without: Results without it.
  """
  base = {_seed(record): _accuracy(record) for record in without}
  return [
    100 * (_accuracy(record) - base[_seed(record)])
    for record in with_it
    if _seed(record) in base
  ]


def _seed(record: Record) -> int:
  return record['summary']['seed']


def _accuracy(record: Record) -> float:
  return record['summary']['test_accuracy']


def tables(results: Results) -> list[Table]:
  """Shows accuracies with each lever, gains, and bytes."""
  rows, found = [], []
  for workers in WORKERS:
    for lever, (title, *_) in LEVERS.items():
      row = [str(workers), title]
      for protocol in PROTOCOLS:
        records = _records(results, lever, protocol, workers)
        found += records
        row += _columns(records, _records(results, 'none', protocol, workers))
      if any(row[2:]):
        rows.append(row)
  if not rows:
    return []
  recipe = f'{results.scale} scale'
  if results.scale == 'cpu90':
    recipe += (
      ', a quarter of its epochs and half of its channels, without the '
      'whitened stem and the rate of biases'
    )
  caption = (
    'Deployed test accuracy in % on CIFAR-10 after the last round, '
    f'{recipe}. Each row adds levers to the recipe. "Gain" is the mean '
    'difference, in points, from the run of the same seed without a lever. '
    '"GB" is what all workers would send if each had a device of its own. '
    f'{of_runs(found)}'
  )
  head = ['workers', 'lever']
  for protocol in PROTOCOLS:
    head += [NAMES[protocol], 'gain', 'GB']
  command = EXPERIMENT.made_by(results.scale, found)
  return [Table(caption, command, head, rows)]


def _records(results, lever, protocol, workers) -> list[Record]:
  if not applies(lever, protocol):
    return []
  return results.of(cell(lever, protocol, workers, results.scale))


def _columns(records: Sequence[Record], without: Sequence[Record]) -> list[str]:
  """Returns the accuracy, the gain and the GB of a lever."""
  if not records:
    return ['', '', '']
  gained = [] if records == without else gains(records, without)
  return [
    spread([100 * _accuracy(record) for record in records]),
    spread(gained, '+.1f'),
    f'{costs.sent(records[0]) / 1e9:.2f}',
  ]


EXPERIMENT = Experiment(
  'levers',
  'Levers that the paper does not have',
  cells,
  tables,
  scales=('smoke', 'cpu90'),
)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
