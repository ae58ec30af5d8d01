"""Accuracy by the number of local iterations: the paper's sweep of l.

  python -m experiments.local_iterations --scale=cpu --data_dir=FOLDER

Workers take the same number of steps on CIFAR-100 for every l, so a larger l
means fewer synchronisations. "never" is a single round, which synchronises only
at its end.
"""

from collections.abc import Mapping

from experiments import paper, pictures, table2
from experiments.experiment import (
  Cell,
  Drawn,
  Experiment,
  Results,
  main,
  of_runs,
)
from experiments.table import Table

PROTOCOLS = ('resist', 'local_sgd')
# 0 stands for never. A worker of the cpu card takes 768 steps, 24 in a round.
SWEEP = {
  'smoke': (1, 0),
  'cpu': (24, 96, 384, 0),
  'paper': (50, 100, 250, 500, 1000, 1500, 2000, 4000, 6000, 0),
}
_LENGTHS = *sorted({s for some in SWEEP.values() for s in some} - {0}), 0
WORKERS = {'smoke': (4,), 'cpu': (4,), 'paper': (2, 4)}


def cell(protocol: str, workers: int, steps: int, scale: str) -> Cell:
  """Returns one point of the sweep.

  Args:
    protocol: See `config.protocol`.
    workers: Number of workers.
    steps: The paper's l; 0 for never.
    scale: See `experiment.SCALES`.

  Returns:
    The cell. For the l of the card, it is the cell of Table 2.
  """
  base = table2.cell('cifar100', protocol, workers)
  config = base.config(scale)
  if steps == config.local_steps:
    return base
  total = config.num_rounds * config.local_steps
  rounds = max(1, round(total / steps)) if steps else 1
  overrides = {
    'protocol': protocol,
    'num_rounds': rounds,
    'local_steps': steps or total,
    # As many tests as the card has, but at least one, at the end.
    'eval_every': max(1, rounds * config.eval_every // config.num_rounds),
    'checkpoint_every': max(1, rounds * config.eval_every // config.num_rounds),
  }
  name = f'{protocol}_s{workers}_l{steps or "never"}'
  return Cell(name, base.card, base.argument, overrides)


def cells(scale: str) -> list[Cell]:
  """Returns the cells of the sweep."""
  return [
    cell(protocol, workers, steps, scale)
    for workers in WORKERS[scale]
    for steps in reversed(SWEEP[scale])
    for protocol in PROTOCOLS
  ]


def tables(results: Results) -> list[Table]:
  """Compares our accuracies with the paper's for the same l."""
  scale, rows, found = results.scale, [], []
  for workers in WORKERS[scale]:
    for steps in SWEEP[scale]:
      runs = {p: cell(p, workers, steps, scale) for p in PROTOCOLS}
      records = [r for run in runs.values() for r in results.of(run)]
      if not records:
        continue
      found += records
      rows.append(
        [str(workers), _name(steps), str(records[0]['config']['num_rounds'])]
        + [results.percent(runs[protocol]) for protocol in PROTOCOLS]
        + [_theirs(protocol, workers, steps, scale) for protocol in PROTOCOLS]
      )
  if not rows:
    return []
  caption = (
    f'Deployed test accuracy in % on CIFAR-100 after the last round, {scale} '
    'scale, for l steps in a round and as many steps in all, to half a '
    'round. '
    f'{of_runs(found)}'
  )
  head = ['workers', 'l', 'rounds']
  head += [f'{table2.NAMES[protocol]}' for protocol in PROTOCOLS]
  head += [f'the paper, {table2.NAMES[protocol]}' for protocol in PROTOCOLS]
  command = EXPERIMENT.made_by(scale, found)
  return [Table(caption, command, head, rows)]


def _name(steps: int) -> str:
  return str(steps or 'never')


def _theirs(protocol: str, workers: int, steps: int, scale: str) -> str:
  if scale != 'paper' and steps:
    return ''
  return f'{paper.LOCAL_ITERATIONS[protocol, workers][steps]:.2f}'


def figures(results: Results) -> Mapping[str, Drawn]:
  """Draws accuracy by l, ours and the paper's."""
  scale = results.scale
  panels = {}
  for workers in WORKERS[scale]:
    panels[f'{workers} workers, ours ({scale} scale)'] = {
      table2.NAMES[protocol]: {
        _name(steps): [100 * value for value in values]
        for steps in SWEEP[scale]
        if (
          values := results.values(
            cell(protocol, workers, steps, scale), 'test_accuracy'
          )
        )
      }
      for protocol in PROTOCOLS
    }
    panels[f'{workers} workers, the paper'] = {
      table2.NAMES[protocol]: {
        _name(steps): [value]
        for steps, value in paper.LOCAL_ITERATIONS[protocol, workers].items()
      }
      for protocol in PROTOCOLS
    }
  return {
    'local_iterations': pictures.steps(
      panels, xlabel='l', sharey=False, names=[_name(s) for s in _LENGTHS]
    )
  }


EXPERIMENT = Experiment(
  'local_iterations', 'Local iterations', cells, tables, figures
)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
