"""Seconds and bytes to 80, 85, 88 and 90 % on CIFAR, on two cores.

  python -m experiments.to_accuracy --scale=cpu90 --data_dir=FOLDER --busy \
    --only=cifar10_resist_s4

Trains at the scale `cpu90`, whose network and recipe reach an accuracy that
people know: ResIST, local SGD and data parallel for as many steps, and ResIST
for twice as many. "Levers" are those of the card `resist_plus`. A run takes
hours and may share the machine: kill it and give the same command again, and it
goes on from its last checkpoint.

Seconds are those of training alone, without compilation, tests and checkpoints.
Where a machine did other work (`--busy`), they are the rounds of the run times
the seconds of a round that another run took, the one named `pace`, when the
machine did nothing else:

  python -m experiments.to_accuracy --scale=cpu90 --data_dir=FOLDER --only=pace

Results and learning curves are written to
experiments/results/to_accuracy/SCALE/.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import statistics
from typing import Any

from experiments import pictures
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
from experiments.table import Table
from experiments.table2 import DATA, NAMES, WORKERS

# What each run changes in the recipe of the scale, and its part of a file name.
PLAIN, LEVERS, TWICE = '', ', levers', ', levers, twice the rounds'
LESS = ', without whitened stem and rate of biases'
RECIPES = {PLAIN: '', LESS: '_less', LEVERS: '_plus', TWICE: '_plus_twice'}
TARGETS = (0.80, 0.85, 0.88, 0.90)
TO_TARGETS = [f'to {100 * target:.0f} %' for target in TARGETS]  # Columns.
PACE_ROUNDS = 4  # The first of them also warms up the caches.


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
    scale: Whose rounds `TWICE` doubles, `cpu90` or `smoke`.
  """
  name = f'{data}_{protocol}{RECIPES[recipe]}_s{workers}'
  fields: dict[str, Any] = {'protocol': protocol}
  if recipe == LESS:
    fields |= {'model.stem': 'strided', 'optimizer.bias_rate': 1.0}
  if recipe in (PLAIN, LESS):
    return Cell(name, data, f's{workers}', fields)
  plus = Cell(name, 'resist_plus', f's{workers},{data}', fields)
  if recipe == LEVERS:
    return plus
  config = plus.config(scale)
  longer = {
    'num_rounds': 2 * config.num_rounds,
    'optimizer.warmup_rounds': 2 * config.optimizer.warmup_rounds,
  }
  return dataclasses.replace(plus, overrides={**fields, **longer})


def pace(protocol: str, workers: int, recipe: str = PLAIN) -> Cell:
  """Returns the first rounds of CIFAR-10 alone; see `cell`.

  Both sets have images of the same size, and their rounds take as long.
  Rounds with levers are not timed by themselves, but as those without.

  Args:
    protocol: See `cell`.
    workers: See `cell`.
    recipe: See `cell`.
  """
  made = cell('cifar10', protocol, workers, LESS if recipe == LESS else PLAIN)
  few = {'num_rounds': PACE_ROUNDS, 'eval_every': PACE_ROUNDS}
  return dataclasses.replace(
    made,
    name=made.name.replace('cifar10', 'pace'),
    overrides={**made.overrides, **few},
  )


def cells(scale: str) -> list[Cell]:
  """Returns the cells to train, in order."""
  pairs = [(name, 4) for name in NAMES]
  pairs += itertools.product(('resist', 'local_sgd'), (2, 8))
  others = [('resist', recipe) for recipe in RECIPES if recipe != PLAIN]
  others.append(('local_sgd', LEVERS))
  return [
    *(cell('cifar10', *pair) for pair in pairs),
    *(cell('cifar10', name, 4, recipe, scale) for name, recipe in others),
    *(pace(*pair) for pair in pairs),
    pace('resist', 4, LESS),
    *(cell('cifar100', *pair) for pair in pairs),
  ]


def seconds_of_a_round(record: Record) -> float:
  """Returns the median seconds of a round, the first one left out.

  Args:
    record: Result of a run.

  >>> rows = [{'seconds_training': s} for s in (9.0, 11.0, 13.5, 15.5)]
  >>> seconds_of_a_round({'curve': rows})
  2.0
  """
  ends = [row['seconds_training'] for row in record['curve']]
  return statistics.median(b - a for a, b in itertools.pairwise(ends))


def round_at(record: Record, accuracy: float) -> Record | None:
  """Returns the row of the first test that reaches an accuracy.

  Args:
    record: Result of a run.
    accuracy: Test accuracy with fixed statistics, from 0 to 1.

  Returns:
    The row, or None if no test reaches it.
  """
  rows = record['curve']
  found = (r for r in rows if r.get('test_accuracy', -1) >= accuracy)
  return next(found, None)


def tables(results: Results) -> list[Table]:
  """Returns accuracies, and what it took to reach each target."""
  rows, found = [], []
  for (data, title), workers, (protocol, name), recipe in itertools.product(
    DATA.items(), WORKERS, NAMES.items(), RECIPES
  ):
    which = protocol, workers, recipe
    run = cell(data, *which)
    records = results.of(run)
    if records:
      found += records
      rows.append(
        [title, name + recipe, str(workers), results.percent(run)]
        + [results.percent(run, 'test_accuracy_paper')]
        + to_targets(results, data, *which)
      )
  if not rows:
    return []
  caption = (
    'Seconds of training, and GB that all workers sent, until the first test '
    f'that reaches an accuracy, {results.scale} scale. "Deployed" and '
    '"test-batch statistics" are the test accuracies after the last round, in '
    '%. All workers share one machine, and no link lies between them; seconds '
    'are rounds times the seconds of a round on that machine when it did '
    f'nothing else. {of_runs(found, "Mean")}'
  )
  head = ['data', 'protocol', 'workers', 'deployed', 'test-batch statistics']
  return [Table(caption, EXPERIMENT.command, [*head, *TO_TARGETS], rows)]


def to_targets(
  results: Results, data: str, protocol: str, workers: int, recipe: str
) -> list[str]:
  """Returns mean seconds and GB to each of `TARGETS`.

  Args:
    results: Where they are.
    data: See `cell`.
    protocol: See `cell`.
    workers: See `cell`.
    recipe: See `cell`.
  """
  which = protocol, workers, recipe
  records = results.of(cell(data, *which))
  timed = quiet([*results.of(pace(*which)), *records])
  return [_reached(records, timed, target) for target in TARGETS]


def _reached(
  records: Sequence[Record], timed: Sequence[Record], target: float
) -> str:
  """Returns the mean seconds and GB to a target, of the runs that reach it."""
  rows = [row for r in records if (row := round_at(r, target))]
  if not rows:
    return 'not reached'
  sent = statistics.mean(row['wire_bytes_total'] for row in rows)
  parts = [f'{sent / 1e9:.2f} GB']
  if timed:
    seconds = statistics.median(map(seconds_of_a_round, timed))
    mean = statistics.mean(row['round'] for row in rows)
    parts.insert(0, f'{seconds * mean:.0f} s')
  if len(rows) < len(records):
    parts.append(f'({len(rows)} of {len(records)} runs)')
  return ', '.join(parts)


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
