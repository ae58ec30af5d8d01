"""ResIST and its baselines on handwritten digits.

  python -m experiments.digits --seeds=3

It takes some minutes, and needs no data that is not installed.
"""

from collections.abc import Mapping

from experiments import costs, pictures, table2
from experiments.experiment import (
  Cell,
  Drawn,
  Experiment,
  Results,
  main,
  of_runs,
)
from experiments.table import Table
from resist_jax.report import plots


def cell(protocol: str) -> Cell:
  """Returns the cell of a protocol; `quantised` shares two of them."""
  home = '' if protocol == 'data_parallel' else 'quantised'
  name = f'digits_{protocol}_float32'
  return Cell(name, 'digits', '', {'protocol': protocol}, home=home)


def cells(scale: str) -> list[Cell]:
  """Returns the cells to train; the paper's scale has no digits."""
  return [cell(p) for p in table2.NAMES] if scale != 'paper' else []


def tables(results: Results) -> list[Table]:
  """Compares accuracy, bytes and parameters of the protocols."""
  rows, found = [], []
  for protocol, name in table2.NAMES.items():
    run = cell(protocol)
    records = results.of(run)
    if not records:
      continue
    found += records
    first = records[0]['summary']
    rows.append(
      [name, results.percent(run), results.percent(run, 'test_accuracy_paper')]
      + [f'{costs.sent_in_a_round(records[0]) / 1e6:.2f} MB']
      + [f'{first["params_per_worker"] / first["params_total"]:.0%}']
    )
  if not rows:
    return []
  config = found[0]['config']
  caption = (
    f'{config["num_workers"]} workers train for {config["num_rounds"]} rounds '
    f'of {config["local_steps"]} steps. ResIST cuts a chain of 12 blocks. The '
    'accuracy is measured on 360 test images. "Weights on a worker" is the '
    f'share of the parameters that one worker holds. {of_runs(found)}'
  )
  head = ['protocol', 'accuracy %, deployed', 'test-batch statistics']
  head += ['sent in a round', 'weights on a worker']
  command = EXPERIMENT.made_by(results.scale, found)
  return [Table(caption, command, head, rows)]


def figures(results: Results) -> Mapping[str, Drawn]:
  """Draws learning curves, and the decomposition of a ResIST run."""
  panel = {
    name: results.of(cell(protocol)) for protocol, name in table2.NAMES.items()
  }
  drawn: dict[str, Drawn] = {}
  drawn['digits'] = pictures.curves({'digits': panel}, 'round')
  for record in results.of(cell('resist'))[:1]:
    rows = record.get('curve', [])
    drawn['decomposition'] = plots.decomposition_figure('digits', rows)
  return drawn


EXPERIMENT = Experiment('digits', 'Handwritten digits', cells, tables, figures)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
