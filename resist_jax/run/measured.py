"""What was measured of finished runs: its files, and the text that is printed.

A measure has the name of its test in front, as in `metrics.jsonl`.
"""

from collections.abc import Mapping, Sequence
import csv
import io
import math
import pathlib
import statistics
from typing import Any

from matplotlib.figure import Figure
import numpy as np

from resist_jax import folders
from resist_jax.errors import printable
from resist_jax.report import plots, tables
from resist_jax.run import workdir

Measured = Mapping[str, Any]  # What `evaluate_command.evaluate` returns.

_SHOWN = 5  # Pairs of classes that are printed.
# How the measures of an image classifier are called, in this order.
_HEADS = {'accuracy': 'as deployed', 'accuracy_paper': 'as in paper'}


def write(out: pathlib.Path, measured: Measured) -> None:
  """Writes JSON, CSV and pictures.

  Args:
    out: The folder, which is made.
    measured: What was measured of one run.
  """
  out.mkdir(parents=True, exist_ok=True)
  _remove_earlier(out)
  workdir.write_json(out / 'evaluation.json', _finite(measured))
  names = measured.get('class_names', ())
  for test, counts in measured.get('confusion', {}).items():
    rows = [[name, *row] for name, row in zip(names, counts, strict=True)]
    path = out / f'confusion_{test}.csv'
    workdir.replace_text(path, _csv([['', *names], *rows]))
    _write_png(path.with_suffix('.png'), plots.confusion_figure(counts, names))
  if not measured['depth']:
    return
  head = list(dict.fromkeys(name for row in measured['depth'] for name in row))
  rows = [[row.get(name) for name in head] for row in measured['depth']]
  workdir.replace_text(out / 'depth.csv', _csv([head, *rows]))
  _draw_depths(out, measured, measured['depth'])


def _remove_earlier(out: pathlib.Path) -> None:
  """Removes the files of an earlier evaluation, perhaps of other tests."""
  earlier = workdir.json_object(out / 'evaluation.json')
  tests = earlier.get('examples')
  if not isinstance(tests, dict):
    return
  (out / 'depth.csv').unlink(missing_ok=True)
  for test in tests:
    for name in (f'confusion_{test}.csv', f'confusion_{test}.png'):
      (out / name).unlink(missing_ok=True)
    (out / f'depth_{test}.png').unlink(missing_ok=True)


def write_together(out: pathlib.Path, found: Sequence[Measured]) -> None:
  """Writes what several runs have in common: means and deviations.

  Args:
    out: The folder, which exists.
    found: What was measured of each run.
  """
  spread = {
    name: {'mean': mean, 'deviation': deviation}
    for name, (mean, deviation) in _spread(found).items()
  }
  _remove_earlier(out)
  together = {
    'runs': [one['run'] for one in found],
    'examples': found[0]['examples'],
    'measures': spread,
  }
  workdir.write_json(out / 'evaluation.json', _finite(together))
  rows = [row for measured in found for row in measured['depth']]
  if rows:
    _draw_depths(out, found[0], rows)


def _draw_depths(
  out: pathlib.Path, measured: Measured, rows: Sequence[Mapping[str, Any]]
) -> None:
  for test in measured['examples']:
    figure = plots.depth_figure(rows, test, _shown_at_depths(measured, test))
    _write_png(out / f'depth_{test}.png', figure)


def _write_png(path: pathlib.Path, figure: Figure) -> None:
  with folders.replacing(path) as part:
    part.write_bytes(plots.render_png(figure))


def _csv(rows: Sequence[Sequence[Any]]) -> str:
  file = io.StringIO()
  csv.writer(file, lineterminator='\n').writerows(rows)
  return file.getvalue()


def _finite(value: Any) -> Any:
  """Returns JSON values, without numbers that JSON does not know."""
  if isinstance(value, Mapping):
    return {name: _finite(inner) for name, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(inner) for inner in value]
  return (
    None if isinstance(value, float) and not math.isfinite(value) else value
  )


def _named(measured: Measured, test: str) -> list[str]:
  """Returns what was measured of a test, without its name."""
  names, measures = measured['names'], measured['measures']
  return [name for name in names if f'{test}_{name}' in measures]


