"""How large the updates of healthy workers are, beside the limit.

  python -m experiments.healthy --data_dir=FOLDER

A worker is excluded from a round if its update is more than
`faults.update_factor` times the usual one (`participation.usual_norm`). This
trains every card, and settings in which workers differ most, without faults:
no worker should come near the limit.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from experiments.experiment import (
  Cell,
  Experiment,
  Results,
  main,
  of_runs,
)
from experiments.table import Table
from resist_jax.exchange import participation
from resist_jax.run.fields import get_config

FEW = {'num_rounds': 12, 'eval_every': 12, 'checkpoint_every': 12}
# Settings of the digits card, by the name of their results.
DIGITS: dict[str, Mapping[str, Any]] = {
  'digits_two': {'num_workers': 2},
  'digits_eight': {'num_workers': 8, 'min_depth': 3},
  'digits_unequal': {'depths': (8, 2, 1, 1)},
  'digits_carried': {'optimizer.carry_momentum': True},
  'digits_int8': {'wire_format': 'int8'},
  'digits_local_sgd': {'protocol': 'local_sgd'},
  'digits_data_parallel': {'protocol': 'data_parallel'},
  'digits_phases': {'phases.full_before': 1, 'phases.full_after': 1},
  'digits_sharded': {'data.sharded': True},
  'digits_warmup': {'optimizer.warmup_rounds': 5, 'lr': 0.3},
  'digits_one_step': {'local_steps': 1, 'batch_size': 8},
  'digits_group_norm': {'model.norm': 'group'},
}


def cells(scale: str) -> list[Cell]:
  """Returns the cells to train; the paper's scale has its own runs."""
  if scale == 'paper':
    return []
  cifar = [
    Cell(f'{card}_{word}', card, word, FEW)
    for card in ('cifar10', 'cifar100')
    for word in ('s2', 's4', 's8')
  ]
  digits = [Cell(name, 'digits', '', over) for name, over in DIGITS.items()]
  return [Cell('digits', 'digits'), *digits, *cifar]


def largest(rows: list[dict[str, Any]]) -> float:
  """Replays a run, and returns its largest norm in units of the usual one.

  Args:
    rows: Rows of its log.
  """
  recent, found, phase = participation.no_norms(), 0.0, None
  for row in rows:
    if row['protocol'] != phase:  # A phase begins without recent norms.
      recent, phase = participation.no_norms(), row['protocol']
    norms = jnp.array(row['update_norms'], jnp.float32)
    usual = participation.usual_norm(norms, recent)
    found = max(found, float(norms.max() / usual))
    recent = participation.remember(recent, norms)
  return found


def tables(results: Results) -> list[Table]:
  """Lists the largest update of each run."""
  rows, found = [], []
  for cell in cells(results.scale):
    for record in results.of(cell):
      found.append(record)
      curve, config = record['curve'], record['config']
      changed = ', '.join(f'{k}={v}' for k, v in cell.overrides.items())
      rows.append(
        [f'{cell.card}:{cell.argument}'.rstrip(':')]
        + ['' if cell.overrides is FEW else changed]
        + [str(len(curve) * config['num_workers'])]
        + [f'{largest(curve):.2f}']
        + [str(sum(len(row.get('left_out', ())) for row in curve))]
      )
  if not rows:
    return []
  limit = get_config().faults.update_factor
  caption = (
    'Norms of the updates of healthy workers: the largest of each run, in '
    f'units of the usual one. Above {limit:g}, a worker is excluded. '
    f'{of_runs(found)}'
  )
  head = ['card', 'changed', 'updates', 'largest', 'excluded']
  command = EXPERIMENT.made_by(results.scale, found)
  return [Table(caption, command, head, rows)]


EXPERIMENT = Experiment('healthy', 'Healthy updates', cells, tables)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
