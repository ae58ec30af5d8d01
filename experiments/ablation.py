"""The effect of each ingredient: the paper's ablation on CIFAR-10.

  python -m experiments.ablation --scale=cpu --data_dir=FOLDER

Each column keeps the changes of the columns before it. With two workers: all
blocks of all sections are partitioned, strided ones included; strided blocks
are shared; only section 3 is partitioned; residual branches are scaled at test
time; norm and ReLU come before each convolution; another l. With eight workers:
no minimum depth; a minimum depth; another l. At the cpu scale, the first two of
these run again with four times as many rounds, and with a chain as long as the
paper's. At the scale cpu90, whose network has blocks in one section only, the
column of section 3 is missing, and runs have half of the rounds of that card.
"""

from collections.abc import Mapping
from typing import Any

from experiments import paper, pictures, table2
from experiments.experiment import (
  SCALES,
  Cell,
  Drawn,
  Experiment,
  Results,
  main,
  of_runs,
)
from experiments.table import Table
from resist_jax.run.fields import value_of

# All blocks of all sections are partitioned, branches are not scaled at test
# time, and norms come after convolutions.
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
    'pre_activation': None,  # None: the card without changes.
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
# Values of l other than the card's. The paper does not give its tuned values.
TRIED = {
  'smoke': {2: (1,), 8: (1,)},
  'cpu': {2: (16,), 8: (4, 24)},
  'cpu90': {2: (24,), 8: (6, 28)},
  'paper': {2: (100,), 8: (12, 50)},
}


def columns(workers: int, scale: str) -> dict[str, Cell]:
  """Returns the cells for a number of workers.

  Args:
    workers: 2 or 8.
    scale: See `EXPERIMENT`.

  Returns:
    Cells by title, in the order of the table. For the card without changes, it
    is the cell of Table 2, which has no scale cpu90.
  """
  card = table2.cell('cifar10', 'resist', workers)
  changes = dict(COLUMNS[workers])
  if scale == 'cpu90':
    changes = _at_cpu90(workers)
  listed = {
    TITLES[column]: Cell(
      f's{workers}_{column}', card.card, card.argument, overrides
    )
    if overrides is not None
    else card
    for column, overrides in changes.items()
  }
  *_, last = listed.values()
  config = last.config(scale)
  for steps in TRIED[scale][workers]:
    rounds = config.num_rounds * config.local_steps // steps
    every = max(1, config.eval_every * config.local_steps // steps)
    fields = {
      **last.overrides,
      'local_steps': steps,
      'num_rounds': rounds,
      'optimizer.warmup_rounds': config.optimizer.warmup_rounds
      * config.local_steps
      // steps,
      'eval_every': every,
      'checkpoint_every': every,
    }
    name = f's{workers}_l{steps}'
    listed[f'+ l = {steps}'] = Cell(name, card.card, card.argument, fields)
  return listed


def _at_cpu90(workers: int) -> dict[str, Mapping[str, Any]]:
  """Returns the changes of each column in half of the rounds."""
  config = table2.cell('cifar10', 'resist', workers).config('cpu90')
  half = {
    name: value_of(config, name) // 2
    for name in ('num_rounds', 'optimizer.warmup_rounds')
  }
  changes = dict(COLUMNS[workers])
  if workers == 2:
    # A single strided block cannot be handed over.
    changes['naive'] = {k: v for k, v in NAIVE.items() if k != 'partition'}
    changes['share_strided'] = changes.pop('only_section_3')
  return {
    column: {**(changes[column] or {}), **half}
    for column in COLUMNS[workers]
    if column in changes
  }


def closer(workers: int, scale: str) -> dict[str, Cell]:
  """Returns the cells of settings that are closer to the paper's.

  Args:
    workers: 2 or 8.
    scale: See `experiment.SCALES`.

  Returns:
    Cells by title, in the order of the table; none except for 8 workers at the
    cpu scale.
  """
  if (workers, scale) != (8, 'cpu'):
    return {}
  card = table2.cell('cifar10', 'resist', workers)
  config = card.config(scale)
  lengths = ('num_rounds', 'eval_every', 'checkpoint_every')
  nearer = {
    '4 x the rounds': ('x4', {name: 4 * config[name] for name in lengths}),
    'a chain of 22': (
      'chain22',  # With the minimum depth that fits the paper's Table 1.
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
  """Returns the paper's accuracy in % in the column of a title."""
  title = title.split(',')[0]  # Without the setting, which the paper lacks.
  column = {title: name for name, title in TITLES.items()}.get(title, 'tuned_l')
  return paper.ABLATION[workers][column]


def cells(scale: str) -> list[Cell]:
  """Returns the cells to train, the last columns first."""
  return [
    cell
    for workers in COLUMNS
    for listed in (columns(workers, scale), closer(workers, scale))
    for cell in reversed(listed.values())
  ]


def tables(results: Results) -> list[Table]:
  """Compares our accuracies with the paper's."""
  rows, found = [], []
  for workers in COLUMNS:
    listed = columns(workers, results.scale)
    for title, cell in (listed | closer(workers, results.scale)).items():
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
  shorter = ', half of its rounds' if results.scale == 'cpu90' else ''
  caption = (
    f'Test accuracy in % on CIFAR-10, {results.scale} scale{shorter}. Each row '
    'keeps the changes of the rows above it with the same number of workers. A '
    'row that sets l, the steps in a round, replaces the l above it. A row '
    'with a comma is that before the comma with another setting. The paper '
    f'tuned l and does not give its value. {of_runs(found)}'
  )
  head = ['workers', 'what is added', 'l', 'deployed', 'test-batch statistics']
  head += ['best of the run', 'the paper, at its scale']
  command = EXPERIMENT.made_by(results.scale, found)
  return [Table(caption, command, head, rows)]


def figures(results: Results) -> Mapping[str, Drawn]:
  """Draws our columns and the paper's."""
  drawn = {}
  for workers in COLUMNS:
    ours, papers = {}, {}
    for title, cell in columns(workers, results.scale).items():
      values = results.values(cell, 'test_accuracy')
      if values:
        ours[title] = [100 * value for value in values]
        known = title if title in TITLES.values() else '+ tuned l'
        papers[known] = [theirs(workers, title)]
    if len(ours) < 2:  # A single column shows no effect.
      continue
    panels = {
      f'ours, {workers} workers': {'ResIST': ours},
      f'the paper, {workers} workers': {'ResIST': papers},
    }
    near = results.scale != 'cpu'  # There, ours are far below the paper's.
    drawn[f'workers{workers}'] = pictures.steps(panels, sharey=near)
  return drawn


EXPERIMENT = Experiment(
  'ablation', 'Ablation', cells, tables, figures, scales=(*SCALES, 'cpu90')
)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
