"""The command that evaluates a finished run: words, files and a table."""

import argparse
from collections.abc import Mapping, Sequence
import csv
import dataclasses
import io
import pathlib
import statistics
import sys
from typing import Any

import jax
import numpy as np

from resist_jax import data, folders
from resist_jax.errors import ConfigError, refused
from resist_jax.report import plots, tables
from resist_jax.run import assess, depth, setup, trained, workdir
from resist_jax.run.config import cut_chains
from resist_jax.run.trained import Trained

_SHOWN = 5  # Pairs of classes that are printed.


def main(args: Sequence[str] | None = None) -> int:
  """Evaluates a run, writes what was measured, and prints the accuracies.

  Args:
    args: The command line; that of this process if None.

  Returns:
    The exit code: 0, or 2 if the input is bad.
  """
  options = _parser().parse_args(args)
  try:
    out = folders.resolve(
      options.out or pathlib.Path(options.run) / 'evaluation', '--out'
    )
    workdir.check_writable(out, '--out')
    runs = trained.folders_of(options.run)
    found = []
    for run in runs:
      found.append(evaluate(trained.load(run), options))
      _write(out / run.name if runs[1:] else out, found[-1])
    if runs[1:]:
      _write_together(out, found)
  except (ConfigError, OSError) as error:
    return refused(error)
  print(_together(found) if found[1:] else _text(found[0]))
  print(f'written to {out}')
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    'python -m resist_jax.evaluate',
    description='Tests the network of a finished run: both kinds of norm '
    'statistics, classes, and shallower networks inside it.',
  )
  parser.add_argument(
    'run', metavar='RUN',
    help='workdir of a finished run, or a folder of several',
  )  # fmt: skip
  parser.add_argument(
    '--data', default='',
    help='test on this set instead, named as in --config.data.name',
  )  # fmt: skip
  parser.add_argument(
    '--data_dir', default=None, help='the folder of prepared TFDS sets'
  )
  parser.add_argument(
    '--depths', default='some',
    help='blocks to keep, such as 0,2,8, or some (the default), or none',
  )  # fmt: skip
  parser.add_argument(
    '--draws', type=int, default=3, help='random choices of blocks for a depth'
  )
  parser.add_argument(
    '--depth_images', type=int, default=2000,
    help='images of each test that shallower networks are tested on',
  )  # fmt: skip
  parser.add_argument(
    '--out', help='folder to write to (default: RUN/evaluation)'
  )
  return parser


def evaluate(run: Trained, options: argparse.Namespace) -> dict[str, Any]:
  """Measures how good a run is.

  Args:
    run: The run.
    options: Options of the command line.

  Returns:
    `accuracies`, `confusion` by test, and `depth`: a row for each shallower
    network. JSON values.

  Raises:
    ConfigError: If the data are not there, or an option does not fit.
  """
  lengths = _lengths(run)
  depths = _depths(options.depths, max(lengths.values(), default=0))
  dataset, whole = _dataset(run, options)
  fields = run.config.evaluation
  images = fields.statistics_images if whole else 0
  size = fields.batch_size
  test = assess.evaluator(run.model, dataset, size, images)
  found = {
    'run': str(run.folder),
    'data': options.data or run.config.data.name,
    'class_names': list(run.model.class_names),
    'accuracies': test(None).measures,
    'confusion': {
      name: assess.confusion(run.model, split, size).tolist()
      for name, split in dataset.tests.items()
    },
    'depth': [],
  }
  if whole and depths:
    some = {
      name: split.take(data.sample(len(split), options.depth_images))
      for name, split in dataset.tests.items()
    }
    dataset = dataclasses.replace(dataset, tests=some)
    test = dataclasses.replace(test, dataset=dataset)
    rows = assess.by_depth(test, run.model, lengths, depths, options.draws)
    found['depth'] = [
      {'order': row.order, 'blocks': row.blocks, 'draw': row.draw}
      | row.accuracies
      for row in rows
    ]
  return found


def _lengths(run: Trained) -> dict[str, int]:
  """Returns L of each chain of blocks that the run's config cuts."""
  params = run.model.variables['params']
  return {
    name: len(jax.tree.leaves(params[name])[0])
    for name in sorted(cut_chains(run.config))
    if name in params and not name.endswith('_branch')
  }


def _depths(words: str, longest: int) -> list[int]:
  """Returns the depths that a text asks for."""
  if words == 'none' or not longest:
    return []
  if words == 'some':
    return depth.choose(longest)
  try:
    depths = sorted(set(map(int, words.split(','))))
  except ValueError:
    depths = [-1]
  if not 0 <= depths[0] <= depths[-1] <= longest:
    raise ConfigError(
      f'--depths is {words!r}: give numbers from 0 to {longest}, the blocks of '
      'the longest chain that is cut, or some, or none.'
    )
  return depths


