"""Seconds and bytes to 80, 85, 88 and 90 % on CIFAR, on two cores.

  python -m experiments.to_accuracy --scale=cpu90 --data_dir=FOLDER --busy \
    --only=cifar10_resist_plus_s4

Trains at the scale `cpu90`, whose network and recipe reach an accuracy that
people know: ResIST, local SGD and data parallel for as many steps. Because a
round of local SGD computes and sends more than twice as much as one of ResIST,
ResIST is also trained for twice as many rounds, local SGD for half of them, and
data parallel for half and a quarter of them, each with a schedule that ends
with the run. The outer momentum is that of the card `resist_plus`. A run takes
hours and may share the machine: kill it and give the same command again, and it
goes on from its last checkpoint.

Seconds are those of training alone, without compilation, tests and checkpoints.
A machine may do other work meanwhile (`--busy`), and runs may be trained on
several machines. So seconds are the steps of a run times the seconds of a step
on one machine that did nothing else. Short runs measure it, those named `pace`:

  python -m experiments.to_accuracy --scale=cpu90 --data_dir=FOLDER --only=pace

A second table predicts the seconds of workers that have a machine and a link
each, by the model of `experiments.costs`.

Results and learning curves are written to
experiments/results/to_accuracy/SCALE/.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import statistics
from typing import Any, NamedTuple, Self

from experiments import costs, pictures
from experiments.costs import Machine, Plan
from experiments.experiment import (
  Cell,
  Drawn,
  Experiment,
  Record,
  Results,
  main,
  of_runs,
  quiet,
)
from experiments.runs import conditions, first_test
from experiments.table import Table
from experiments.table2 import DATA, NAMES, WORKERS

# What each run changes in the recipe of the scale, and its part of a file name.
PLAIN, LEVERS = '', ', outer momentum'
LESS = ', without whitened stem and without the higher rate of biases'
HALF, QUARTER = ', half the rounds', ', a quarter of the rounds'
LEVERS_HALF = ', outer momentum, half the rounds'
TWICE = ', outer momentum, twice the rounds'
RECIPES = {
  PLAIN: '',
  LESS: '_less',
  HALF: '_half',
  QUARTER: '_quarter',
  LEVERS: '_plus',
  LEVERS_HALF: '_plus_half',
  TWICE: '_plus_twice',
}
# As many rounds, also those that warm up.
TIMES = {HALF: 0.5, LEVERS_HALF: 0.5, QUARTER: 0.25, TWICE: 2}
TARGETS = (0.80, 0.85, 0.88, 0.90)
TO_TARGETS = [f'to {100 * target:.0f} %' for target in TARGETS]  # Columns.
IN_ALL = 'in all'
HEAD = ['data', 'protocol', 'workers']
LINKS = {'100 Mbit/s': 1e8, '1 Gbit/s': 1e9}
LATENCY = 1e-4  # Seconds.
PACE_ROUNDS, PACE_STEPS = 4, 4  # The first round also warms up the caches.


def cell(
  data: str,
  protocol: str,
  workers: int,
  recipe: str = PLAIN,
  scale: str = 'cpu90',
) -> Cell:
  """Returns what is trained.

  Args:
    data: A card, `cifar10` or `cifar100`.
    protocol: See `config.protocol`.
    workers: 2, 4 or 8.
    recipe: A key of `RECIPES`.
    scale: `cpu90` or `smoke`, the scale whose rounds `TIMES` multiplies.
  """
  name = f'{data}_{protocol}{RECIPES[recipe]}_s{workers}'
  fields: dict[str, Any] = {'protocol': protocol}
  if recipe == LESS:
    fields |= {'model.stem': 'strided', 'optimizer.bias_rate': 1.0}
  made = Cell(name, data, f's{workers}', fields)
  if recipe in (LEVERS, LEVERS_HALF, TWICE):
    made = Cell(name, 'resist_plus', f's{workers},{data}', fields)
  if recipe not in TIMES:
    return made
  config, times = made.config(scale), TIMES[recipe]
  rounds = {
    'num_rounds': max(1, int(times * config.num_rounds)),
    'optimizer.warmup_rounds': int(times * config.optimizer.warmup_rounds),
  }
  if recipe == QUARTER:
    rounds['eval_every'] = max(1, rounds['num_rounds'] // 4)
  return dataclasses.replace(made, overrides={**fields, **rounds})


def pace(protocol: str, workers: int, recipe: str = PLAIN) -> Cell:
  """Returns a few short rounds of CIFAR-10; see `cell`.

  Both sets have images of the same size, and their steps take as long.
  Steps with levers are not timed by themselves, but as those without.

  Args:
    protocol: See `cell`.
    workers: See `cell`.
    recipe: See `cell`.
  """
  made = cell('cifar10', protocol, workers, LESS if recipe == LESS else PLAIN)
  few = {'num_rounds': PACE_ROUNDS, 'eval_every': PACE_ROUNDS}
  few['local_steps'] = PACE_STEPS
  return dataclasses.replace(
    made,
    name=made.name.replace('cifar10', 'pace'),
    overrides={**made.overrides, **few},
    timed=True,
  )


def cells(scale: str) -> list[Cell]:
  """Returns the cells to train, in order."""
  pairs = [(name, 4) for name in NAMES]
  pairs += itertools.product(('resist', 'local_sgd'), (2, 8))
  others = [('resist', recipe) for recipe in (LESS, LEVERS, TWICE)]
  others += [('local_sgd', recipe) for recipe in (HALF, LEVERS, LEVERS_HALF)]
  others += [('data_parallel', recipe) for recipe in (HALF, QUARTER)]
  return [
    *(cell('cifar10', *pair) for pair in pairs),
    *(cell('cifar10', name, 4, recipe, scale) for name, recipe in others),
    *(pace(*pair) for pair in pairs),
    pace('resist', 4, LESS),
    *(cell('cifar100', *pair) for pair in pairs),
    *(cell('cifar100', name, 4, LEVERS) for name in ('resist', 'local_sgd')),
  ]


def seconds_of_a_step(record: Record) -> float:
  """Returns the median over rounds of their seconds for each local step.

  Args:
    record: Result of a run. Its first round is left out.

  >>> rows = [{'seconds_training': s} for s in (9.0, 11.0, 13.5, 15.5)]
  >>> seconds_of_a_step({'curve': rows, 'config': {'local_steps': 4}})
  0.5
  """
  ends = [row['seconds_training'] for row in record['curve']]
  rounds = [end - begin for begin, end in itertools.pairwise(ends)]
  return statistics.median(rounds) / record['config']['local_steps']


def sent_until(record: Record, end: Record) -> float:
  """Returns the bytes that workers with a device each send up to a round.

  Args:
    record: Result of a run.
    end: The row of the round, see `first_test`.

  Returns:
    Bytes, predicted where the run had fewer devices, or may have had.
  """
  summary = record['summary']
  # A run that was moved may have begun with fewer devices.
  moved = 'begun' in record['provenance']
  if summary['num_devices'] == summary['num_workers'] and not moved:
    return end['wire_bytes_total']
  rows = [row for row in record['curve'] if row['round'] <= end['round']]
  return costs.sent({**record, 'curve': rows})


class Trained(NamedTuple):
  """A cell and what its runs found.

  Attributes:
    cell: The cell.
    records: Its results, one for each seed.
    seconds: For each machine, the seconds of a round of all workers there while
      it did nothing else; empty if nobody measured them.
  """

  cell: Cell
  records: Sequence[Record]
  seconds: Mapping[str, float]

  @classmethod
  def find(
    cls, results: Results, data: str, protocol: str, workers: int, recipe: str
  ) -> Self:
    """Reads the results of a cell.

    Args:
      results: Where they are.
      data: See `cell`.
      protocol: See `cell`.
      workers: See `cell`.
      recipe: See `cell`.
    """
    made = cell(data, protocol, workers, recipe)
    records = results.of(made)
    steps: dict[str, list[float]] = {}
    for timed in quiet(results.of(pace(protocol, workers, recipe))):
      if timed['curve'][1:]:  # A single round is that which warms up.
        where = conditions(timed['provenance'])
        steps.setdefault(where, []).append(seconds_of_a_step(timed))
    seconds = {
      where: statistics.median(values) * records[0]['config']['local_steps']
      for where, values in steps.items()
      if records
    }
    return cls(made, records, seconds)

  def to_targets(self, where: str) -> list[str]:
    """Returns mean seconds on a machine, and GB, to each of `TARGETS`.

    Args:
      where: The machine, a key of `seconds`; without it, there are only GB.
    """
    return [self._to(target, self.seconds.get(where)) for target in TARGETS]

  def in_all(self, where: str) -> str:
    """Returns mean seconds on a machine, and GB, of the whole run.

    Args:
      where: See `to_targets`.
    """
    ends = [(record, record['curve'][-1]) for record in self.records]
    return ', '.join(self._cost(ends, self.seconds.get(where), True))

  def on_links(self, scale: str, where: str, bandwidth: float) -> list[str]:
    """Predicts mean seconds to each of `TARGETS`, with a machine each.

    A machine needs S times as long for S workers as for one, so only the
    exchange remains to be predicted.

    Args:
      scale: Scale of the results.
      where: The machine, a key of `seconds`.
      bandwidth: Bits per second of the link of a machine.
    """
    config, summary = self.cell.config(scale), self.records[0]['summary']
    S = config.num_workers
    plan = Plan(config, summary['image_shape'], len(summary['class_names']))
    cost = plan.cost(*plan.traffic(config.protocol, S))
    speed = cost.flops / (self.seconds[where] / S)
    seconds = cost.seconds(Machine(speed, bandwidth, LATENCY))['round']
    return [self._to(target, seconds, sent=False) for target in TARGETS]

  def _to(self, target: float, seconds: float | None, sent: bool = True) -> str:
    """Returns means of the runs that reach a target, with bytes if `sent`."""
    ends = [(r, first_test(r['curve'], target)) for r in self.records]
    found = [(record, row) for record, row in ends if row]
    if not found:
      return 'not reached'
    parts = self._cost(found, seconds, sent)
    if len(found) < len(self.records):
      parts.append(f'({len(found)} of {len(self.records)} runs)')
    return ', '.join(parts)

  @staticmethod
  def _cost(
    ends: Sequence[tuple[Record, Record]], seconds: float | None, sent: bool
  ) -> list[str]:
    """Returns the mean seconds and GB of runs up to a round of each."""
    parts = []
    if seconds:
      rounds = statistics.mean(row['round'] for _, row in ends)
      parts.append(f'{seconds * rounds:.0f} s')
    if sent:
      mean = statistics.mean(sent_until(*pair) for pair in ends)
      parts.append(f'{mean / 1e9:.2f} GB')
    return parts


Found = Sequence[tuple[list[str], Trained]]  # Each with its first columns.


def find_all(results: Results) -> Found:
  """Reads the results of all cells that have some.

  Args:
    results: Where they are.
  """
  found = []
  for (data, title), workers, (protocol, name), recipe in itertools.product(
    DATA.items(), WORKERS, NAMES.items(), RECIPES
  ):
    trained = Trained.find(results, data, protocol, workers, recipe)
    if trained.records:
      found.append(([title, name + recipe, str(workers)], trained))
  return found


def timed_on(found: Found) -> str:
  """Returns the machine that most of the cells were timed on.

  The seconds of two machines are not compared.

  Args:
    found: See `find_all`.

  Returns:
    The machine, empty if none was timed.
  """
  count = collections.Counter(
    where for _, trained in found for where in trained.seconds
  )
  return max(count, key=lambda where: (count[where], where), default='')


def tables(results: Results) -> list[Table]:
  """Returns what it took to reach each target here, and elsewhere."""
  found = find_all(results)
  where = timed_on(found)
  made = [
    _measured(results, where, found),
    _predicted(results.scale, where, found),
  ]
  return [table for table in made if table.rows]


def on_a_quiet(where: str) -> str:
  """Returns a sentence for readers of seconds; see `Trained.to_targets`."""
  if not where:
    return ''
  return (
    ' Seconds are the rounds of a run times the seconds of a round in short '
    f'runs on {where}, which did nothing else. The short runs have no outer '
    'momentum, so the time that it takes is left out.'
  )


def how_often(records: Sequence[Record]) -> str:
  """Returns a sentence on how far apart the tests of runs are."""
  every = sorted({record['config']['eval_every'] for record in records})
  if not every:
    return ''
  apart = ' or '.join(map(str, every))
  return (
    f' Tests are {apart} rounds apart, so an accuracy may have been reached up '
    'to so many rounds earlier.'
  )


def _records(found: Found) -> list[Record]:
  return [record for _, trained in found for record in trained.records]


def _measured(results: Results, where: str, found: Found) -> Table:
  rows = [
    [*first, results.percent(trained.cell)]
    + [results.percent(trained.cell, 'test_accuracy_paper')]
    + [*trained.to_targets(where), trained.in_all(where)]
    for first, trained in found
  ]
  records = _records(found)
  caption = (
    'Seconds of training, and GB that all workers sent, until the first test '
    f'that reaches an accuracy, {results.scale} scale. "Deployed" and '
    '"test-batch statistics" are the test accuracies after the last round, in '
    '%; "in all" is what the whole run took. All workers share one machine, '
    'and no link lies between them. '
    f'{of_runs(records, "Mean")}{on_a_quiet(where)}{how_often(records)}'
  )
  head = [*HEAD, 'deployed', 'test-batch statistics', *TO_TARGETS, IN_ALL]
  command = EXPERIMENT.made_by(results.scale, records)
  return Table(caption, command, head, rows)


def _predicted(scale: str, where: str, found: Found) -> Table:
  rows = [
    [*first, link, *trained.on_links(scale, where, bandwidth)]
    for first, trained in found
    for link, bandwidth in LINKS.items()
    if where in trained.seconds
  ]
  caption = (
    f'The same runs, {scale} scale, if each worker had such a machine and a '
    'link of its own: predicted seconds of training until the first test that '
    'reaches an accuracy. Computing takes the seconds above divided by the '
    'number of workers. The exchange takes the bytes that the busiest worker '
    f'sends, and {1000 * LATENCY:.1f} ms for each message.'
  )
  command = EXPERIMENT.made_by(scale, _records(found))
  return Table(caption, command, [*HEAD, 'link', *TO_TARGETS], rows)


def figures(results: Results) -> Mapping[str, Drawn]:
  """Draws learning curves by bytes, for each data set."""
  return {
    data: pictures.curves(
      {
        f'{title}, {workers} workers': {
          name + recipe: results.of(cell(data, protocol, workers, recipe))
          for protocol, name in NAMES.items()
          for recipe in RECIPES
        }
        for workers in WORKERS
      },
      'wire_bytes_total',
    )
    for data, title in DATA.items()
  }


EXPERIMENT = Experiment(
  'to_accuracy',
  'Seconds and bytes to an accuracy',
  cells,
  tables,
  figures,
  scales=('smoke', 'cpu90'),
)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