def _shown_at_depths(measured: Measured, test: str) -> list[str]:
  """Returns the measures that say how good a network of some depth is."""
  found = [name for name in _named(measured, test) if name in _HEADS]
  return found or ['loss']


def _head(measured: Measured, name: str) -> str:
  return _HEADS[name] if 'confusion' in measured else name


def _number(name: str, value: float | None) -> str:
  if value is None:
    return ''
  return f'{value:.2%}' if name in _HEADS else f'{value:.4g}'


def _spread(found: Sequence[Measured]) -> dict[str, tuple[float, float]]:
  """Returns mean and standard deviation of each measure over runs."""
  shared = set.intersection(*(set(one['measures']) for one in found))
  values = {
    name: [measured['measures'][name] for measured in found]
    for name in found[0]['measures']
    if name in shared
  }
  return {
    name: (statistics.mean(some), statistics.stdev(some))
    if all(map(math.isfinite, some))
    else (math.nan, math.nan)
    for name, some in values.items()
  }


def _columns(found: Sequence[Measured]) -> list[str]:
  """Returns the measures of all tests, each once."""
  first = found[0]
  named = (name for test in first['examples'] for name in _named(first, test))
  return list(dict.fromkeys(named))


def together(found: Sequence[Measured]) -> str:
  """Returns what is printed of several runs.

  Args:
    found: What was measured of each.
  """
  spread, names = _spread(found), _columns(found)
  rows = [['', 'runs', *(_head(found[0], name) for name in names)]]
  for test in found[0]['examples']:
    cells = []
    for name in names:
      both = spread.get(f'{test}_{name}', ())
      cells.append(' ± '.join(_number(name, value) for value in both))
    rows.append([test, str(len(found)), *cells])
  return tables.text_table(rows, right_from=1)


def text(measured: Measured) -> str:
  """Returns what is printed of one run.

  Args:
    measured: What was measured of it.
  """
  names = _columns([measured])
  what = 'images' if 'confusion' in measured else 'examples'
  rows = [['', what, *(_head(measured, name) for name in names)]]
  for test, count in measured['examples'].items():
    values = (measured['measures'].get(f'{test}_{name}') for name in names)
    cells = map(_number, names, values)
    rows.append([test, f'{count:,}', *cells])
  lines = [*_confused(measured), *_broken(measured)]
  parts = [tables.text_table(rows, right_from=1), '\n'.join(lines)]
  if measured['depth']:
    parts.append(tables.text_table(_depth_rows(measured), right_from=0))
  return '\n\n'.join(filter(None, parts))


def _confused(measured: Measured) -> list[str]:
  """Says which classes are most often taken for which other ones."""
  lines, names = [], measured.get('class_names', ())
  for test, counts in measured.get('confusion', {}).items():
    table = np.array(counts)
    wrong = table - np.diag(np.diag(table))
    order = np.argsort(-wrong, axis=None, kind='stable')[:_SHOWN]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    lines += [
      f'{test}: {wrong[a, b]} of {printable(names[a])} taken for '
      f'{printable(names[b])}'
      for a, b in pairs
      if wrong[a, b]
    ]
  return lines


def _broken(measured: Measured) -> list[str]:
  """Says which tests have examples whose loss is not finite."""
  return [
    f'{name}: not finite for {count:,} examples'
    for name, count in measured.get('broken', {}).items()
  ]


def _depth_rows(measured: Measured) -> list[list[str]]:
  """Returns a table of the mean at each depth, of one measure of each test."""
  depths = sorted({row['blocks'] for row in measured['depth']})
  head, columns = ['blocks kept', *map(str, depths)], []
  for test in measured['examples']:
    name = _shown_at_depths(measured, test)[0]
    what = '' if 'confusion' in measured else f'{name} of '
    for order in ('first', 'random'):
      cells = [f'{test}, {what}{order} blocks']
      for blocks in depths:
        found = [
          row[f'{test}_{name}']
          for row in measured['depth']
          if (row['order'], row['blocks']) == (order, blocks)
        ]
        cells.append(_number(name, np.mean(found)) if found else '')
      columns.append(cells)
  return [list(row) for row in zip(head, *columns, strict=True)]
