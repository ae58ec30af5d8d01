"""Seconds of training, and time to an accuracy: the paper's Table 3.

  python -m experiments.table3 --scale=cpu --data_dir=FOLDER

The runs are those of `experiments.table2`, by the clock: without compilation,
tests and checkpoints. All workers of a run share the cores of one machine, so
on a CPU these seconds are the work of all of them together, and no link is in
them; `experiments.plan` adds one. Runs that were made on a busy machine
(`--busy`) are left out.
"""

from collections.abc import Mapping
import math
import statistics

from matplotlib.figure import Figure

from experiments import paper, pictures, table2
from experiments.experiment import (
  Experiment,
  Record,
  Results,
  main,
  of_runs,
  quiet,
  seconds,
)
from experiments.table import Table

# Shares of what local SGD ends with.
TARGETS = {'smoke': 0.9, 'cpu': 0.9, 'paper': 0.99}


def seconds_to(record: Record, accuracy: float) -> float | None:
  """Returns when a run first tested at an accuracy.

  Args:
    record: Of a run.
    accuracy: Share of 1, with fixed statistics.

  Returns:
    Seconds of training; None where it never did.

  >>> row = {'test_accuracy': 0.5, 'seconds_training': 2.0}
  >>> seconds_to({'curve': [{}, row]}, 0.4), seconds_to({'curve': [row]}, 0.6)
  (2.0, None)
  """
  times = [
    row['seconds_training']
    for row in record['curve']
    if row.get('test_accuracy', -1) >= accuracy
  ]
  return times[0] if times else None


def tables(results: Results) -> list[Table]:
  """Returns ours beside the paper's, where both protocols were run."""
  rows, found = [], []
  for data, title in table2.DATA.items():
    for workers in table2.WORKERS:
      runs = {
        protocol: quiet(results.of(table2.cell(data, protocol, workers)))
        for protocol in table2.NAMES
      }
      if not (runs['local_sgd'] and runs['resist']):
        continue
      final = statistics.mean(
        record['summary']['test_accuracy'] for record in runs['local_sgd']
      )
      target = TARGETS[results.scale] * final
      base = seconds(runs['local_sgd']) or math.nan
      theirs = paper.SECONDS[data]
      for protocol, records in runs.items():
        if not records:
          continue
        found += records
        reached = [seconds_to(record, target) for record in records]
        times = [time for time in reached if time is not None]
        trained = seconds(records) or math.nan
        published = theirs.get(protocol, {}).get(workers)
        rows.append(
          [title, table2.NAMES[protocol], str(workers)]
          + [f'{trained:.0f}', f'{base / trained:.2f}']
          + [f'{target:.1%}', _time_to(times, len(records))]
          + [_theirs(published, theirs['local_sgd'].get(workers))]
        )
  if not rows:
    return []
  caption = (
    f'Seconds of training, {results.scale} scale, median of the seeds: without '
    'compilation, tests and checkpoints, all workers on one machine and no '
    'link between them; and until the first test with fixed statistics at '
    f'{TARGETS[results.scale]:.0%} of what local SGD ends with; '
    f'{of_runs(found)}'
  )
  head = ['data', 'protocol', 'workers', 'seconds', 'faster than local SGD']
  head += ['target', 'seconds to it', 'the paper, its GPUs']
  return [Table(caption, EXPERIMENT.command, head, rows)]


def _time_to(times: list[float], runs: int) -> str:
  if not times:
    return 'not reached'
  text = f'{statistics.median(times):.0f}'
  return text if len(times) == runs else f'{text} ({len(times)} of {runs} runs)'


def _theirs(published: int | None, base: int | None) -> str:
  if not (published and base):
    return ''
  return f'{published} s, {base / published:.2f}'


def figures(results: Results) -> Mapping[str, Figure | None]:
  """Returns learning curves by the clock."""
  return {
    data: pictures.curves(
      {
        f'{title}, {workers} workers': {
          name: quiet(results.of(table2.cell(data, protocol, workers)))
          for protocol, name in table2.NAMES.items()
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
