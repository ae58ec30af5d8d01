"""Deeper networks: the paper's table of ResNet152 and ResNet200.

python -m experiments.deeper --scale=cpu --data_dir=FOLDER
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
  on_each_machine,
  seconds,
)
from experiments.table import Table

DEPTHS = ('152', '200')
PROTOCOLS = ('local_sgd', 'resist')
# At the cpu scale, two cores train each run in well under an hour.
RUNS = {
  'smoke': (('cifar10', 4),),
  'cpu': (('cifar10', 4),),
  'paper': tuple((data, workers) for data in table2.DATA for workers in (2, 4)),
}


def cell(data: str, depth: str, protocol: str, workers: int) -> Cell:
  """Returns a cell of the table.

  Args:
    data: `cifar10` or `cifar100`.
    depth: `152` or `200`.
    protocol: See `config.protocol`.
    workers: Number of workers.

  Returns:
    The cell.
  """
  return Cell(
    f'{data}_{depth}_{protocol}_s{workers}',
    'deeper',
    f'{depth},s{workers}',
    {'protocol': protocol, 'data.name': data},
  )


def cells(scale: str) -> list[Cell]:
  """Returns the cells to train."""
  return [
    cell(data, depth, protocol, workers)
    for data, workers in RUNS[scale]
    for depth in DEPTHS
    for protocol in PROTOCOLS
  ]


def compared(
  results: Results, data: str, depth: str, workers: int
) -> dict[str, tuple[float, float]]:
  """Returns the seconds of local SGD and of ResIST on each machine.

  Args:
    results: The results.
    data: See `cell`.
    depth: See `cell`.
    workers: See `cell`.

  Returns:
    Both by the machine, where it ran both.
  """
  runs = {p: results.of(cell(data, depth, p, workers)) for p in PROTOCOLS}
  return {
    where: (seconds(here['local_sgd']) or 0.0, seconds(here['resist']) or 0.0)
    for where, here in on_each_machine(runs).items()
  }


def tables(results: Results) -> list[Table]:
  """Compares our accuracies and speed-ups with the paper's."""
  rows, found = [], []
  for data, workers in RUNS[results.scale]:
    for depth in DEPTHS:
      runs = {p: cell(data, depth, p, workers) for p in PROTOCOLS}
      records = {p: results.of(run) for p, run in runs.items()}
      if not all(records.values()):
        continue
      found += [record for some in records.values() for record in some]
      pairs = compared(results, data, depth, workers).values()
      length = records['resist'][0]['summary']['num_blocks']['stage3_chain']
      local, resist, faster = paper.DEEPER[data, depth, workers]
      rows.append(
        [table2.DATA[data], depth, str(length), str(workers)]
        + [results.percent(run) for run in runs.values()]
        + [', '.join(f'{slow / fast:.2f}' for slow, fast in pairs)]
        + [f'{local:.2f}', f'{resist:.2f}', f'{faster:.2f}']
      )
  if not rows:
    return []
  caption = (
    f'Deployed test accuracy in % after the last round, {results.scale} scale, '
    'and the training time of local SGD divided by that of ResIST, on each '
    'machine that ran both, with no '
    f'link between the workers. {of_runs(found)}'
  )
  head = ['data', 'network', 'chain', 'workers', 'local SGD', 'ResIST']
  head += ['faster', 'paper: local SGD', 'paper: ResIST', 'paper: faster']
  command = EXPERIMENT.made_by(results.scale, found)
  return [Table(caption, command, head, rows)]


def figures(results: Results) -> Mapping[str, Drawn]:
  """Draws learning curves by the bytes sent."""
  panels = {
    f'{table2.DATA[data]}, ResNet{depth}, {workers} workers': {
      table2.NAMES[protocol]: results.of(cell(data, depth, protocol, workers))
      for protocol in PROTOCOLS
    }
    for data, workers in RUNS[results.scale]
    for depth in DEPTHS
  }
  return {'deeper': pictures.curves(panels, 'wire_bytes_total')}


EXPERIMENT = Experiment('deeper', 'Deeper networks', cells, tables, figures)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
