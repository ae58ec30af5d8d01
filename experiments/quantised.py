"""Accuracy by the format of the numbers sent: the paper's table of bits.

  python -m experiments.quantised --scale=cpu --data_dir=FOLDER

ResIST in each wire format and local SGD in float32, on CIFAR-10, CIFAR-100 and
handwritten digits. The paper rounds each number to 8 to 4 bits. int8 here sends
changes in 8 bits with error feedback, and blocks that change their worker in
16 bits.
"""

from collections.abc import Mapping
import statistics

from experiments import costs, paper, pictures, table2
from experiments.experiment import (
  Cell,
  Drawn,
  Experiment,
  Results,
  main,
  of_runs,
)
from experiments.table import Table
from resist_jax.exchange import compression

DATA = {**table2.DATA, 'digits': 'digits'}
KINDS = (
  *(('resist', name) for name in compression.FORMATS),
  ('local_sgd', 'float32'),
)


def cell(data: str, protocol: str, wire_format: str) -> Cell:
  """Returns a cell of the table.

  Args:
    data: `cifar10`, `cifar100` or `digits`.
    protocol: See `config.protocol`.
    wire_format: See `config.wire_format`.

  Returns:
    The cell. In float32 on CIFAR, it is the cell of Table 2.
  """
  if data in table2.DATA and wire_format == 'float32':
    return table2.cell(data, protocol, 4)
  return Cell(
    f'{data}_{protocol}_{wire_format}',
    data,
    's4' if data in table2.DATA else '',
    {'protocol': protocol, 'wire_format': wire_format},
  )


def cells(scale: str) -> list[Cell]:
  """Returns the cells to train; the paper's scale has no digits."""
  return [
    cell(data, *kind)
    for data in DATA
    for kind in KINDS
    if data != 'digits' or scale != 'paper'
  ]


def tables(results: Results) -> list[Table]:
  """Compares our formats with each other, and int8 with the paper's 8 bits."""
  rows, found = [], []
  for data, title in DATA.items():
    exact = _accuracies(results, data, 'resist', 'float32')
    for protocol, wire_format in KINDS:
      run = cell(data, protocol, wire_format)
      records = results.of(run)
      if not records:
        continue
      found += records
      accuracies = _accuracies(results, data, protocol, wire_format)
      lost = [v - exact[k] for k, v in accuracies.items() if k in exact]
      summary = records[0]['summary']
      sent = costs.sent_in_a_round(records[0])
      exactly = summary['wire_bytes_per_round_local_sgd']
      if summary['num_devices'] != summary['num_workers']:
        config = {**records[0]['config'], 'wire_format': 'float32'}
        row = {**records[0]['curve'][0], 'protocol': 'local_sgd'}
        exactly = costs.sent({**records[0], 'config': config, 'curve': [row]})
      bits = 8 if wire_format == 'int8' and protocol == 'resist' else 0
      theirs = paper.QUANTISED.get(data, {}).get(bits)
      rows.append(
        [title, table2.NAMES[protocol], wire_format, results.percent(run)]
        + [f'{statistics.mean(lost):+.2f}' if lost else '']
        + [f'{sent / 1e6:.2f} MB']
        + [f'{sent / exactly:.3f}']
        + [f'{theirs:.2f}' if theirs else '']
      )
  if not rows:
    return []
  caption = (
    f'Four workers, {results.scale} scale. "Deployed" is the test accuracy in '
    '% after the last round; "points" is its distance from ResIST in float32 '
    'with the same seeds. "Share of local SGD" compares the bytes with those '
    'that exact local SGD sends. int8 sends the shared part in 8 bits and the '
    f'blocks in 16; the paper sends all in 8. {of_runs(found)}'
  )
  head = ['data', 'protocol', 'format', 'deployed', 'points', 'sent in a round']
  head += ['share of local SGD', 'the paper, 8 bits']
  command = EXPERIMENT.made_by(results.scale, found)
  return [Table(caption, command, head, rows)]


def _accuracies(
  results: Results, data: str, protocol: str, wire_format: str
) -> dict[int, float]:
  """Returns the accuracy in % of each seed."""
  return {
    record['summary']['seed']: 100 * record['summary']['test_accuracy']
    for record in results.of(cell(data, protocol, wire_format))
  }


def figures(results: Results) -> Mapping[str, Drawn]:
  """Draws learning curves by the bytes sent."""
  panels = {
    title: {
      f'{table2.NAMES[protocol]}, {wire_format}': results.of(
        cell(data, protocol, wire_format)
      )
      for protocol, wire_format in KINDS
    }
    for data, title in DATA.items()
  }
  return {
    'quantised': pictures.curves(panels, 'wire_bytes_total', sharey=False)
  }


EXPERIMENT = Experiment('quantised', 'Fewer bits', cells, tables, figures)

if __name__ == '__main__':
  main(EXPERIMENT, __doc__)
