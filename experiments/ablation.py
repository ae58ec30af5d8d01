"""What each ingredient brings: the paper's ablation on CIFAR-10.

  python -m experiments.ablation --scale=cpu --data_dir=FOLDER

Each column has what the ones before it brought. With two workers: every block
of every section is assigned, strided ones included; strided blocks are shared;
only section 3 is cut; residual branches are scaled at test time; norm and ReLU
come before each convolution; another l. With eight: without and with a minimum
depth; another l; and at cpu scale both again, for four times the rounds and
with as long a chain as the paper's.
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
  },
  8: {'pre_activation': {'min_depth': 0}, 'min_depth': None},
}
TITLES = {
  'naive': 'naive',
  'share_strided': '+ share strided',
  'only_section_3': '+ only section 3',
  'scale': '+ scale',
  'pre_activation': '+ pre-activation',
  'min_depth': '+ minimum depth',
}
# Other l than the card's; the paper's tuned ones are unpublished.
TRIED = {
  'smoke': {2: (1,), 8: (1,)},
  'cpu': {2: (16,), 8: (4, 24)},
  'paper': {2: (100,), 8: (12, 50)},
}


def columns(workers: int, scale: str) -> dict[str, Cell]:
  """Returns the runs of a number of workers.

  Args:
    workers: 2 or 8.
    scale: See `experiment.SCALES`.

  Returns:
    Cells by title, in the order of the table; the card as it is belongs to
    Table 2.
  """
  card = table2.cell('cifar10', 'resist', workers)
  found = {
    TITLES[column]: Cell(
      f's{workers}_{column}', card.card, card.argument, overrides
    )
    if overrides is not None
    else card
    for column, overrides in COLUMNS[workers].items()
  }
  config = card.config(scale)
  for steps in TRIED[scale][workers]:
    rounds = config.num_rounds * config.local_steps // steps
    every = max(1, config.eval_every * config.local_steps // steps)
    fields = {
      'local_steps': steps,
      'num_rounds': rounds,
      'eval_every': every,
      'checkpoint_every': every,
    }
    name = f's{workers}_l{steps}'
    found[f'+ l = {steps}'] = Cell(name, card.card, card.argument, fields)
  return found


def again(workers: int, scale: str) -> dict[str, Cell]:
  """Returns columns nearer to the setting of the paper."""
  if (workers, scale) != (8, 'cpu'):
    return {}
  card = table2.cell('cifar10', 'resist', workers)
  config = card.config(scale)
  lengths = ('num_rounds', 'eval_every', 'checkpoint_every')
  nearer = {
    '4 x the rounds': ('x4', {name: 4 * config[name] for name in lengths}),
    'a chain of 22': (
      'chain22',  # And the depth that fits the paper's Table 1.
      {'model.stage_sizes': (3, 4, 23, 3), 'min_depth': 4},
    ),
  }
  return {
    f'{TITLES[column]}, {title}': Cell(
      f's{workers}_{column}_{name}',
      card.card,
      card.argument,
      {**fields, **(overrides or {})},
    )
    for title, (name, fields) in nearer.items()
    for column, overrides in COLUMNS[workers].items()
  }


def theirs(workers: int, title: str) -> float:
  """Returns the paper's accuracy in a column."""
  title = title.split(',')[0]  # However long it is.
  column = {title: name for name, title in TITLES.items()}.get(title, 'tuned_l')
  return paper.ABLATION[workers][column]


def cells(scale: str) -> list[Cell]:
  """Returns every column, that of most consequence last to first."""
  return [
    cell
    for workers in COLUMNS
    for found in (columns(workers, scale), again(workers, scale))
    for cell in reversed(found.values())
  ]


def tables(results: Results) -> list[Table]:
  """Returns ours beside the paper's."""
  rows, found = [], []
  for workers in COLUMNS:
    listed = columns(workers, results.scale)
    for title, cell in (listed | again(workers, results.scale)).items():
      records = results.of(cell)
      if not records:
        continue
      found += records
      rows.append(
        [str(workers), title, str(records[0]['config']['local_steps'])]
        + [results.percent(cell), results.percent(cell, 'test_accuracy_paper')]
        + [results.percent(cell, 'best_test_accuracy_paper')]
        + [f'{theirs(workers, title):.1f}']
      )
  if not rows:
    return []
  caption = (
    f'Ablation on CIFAR-10, {results.scale} scale, test accuracy in %; each '
    'row has what the rows of the same number of workers above it brought, but '
    'another l replaces the one before (the paper: tuned, unpublished); '
    f'{of_runs(found)}'
  )
  head = ['workers', 'what is added', 'l', 'deployed', 'test-batch statistics']
  head += ['best of the run', 'the paper, at its scale']
  return [Table(caption, EXPERIMENT.command, head, rows)]


def figures(results: Results) -> Mapping[str, Figure | None]:
  """Returns our columns beside the paper's."""
  found = {}
  for workers in COLUMNS:
    ours, papers = {}, {}
    for title, cell in columns(workers, results.scale).items():
      values = results.values(cell, 'test_accuracy')
      if values:
        ours[title] = [100 * value for value in values]
        known = title if title in TITLES.values() else '+ tuned l'
        papers[known] = [theirs(workers, title)]
    panels = {
      f'ours, {workers} workers': {'ours': ours},
      f'the paper, {workers} workers': {'the paper': papers},
    }
    found[f'workers{workers}'] = pictures.steps(panels, alike=False)
  return found


EXPERIMENT = Experiment('ablation', 'Ablation', cells, tables, figures)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
