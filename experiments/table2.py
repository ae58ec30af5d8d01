"""Accuracy of ResIST and local SGD: the paper's Table 2.

  python -m experiments.table2 --scale=cpu --seeds=3 --data_dir=FOLDER

Trains on CIFAR-10 and CIFAR-100 with ResIST and local SGD on 2, 4 and 8
workers, and with data parallel on 4. Runs that have a result are skipped.
Results, a table and learning curves are written to
experiments/results/table2/SCALE/.
"""

from collections.abc import Mapping

from experiments import paper, pictures
from experiments.experiment import (
  Cell,
  Drawn,
  Experiment,
  Results,
  main,
  of_runs,
)
from experiments.table import Table
from resist_jax.report.colours import PROTOCOLS

DATA = {'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100'}
NAMES = {protocol: name for protocol, (name, *_) in PROTOCOLS.items()}
WORKERS = (2, 4, 8)


def cell(data: str, protocol: str, workers: int) -> Cell:
  """Returns a cell of this table; other experiments share some of them.

  Args:
    data: A card, `cifar10` or `cifar100`.
    protocol: See `config.protocol`.
    workers: 2, 4 or 8.

  Returns:
    The cell.
  """
  return Cell(
    f'{data}_{protocol}_s{workers}',
    data,
    f's{workers}',
    {'protocol': protocol},
    home='table2',
  )


def cells(scale: str) -> list[Cell]:
  """Returns the cells to train, first those that other experiments share."""
  del scale
  listed = [
    cell(data, protocol, workers)
    for workers in (4, 2, 8)
    for data in DATA
    for protocol in ('resist', 'local_sgd')
  ]
  return [*listed, *(cell(data, 'data_parallel', 4) for data in DATA)]


def tables(results: Results) -> list[Table]:
  """Compares our accuracies with the paper's."""
  rows, found = [], []
  for data, title in DATA.items():
    for protocol, name in NAMES.items():
      for workers in WORKERS:
        run = cell(data, protocol, workers)
        records = results.of(run)
        if not records:
          continue
        found += records
        theirs = paper.ACCURACY[data].get(protocol, {}).get(workers, '')
        rows.append(
          [title, name, str(workers)]
          + [results.percent(run), results.percent(run, 'test_accuracy_paper')]
          + [results.percent(run, 'best_test_accuracy_paper'), theirs]
        )
  if not rows:
    return []
  caption = (
    f'Test accuracy in %, {results.scale} scale. "Deployed" and "test-batch '
    'statistics" are the accuracies after the last round. "Best of the run" is '
    'the highest accuracy of any test with test-batch statistics, which is '
    f'what the paper reports. {of_runs(found)}'
  )
  head = ['data', 'protocol', 'workers', 'deployed', 'test-batch statistics']
  head += ['best of the run', 'the paper, at its scale']
  return [Table(caption, EXPERIMENT.command, head, rows)]


def figures(results: Results) -> Mapping[str, Drawn]:
  """Draws learning curves for each data set and number of workers."""
  drawn: dict[str, Drawn] = {}
  for data, title in DATA.items():
    panels = {
      f'{title}, {workers} workers': {
        name: results.of(cell(data, protocol, workers))
        for protocol, name in NAMES.items()
      }
      for workers in WORKERS
    }
    drawn[data] = pictures.curves(panels, 'wire_bytes_total')
  return drawn


EXPERIMENT = Experiment('table2', 'Accuracy (Table 2)', cells, tables, figures)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
