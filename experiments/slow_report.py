"""Tables and a figure of the results of `experiments.slow_network`.

python -m experiments.slow_report
"""

from collections.abc import Mapping
import pathlib
import sys
from typing import Any

from matplotlib.figure import Figure

from experiments.namespaces import LINKS
from experiments.runs import (
  RESULTS,
  conditions,
  machine,
  read,
  show_results,
)
from experiments.slow_network import FOLDER, METHODS
from experiments.table import Table
from resist_jax.report import plots
from resist_jax.report.colours import ENSEMBLE

Record = Mapping[str, Any]
Records = Mapping[tuple[str, str], Record]  # By link and method.
NAMES = {
  'data_parallel': 'data parallel',
  'local_sgd': 'local SGD',
  'resist_masked_psum': 'ResIST, masked psum',
  'resist_hand_over': 'ResIST, hand-over',
  'resist_hand_over_bfloat16': 'ResIST, hand-over, bfloat16',
  'resist_hand_over_int8': 'ResIST, hand-over, int8',
}


def load(network: str, results: pathlib.Path = RESULTS) -> Records:
  """Returns the results of a network by link and method.

  Args:
    network: A key of `slow_network.NETWORKS`.
    results: The folder that holds the results of all experiments.
  """
  paths = sorted((results / FOLDER.name).glob(f'{network}_*.json'))
  records = [read(path) for path in paths]
  return {(r['link'], r['method']): r for r in records}


def exchange_seconds(records: Records, link: str, method: str) -> float | None:
  """Returns the seconds of a round that are not local training.

  Data parallel communicates in each step, so its seconds cannot be separated:
  they are those of its round without the local training of local SGD.

  Args:
    records: See `load`.
    link: Name of the link.
    method: A key of `METHODS`.

  Returns:
    Seconds, or None without a result.
  """
  record = records.get((link, method))
  if record is None:
    return None
  if method != 'data_parallel':
    return record['seconds_exchange']
  base = beside(records, link, method)
  return record['seconds_round'] - base['seconds_local'] if base else None


def beside(records: Records, link: str, method: str) -> Record | None:
  """Returns local SGD on the link and the machine of a result.

  Args:
    records: See `load`.
    link: Name of the link.
    method: A key of `METHODS`.

  Returns:
    Its record; None without one, or where the machines differ.
  """
  both = [records.get((link, name)) for name in (method, 'local_sgd')]
  wheres = {conditions(r['provenance']) if r else '' for r in both}
  return both[1] if len(wheres) == 1 else None


def tables(results: pathlib.Path = RESULTS) -> list[Table]:
  """Returns the tables that have results.

  Args:
    results: See `load`.
  """
  return [
    *_exchange_table(load('paper_shares', results)),
    *_learning_table(load('digits', results)),
  ]


def _exchange_table(records: Records) -> list[Table]:
  links = [x.name for x in LINKS if any(x.name == k for k, _ in records)]
  if not links:
    return []
  rows = []
  for method in METHODS:
    row = [NAMES[method]]
    for link in links:
      seconds = exchange_seconds(records, link, method)
      row.append('' if seconds is None else f'{seconds:.2f}')
      if link != 'no limit':
        base = beside(records, link, method)
        ratio = seconds / base['seconds_exchange'] if seconds and base else None
        row.append('' if ratio is None else f'{ratio:.2f}')
    counted = records.get(('no limit', method), {})
    if 'kernel_bytes' in counted:
      n = counted['rounds_counted']
      kernel, accounted = counted['kernel_bytes'], counted['accounted_bytes']
      row += [f'{kernel / n / 1e6:.2f}', f'{accounted / n / 1e6:.2f}']
      row.append(f'{kernel / accounted - 1:+.1%}')
    else:
      row += 3 * ['']
    if any(row[1:]):
      rows.append(row)
  head = ['method']
  for link in links:
    head.append(f'{link}: s')
    if link != 'no limit':
      head.append('of local SGD')
  head += ['MB a round, by the kernel', 'predicted', 'difference']
  some = next(iter(records.values()))
  steps = some['config']['local_steps']
  caption = (
    'Seconds of the exchanges of a round between four processes in network '
    f'namespaces (data parallel training exchanges in each of its {steps} '
    'steps), and '
    'the megabytes that all four sent in a round, without packet headers: as '
    'the kernel counted them, and as the accounting predicts them. The network '
    f'has {some["summary"]["params_total"] / 1e6:.1f} million parameters, '
    'divided between blocks and the shared part as in the paper. One run each, '
    f'on {_machines(records)}.'
  )
  return [Table(caption, some['command'], head, rows)]


def _machines(records: Records) -> str:
  found = {machine(record['provenance']) for record in records.values()}
  return ' and on '.join(sorted(found))


def _learning_table(records: Records) -> list[Table]:
  if not records:
    return []
  rows = []
  for (_, method), r in sorted(
    records.items(), key=lambda item: list(METHODS).index(item[0][1])
  ):
    reached = r['seconds_to_target']
    rows.append(
      [NAMES[method], f'{r["seconds_round"]:.2f}']
      + [f'{r["seconds_training"]:.1f}']
      + [f'{reached:.1f}' if reached else 'not reached']
      + [f'{r["test_accuracy"]:.1%}']
    )
  some = next(iter(records.values()))
  caption = (
    f'Handwritten digits on links of {some["link"]}: seconds of a round, of '
    f'{some["rounds"]} rounds, and of training until the first test that '
    f'reaches {some["target"]:.0%}; and the accuracy after the last round. One '
    f'run each, four processes on {_machines(records)}.'
  )
  head = ['method', 'a round', 'all', f'to {some["target"]:.0%}', 'accuracy']
  return [Table(caption, some['command'], head, rows)]


def figures(results: pathlib.Path = RESULTS) -> dict[str, Figure]:
  """Draws the seconds of a round by link: local training and exchange.

  Args:
    results: See `load`.
  """
  records = load('paper_shares', results)
  links = [
    x.name
    for x in LINKS
    if x.rate and any(x.name == link for link, _ in records)
  ]
  if not links:
    return {}
  figure = Figure(figsize=(1.5 + 4.2 * len(links), 3.2), layout='constrained')
  every = figure.subplots(
    1, len(links), sharex=True, sharey=True, squeeze=False
  )[0]
  # No protocol has these colours.
  local_colour, exchange_colour = '#bdbdbd', ENSEMBLE[0]
  # The bar of data parallel is so long that the others would vanish beside it.
  shown = [m for m in METHODS if m != 'data_parallel']
  for axes, link in zip(every, links, strict=True):
    methods = [m for m in shown if (link, m) in records]
    local = [records[link, m]['seconds_local'] for m in methods]
    exchange = [exchange_seconds(records, link, m) or 0 for m in methods]
    y = range(len(methods))
    axes.barh(y, local, color=local_colour, label='local training')
    axes.barh(y, exchange, left=local, color=exchange_colour, label='exchange')
    axes.set_yticks(y, [NAMES[m] for m in methods])
    axes.set_title(link, fontsize='medium')
    axes.set_xlabel('seconds of a round')
    plots.style_axes(axes, grid='x')
  every[0].invert_yaxis()
  handles, labels = every[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside lower center', ncols=2, frameon=False
  )
  return {'slow_links': figure}


def _drawn(results: pathlib.Path) -> dict[pathlib.Path, Figure]:
  folder = results / FOLDER.name
  return {folder / f'{k}.png': figure for k, figure in figures(results).items()}


def main() -> int:
  """Shows the results of a folder; returns the exit code."""
  return show_results(__doc__, tables, _drawn)


if __name__ == '__main__':
  sys.exit(main())
