"""Accuracy of ResIST and local SGD: the paper's Table 2.

  python -m experiments.table2 --scale=cpu --seeds=3 --data_dir=FOLDER

Trains on CIFAR-10 and CIFAR-100 with ResIST and local SGD on 2, 4 and 8
workers, and with data parallel on 4. Runs that have a result are skipped.
Results, a table and learning curves are written to
experiments/results/table2/SCALE/.
"""

from collections.abc import Mapping, Sequence
from itertools import product

from experiments import paper, pictures
from experiments.experiment import (
  Cell,
  Drawn,
  Experiment,
  Record,
  Results,
  main,
  of_runs,
)
from experiments.table import Table
from resist_jax.report.colours import PROTOCOLS

DATA = {'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100'}
NAMES = {protocol: name for protocol, (name, *_) in PROTOCOLS.items()}
WORKERS = (2, 4, 8)
# Other initial values than the card's, and what rows and lines say of them. At
# the paper's scale, the first runs were made before its cards took PyTorch's.
INITIAL = {'': '', 'he': ', initial values of He et al.'}


def cell(data: str, protocol: str, workers: int, initial: str = '') -> Cell:
  """Returns a cell of this table; other experiments share some of them.

  Args:
    data: A card, `cifar10` or `cifar100`.
    protocol: See `config.protocol`.
    workers: 2, 4 or 8.
    initial: A key of `INITIAL`.

  Returns:
    The cell.
  """
  overrides = {'protocol': protocol}
  if initial:
    overrides['model.init'] = initial
  return Cell(
    '_'.join(filter(None, (data, protocol, f's{workers}', initial))),
    data,
    f's{workers}',
    overrides,
    home='table2',
  )


def cells(scale: str) -> list[Cell]:
  """Returns the cells to train, first those that other experiments share."""
  listed = [
    cell(data, protocol, workers)
    for workers in (4, 2, 8)
    for data in DATA
    for protocol in ('resist', 'local_sgd')
  ]
  listed += [cell(data, 'data_parallel', 4) for data in DATA]
  if scale == 'paper':
    pair = ('resist', 'local_sgd')
    listed += [cell('cifar100', protocol, 4, 'he') for protocol in pair]
  return listed


def tables(results: Results) -> list[Table]:
  """Compares our accuracies with the paper's."""
  rows, found = [], []
  for (data, title), (protocol, name), workers, (initial, said) in product(
    DATA.items(), NAMES.items(), WORKERS, INITIAL.items()
  ):
    run = cell(data, protocol, workers, initial)
    records = results.of(run)
    if not records:
      continue
    found += records
    theirs = paper.ACCURACY[data].get(protocol, {}).get(workers, '')
    rows.append(
      [title, f'{name}{said}', str(workers)]
      + [results.percent(run), results.percent(run, 'test_accuracy_paper')]
      + [results.percent(run, 'best_test_accuracy_paper'), theirs]
    )
  if not rows:
    return []
  caption = (
    f'Test accuracy in %, {results.scale} scale. "Deployed" and "test-batch '
    'statistics" are the accuracies after the last round. "Best of the run" is '
    'the highest accuracy of any test with test-batch statistics, which is '
    'what the paper reports, but of some 313 tests; ours is the best of '
    f'{_tests(found)}. {of_runs(found)}'
  )
  head = ['data', 'protocol', 'workers', 'deployed', 'test-batch statistics']
  head += ['best of the run', 'the paper, at its scale']
  command = EXPERIMENT.made_by(results.scale, found)
  return [Table(caption, command, head, rows)]


def _tests(records: Sequence[Record]) -> str:
  """Says how many tests the runs had."""
  counts = {
    sum('test_accuracy_paper' in row for row in record['curve'])
    for record in records
  }
  return ' or '.join(map(str, sorted(counts)))


def figures(results: Results) -> Mapping[str, Drawn]:
  """Draws learning curves for each data set and number of workers."""
  drawn: dict[str, Drawn] = {}
  for data, title in DATA.items():
    panels = {
      f'{title}, {workers} workers': {
        f'{name}{said}': results.of(cell(data, protocol, workers, initial))
        for protocol, name in NAMES.items()
        for initial, said in INITIAL.items()
      }
      for workers in WORKERS
    }
    drawn[data] = pictures.curves(panels, 'wire_bytes_total')
  return drawn


EXPERIMENT = Experiment('table2', 'Accuracy (Table 2)', cells, tables, figures)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