def _dataset(
  run: Trained, options: argparse.Namespace
) -> tuple[data.Dataset, bool]:
  """Returns the sets to test on, and whether the training images are there."""
  config, model = run.config, run.model
  if options.data_dir is not None:
    config.data.dir = options.data_dir
  tests = {}
  if options.data:
    tests[data.test_key(options.data)] = data.load_test(
      options.data,
      model.class_names,
      model.image_shape,
      model.resized,
      config.data.dir,
    )
  try:
    dataset = setup.load_data(config, copies=2)
  except ConfigError as error:
    if not tests:
      raise ConfigError(
        f'the data of the run cannot be read ({error}) Name a set to test on '
        'with --data, or the folder of TFDS sets with --data_dir.'
      ) from error
    print(
      f'only the whole network is tested, with the statistics that it has: the '
      f'training images cannot be read ({error})',
      file=sys.stderr,
    )
    split = next(iter(tests.values()))
    names = model.class_names
    return data.Dataset('', split, tests, names, model.mean, model.std), False
  return dataclasses.replace(dataset, tests=tests or dataset.tests), True


def _write(out: pathlib.Path, measured: Mapping[str, Any]) -> None:
  """Writes JSON, CSV and pictures."""
  out.mkdir(parents=True, exist_ok=True)
  workdir.write_json(out / 'evaluation.json', measured)
  names = measured['class_names']
  for test, counts in measured['confusion'].items():
    rows = [[name, *row] for name, row in zip(names, counts, strict=True)]
    path = out / f'confusion_{test}.csv'
    workdir.replace_text(path, _csv([['', *names], *rows]))
    figure = plots.confusion_figure(counts, names)
    path.with_suffix('.png').write_bytes(plots.render_png(figure))
  if not measured['depth']:
    return
  head = list(measured['depth'][0])
  rows = [[row[name] for name in head] for row in measured['depth']]
  workdir.replace_text(out / 'depth.csv', _csv([head, *rows]))
  for test in measured['confusion']:
    figure = plots.depth_figure(measured['depth'], test)
    (out / f'depth_{test}.png').write_bytes(plots.render_png(figure))


def _write_together(
  out: pathlib.Path, found: Sequence[Mapping[str, Any]]
) -> None:
  """Writes what several runs have in common: means and deviations."""
  spread = {
    name: {'mean': mean, 'deviation': deviation}
    for name, (mean, deviation) in _spread(found).items()
  }
  depth_rows = [row for measured in found for row in measured['depth']]
  workdir.write_json(
    out / 'evaluation.json',
    {'runs': [measured['run'] for measured in found], 'accuracies': spread},
  )
  for test in found[0]['confusion'] if depth_rows else ():
    figure = plots.depth_figure(depth_rows, test)
    (out / f'depth_{test}.png').write_bytes(plots.render_png(figure))


def _spread(
  found: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[float, float]]:
  """Returns mean and standard deviation of each accuracy over runs."""
  shared = set.intersection(*(set(m['accuracies']) for m in found))
  values = {
    name: [measured['accuracies'][name] for measured in found]
    for name in sorted(shared)
  }
  return {
    name: (statistics.mean(some), statistics.stdev(some))
    for name, some in values.items()
  }


def _together(found: Sequence[Mapping[str, Any]]) -> str:
  """Returns what is printed of several runs."""
  spread = _spread(found)
  rows = [['', 'runs', 'as deployed', 'as in paper']]
  for test in found[0]['confusion']:
    cells = []
    for end in _ENDS:
      mean, deviation = spread.get(f'{test}_accuracy{end}', (None, None))
      cells.append('' if mean is None else f'{mean:.2%} ± {deviation:.2%}')
    rows.append([test, str(len(found)), *cells])
  return tables.text_table(rows, right_from=1)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
  file = io.StringIO()
  csv.writer(file, lineterminator='\n').writerows(rows)
  return file.getvalue()


def _text(measured: Mapping[str, Any]) -> str:
  """Returns what is printed."""
  accuracies, names = measured['accuracies'], measured['class_names']
  rows = [['', 'images', 'as deployed', 'as in paper']]
  lines = []
  for test, counts in measured['confusion'].items():
    found = (f'{accuracies[f"{test}_accuracy{end}"]:.2%}' for end in _ENDS)
    table = np.array(counts)
    rows.append([test, f'{table.sum():,}', *found])
    wrong = table - np.diag(np.diag(table))
    order = np.argsort(-wrong, axis=None, kind='stable')[:_SHOWN]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    lines += [
      f'{test}: {wrong[a, b]} of {names[a]} taken for {names[b]}'
      for a, b in pairs
      if wrong[a, b]
    ]
  parts = [tables.text_table(rows, right_from=1), '\n'.join(lines)]
  if measured['depth']:
    parts.append(tables.text_table(_depth_rows(measured), right_from=0))
  return '\n\n'.join(filter(None, parts))


_ENDS = ('', '_paper')


def _depth_rows(measured: Mapping[str, Any]) -> list[list[str]]:
  """Returns a table of the mean accuracy at each depth, as deployed."""
  depths = sorted({row['blocks'] for row in measured['depth']})
  head, columns = ['blocks kept', *map(str, depths)], []
  for test in measured['confusion']:
    for order in ('first', 'random'):
      cells = [f'{test}, {order} blocks']
      for blocks in depths:
        found = [
          row[f'{test}_accuracy']
          for row in measured['depth']
          if (row['order'], row['blocks']) == (order, blocks)
        ]
        cells.append(f'{np.mean(found):.2%}' if found else '')
      columns.append(cells)
  return [list(row) for row in zip(head, *columns, strict=True)]
