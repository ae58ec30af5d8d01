"""Seconds of training, and time to an accuracy: the paper's Table 3.

  python -m experiments.table3 --scale=cpu --data_dir=FOLDER

The runs are those of `experiments.table2`. Seconds do not include compilation,
tests and checkpoints. All workers of a run share the cores of one machine, so
on a CPU these seconds are the work of all workers together. They contain no
link; `experiments.plan` predicts those with a link. Runs on a machine that did
other work (`--busy`) are ignored.
"""

from collections.abc import Iterator, Mapping
import itertools
import math
import statistics
from typing import NamedTuple

from experiments import paper, pictures, table2
from experiments.experiment import (
  Drawn,
  Experiment,
  Record,
  Results,
  main,
  of_runs,
  on_each_machine,
  quiet,
  seconds,
)
from experiments.runs import conditions, first_test
from experiments.table import Table

# Target accuracies, as shares of the final accuracy of local SGD.
TARGETS = {'smoke': 0.9, 'cpu': 0.9, 'paper': 0.99}


def tables(results: Results) -> list[Table]:
  """Compares our seconds with the paper's, where both protocols were run."""
  cells = itertools.product(table2.DATA, table2.WORKERS, table2.INITIAL)
  groups = [group for cell in cells for group in each_group(results, *cell)]
  if not groups:
    return []
  target = TARGETS[results.scale]
  found = [r for group in groups for runs in group.runs.values() for r in runs]
  caption = (
    f'Seconds of training, {results.scale} scale, without compilation, tests '
    'and checkpoints. All workers share one machine, and no link lies between '
    f'them. The target is {target:.0%} of the deployed accuracy that local SGD '
    'reaches in the end; "seconds to it" is the training time until the first '
    f'test that reaches it. {of_runs(found, "Median")}'
  )
  head = ['data', 'protocol', 'workers', 'seconds', 'faster than local SGD']
  head += ['target', 'seconds to it', 'the paper, its GPUs']
  rows = [row for group in groups for row in _rows(group, target)]
  if len({group.machine for group in groups}) > 1:
    head.append('machine')
  else:
    rows = [row[:-1] for row in rows]
  command = EXPERIMENT.made_by(results.scale, found)
  return [Table(caption, command, head, rows)]


class Group(NamedTuple):
  """Runs of each protocol on one machine, whose seconds can be compared.

  The fields before `machine` are those of `table2.cell`.
  """

  data: str
  workers: int
  initial: str
  machine: str
  runs: dict[str, list[Record]]


def each_group(
  results: Results, data: str, workers: int, initial: str = ''
) -> Iterator[Group]:
  """Yields the runs of each machine that ran ResIST and local SGD.

  Args:
    results: The results.
    data: `cifar10` or `cifar100`.
    workers: Number of workers.
    initial: See `table2.cell`.
  """
  runs = {
    protocol: results.of(table2.cell(data, protocol, workers, initial))
    for protocol in table2.NAMES
  }
  both = {protocol: runs[protocol] for protocol in ('resist', 'local_sgd')}
  for name in on_each_machine(both):
    here = {
      protocol: [
        r for r in quiet(records) if conditions(r['provenance']) == name
      ]
      for protocol, records in runs.items()
    }
    found = {protocol: records for protocol, records in here.items() if records}
    yield Group(data, workers, initial, name, found)


def _rows(group: Group, share: float) -> Iterator[list[str]]:
  """Yields the row of each protocol."""
  final = statistics.mean(
    record['summary']['test_accuracy'] for record in group.runs['local_sgd']
  )
  target = share * final
  base = seconds(group.runs['local_sgd']) or math.nan
  theirs = paper.SECONDS[group.data]
  for protocol, records in group.runs.items():
    tests = [first_test(record['curve'], target) for record in records]
    times = [row['seconds_training'] for row in tests if row]
    trained = seconds(records) or math.nan
    published = theirs.get(protocol, {}).get(group.workers)
    yield [
      table2.DATA[group.data],
      f'{table2.NAMES[protocol]}{table2.INITIAL[group.initial]}',
      str(group.workers),
      *(f'{trained:.0f}', f'{base / trained:.2f}'),
      *(f'{target:.1%}', _time_to(times, len(records))),
      _theirs(published, theirs['local_sgd'].get(group.workers)),
      group.machine,
    ]


def _time_to(times: list[float], runs: int) -> str:
  if not times:
    return 'not reached'
  text = f'{statistics.median(times):.0f}'
  return text if len(times) == runs else f'{text} ({len(times)} of {runs} runs)'


def _theirs(published: int | None, base: int | None) -> str:
  if not (published and base):
    return ''
  return f'{published} s, {base / published:.2f}'


def figures(results: Results) -> Mapping[str, Drawn]:
  """Draws learning curves by seconds, from the machine with most protocols."""

  def most(data: str, workers: int) -> Mapping[str, list[Record]]:
    groups = [group.runs for group in each_group(results, data, workers)]
    return max(groups, key=len, default={})

  return {
    data: pictures.curves(
      {
        f'{title}, {workers} workers': {
          table2.NAMES[protocol]: records
          for protocol, records in most(data, workers).items()
        }
        for workers in table2.WORKERS
      },
      'seconds_training',
    )
    for data, title in table2.DATA.items()
  }


EXPERIMENT = Experiment(
  'table3',
  'Seconds of training (Table 3)',
  table2.cells,
  tables,
  figures,
)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
