"""What each ingredient brings: the paper's ablation on CIFAR-10.

  python -m experiments.ablation --scale=cpu --data_dir=FOLDER

Each column has what the ones before it brought. With two workers: every block
of every section is dealt, strided ones included; strided blocks are shared;
only section 3 is cut; residual branches are scaled at test time; norm and ReLU
come before each convolution; shorter rounds. With eight: without and with a
minimum depth; shorter rounds.
"""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments import paper, pictures, table2
from experiments.experiment import Cell, Experiment, Results, main, of_runs
from experiments.table import Table

# All blocks of all sections, tested as they were trained; norms come last.
NAIVE = {
  'exchange': 'masked_psum',
  'min_depth': 0,
  'partition': (1, 2, 3, 4),
  'partition_strided': True,
  'residual_scale': 'none',
  'model.pre_activation': False,
}
COLUMNS: dict[int, dict[str, Mapping[str, Any] | None]] = {
  2: {
    'naive': NAIVE,
    'share_strided': {**NAIVE, 'partition_strided': False},
    'only_section_3': {
      'residual_scale': 'none',
      'model.pre_activation': False,
    },
    'scale': {'model.pre_activation': False},
    'pre_activation': None,  # The card as it is.
    'tuned_l': {},
  },
  8: {'pre_activation': {'min_depth': 0}, 'min_depth': None, 'tuned_l': {}},
}
TITLES = {
  'naive': 'naive',
  'share_strided': '+ share strided',
  'only_section_3': '+ only section 3',
  'scale': '+ scale',
  'pre_activation': '+ pre-activation',
  'min_depth': '+ minimum depth',
  'tuned_l': '+ tuned l',
}


def cell(workers: int, column: str, scale: str) -> Cell:
  """Returns a column of the table.

  Args:
    workers: 2 or 8.
    column: A key of `COLUMNS[workers]`.
    scale: The paper tuned l for its own; at others a third, as often thrice.

  Returns:
    The cell; the card as it is belongs to Table 2.
  """
  overrides = COLUMNS[workers][column]
  if overrides is None:
    return table2.cell('cifar10', 'resist', workers)
  found = Cell(f's{workers}_{column}', 'cifar10', f's{workers}', overrides)
  if column != 'tuned_l':
    return found
  config = found.config(scale)
  shorter = max(1, config.local_steps // 3)
  rounds = config.num_rounds * config.local_steps // shorter
  every = config.eval_every * config.local_steps // shorter
  tuned = {
    'local_steps': shorter,
    'num_rounds': rounds,
    'eval_every': every,
    'checkpoint_every': every,
  }
  return Cell(found.name, found.card, found.argument, tuned)


def cells(scale: str) -> list[Cell]:
  """Returns every column, that of most consequence last to first."""
  return [
    cell(workers, column, scale)
    for workers, columns in COLUMNS.items()
    for column in reversed(columns)
  ]


def tables(results: Results) -> list[Table]:
  """Returns ours beside the paper's."""
  rows, found = [], []
  for workers, columns in COLUMNS.items():
    for column in columns:
      run = cell(workers, column, results.scale)
      records = results.of(run)
      if not records:
        continue
      found += records
      rows.append(
        [str(workers), TITLES[column], str(records[0]['config']['local_steps'])]
        + [results.percent(run), results.percent(run, 'test_accuracy_paper')]
        + [results.percent(run, 'best_test_accuracy_paper')]
        + [f'{paper.ABLATION[workers][column]:.1f}']
      )
  if not rows:
    return []
  caption = (
    f'Ablation on CIFAR-10, {results.scale} scale, test accuracy in %; each '
    'row has what the rows of the same number of workers above it brought; '
    f'{of_runs(found)}'
  )
  head = ['workers', 'what is added', 'l', 'deployed', 'test-batch statistics']
  head += ['best of the run', 'the paper, at its scale']
  return [Table(caption, EXPERIMENT.command, head, rows)]


def figures(results: Results) -> Mapping[str, Figure | None]:
  """Returns our columns beside the paper's."""
  panels = {}
  for workers, columns in COLUMNS.items():
    ours, theirs = {}, {}
    for column in columns:
      run = cell(workers, column, results.scale)
      values = results.values(run, 'test_accuracy')
      if values:
        ours[TITLES[column]] = [100 * value for value in values]
        theirs[TITLES[column]] = [paper.ABLATION[workers][column]]
    panels[f'{workers} workers'] = {
      f'ours, {results.scale} scale': ours,
      'the paper': theirs,
    }
  return {'ablation': pictures.steps(panels)}


EXPERIMENT = Experiment('ablation', 'Ablation', cells, tables, figures)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
