"""An experiment of the paper as a value, and the command that runs it."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any

from absl import logging
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments.runs import RESULTS, load_card, mark_busy, run
from experiments.table import Table
from resist_jax.errors import ConfigError
from resist_jax.run.interrupt import Interrupt, Interrupted
from resist_jax.run.train import NonFiniteError

SCALES = ('smoke', 'cpu', 'paper')
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
  """What is trained once for each seed.

  Attributes:
    name: Of its result files.
    card: One of `resist_jax.run.cards.names`.
    argument: Words for the card, without the scale.
    overrides: Values by dotted name of the field.
    home: Name of the experiment whose results hold it, where several need it;
      empty for the experiment that lists it.
  """

  name: str
  card: str
  argument: str = ''
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  home: str = ''

  def config(self, scale: str) -> ConfigDict:
    """Returns the config of seed 0, as the card gives it."""
    words = [self.argument, scale if scale != 'paper' else '']
    argument = ','.join(filter(None, words))
    return load_card(self.card, argument, dict(self.overrides))


class Results:
  """The result files of an experiment at a scale."""

  def __init__(self, name: str, scale: str, root: pathlib.Path = RESULTS):
    """Reads nothing yet; `root` is the folder of all experiments."""
    self.name, self.scale, self._root = name, scale, root

  def folder(self, cell: Cell | None = None) -> pathlib.Path:
    """Returns where results are, those of a cell or the experiment's own."""
    home = cell.home if cell else ''
    return self._root / (home or self.name) / self.scale

  def target(self, cell: Cell, seed: int) -> pathlib.Path:
    """Returns the result file of a cell."""
    return self.folder(cell) / f'{cell.name}_seed{seed}.json'

  def of(self, cell: Cell) -> list[Record]:
    """Returns the results of a cell, a record for each seed that is there."""
    paths = self.folder(cell).glob(f'{cell.name}_seed*.json')
    return [json.loads(path.read_text()) for path in sorted(paths)]

  def values(self, cell: Cell, field: str) -> list[float]:
    """Returns a number of the summaries, for each seed that is there."""
    return [record['summary'][field] for record in self.of(cell)]

  def percent(self, cell: Cell, field: str = 'test_accuracy') -> str:
    """Returns the mean and deviation of an accuracy; empty where none is."""
    return spread([100 * value for value in self.values(cell, field)])


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A table or figure of the paper.

  Attributes:
    name: Of its folder of results, and its command.
    title: For readers.
    cells: What it trains at a scale.
    tables: What the results say; none where there are none.
    figures: Pictures of them by name of the file, without its suffix; None
      where there is nothing to see.
    train: Trains a config into a result file, in a folder for the time being.
  """

  name: str
  title: str
  cells: Callable[[str], Sequence[Cell]]
  tables: Callable[[Results], Sequence[Table]]
  figures: Callable[[Results], Mapping[str, Figure | None]]
  train: Callable[[ConfigDict, pathlib.Path, pathlib.Path], None] = run

  @property
  def command(self) -> str:
    """What a reader types."""
    return f'python -m experiments.{self.name}'

  def pictures(self, results: Results) -> dict[str, Figure]:
    """Returns the pictures that there are."""
    drawn = self.figures(results)
    return {name: figure for name, figure in drawn.items() if figure}


def spread(values: Sequence[float]) -> str:
  """Returns the mean and, of several values, the standard deviation.

  Args:
    values: Of the seeds.

  Returns:
    Text; empty without values.

  >>> spread([90.0, 92.0]), spread([90.0]), spread([])
  ('91.0 ± 1.4', '90.0', '')
  """
  if not values:
    return ''
  mean = f'{statistics.mean(values):.1f}'
  if len(values) == 1:
    return mean
  return f'{mean} ± {statistics.stdev(values):.1f}'


def of_runs(
  records: Sequence[Record], shown: str = 'Mean and standard deviation'
) -> str:
  """Returns what the reader of a table must know about its runs.

  Args:
    records: Of all of its runs.
    shown: What the table shows of several seeds.

  Returns:
    Seeds, machine and versions.
  """
  if not records:
    return ''
  seeds = {record['summary']['seed'] for record in records}
  count = 'One seed'
  if len(seeds) > 1:
    count = f'{shown} of up to {len(seeds)} seeds'
  kinds = sorted({machine(record['provenance']) for record in records})
  return f'{count}. Measured on {" and on ".join(kinds)}.'


def seconds(records: Sequence[Record]) -> float | None:
  """Returns the median seconds of training.

  Args:
    records: Of a cell; those of a busy machine do not count.

  Returns:
    Seconds; None where there are none.
  """
  found = [r['summary']['seconds_training'] for r in quiet(records)]
  return statistics.median(found) if found else None


def quiet(records: Sequence[Record]) -> list[Record]:
  """Returns the results whose seconds mean something."""
  return [r for r in records if not r['provenance'].get('busy')]


def machine(provenance: Mapping[str, Any]) -> str:
  """Returns the machine and the version of JAX, for readers."""
  device = provenance['device'].split(' x ')[1]
  if device == 'cpu':
    device = f'{provenance["cores"]} cores of {provenance["processor"]}'
  return f'{device}, JAX {provenance["versions"]["jax"]}'


def jobs(
  experiment: Experiment, results: Results, seeds: int, only: str
) -> Iterator[tuple[Cell, int, pathlib.Path]]:
  """Yields what is not done yet, seed by seed: cell, seed and result file."""
  for seed in range(seeds):
    for cell in experiment.cells(results.scale):
      target = results.target(cell, seed)
      if only in cell.name and not target.exists():
        yield cell, seed, target


def show(experiment: Experiment, results: Results) -> None:
  """Prints the tables, and writes them and the pictures beside the results."""
  tables = experiment.tables(results)
  if not tables:
    print(f'no table yet: too few results in {results.folder()}')
    return
  folder = results.folder()
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'table.md').write_text('\n'.join(t.markdown() for t in tables))
  for name, figure in experiment.pictures(results).items():
    figure.savefig(folder / f'{name}.png', dpi=150)
  for table in tables:
    print(table.caption, table.text(), sep='\n', end='\n\n')


def main(
  experiment: Experiment, doc: str | None, args: Sequence[str] | None = None
) -> None:
  """Trains what is missing and shows what is there.

  Args:
    experiment: What to do.
    doc: The module's docstring; its first line is the help.
    args: Of the command line, if not this process's own.
  """
  parser = argparse.ArgumentParser(
    prog=experiment.command, description=(doc or '').split('\n')[0]
  )
  parser.add_argument('--scale', choices=SCALES, default='cpu')
  parser.add_argument('--seeds', type=int, default=1, help='how many, from 0')
  parser.add_argument('--data_dir', default='', help='of prepared TFDS sets')
  parser.add_argument('--runs', default='runs', help='for unfinished runs')
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  parser.add_argument('--only', default='', help='cells whose name has this')
  parser.add_argument(
    '--dtype', choices=('float32', 'bfloat16'), default='float32'
  )
  parser.add_argument(
    '--busy',
    action='store_true',
    help='other work runs on the machine: no table shows seconds of these runs',
  )
  parser.add_argument(
    '--show', action='store_true', help='train nothing, show what is there'
  )
  options = parser.parse_args(args)
  if options.seeds < 1:
    parser.error(f'--seeds is {options.seeds}; it must be at least 1.')
  names = [cell.name for cell in experiment.cells(options.scale)]
  if not any(options.only in name for name in names):
    parser.error(
      f'--only is {options.only!r}, which is in no name at this scale: '
      f'{", ".join(names) or "there are no runs"}.'
    )
  logging.set_verbosity(logging.WARNING)  # orbax reports every step it takes.
  scale = options.scale
  results = Results(experiment.name, scale, options.results)
  todo = jobs(experiment, results, options.seeds, options.only)
  if options.show:
    todo = iter(())
  with Interrupt() as interrupt:
    for cell, seed, target in todo:
      config = cell.config(scale)
      config.seed, config.data.dir = seed, options.data_dir
      config.model.dtype = options.dtype
      folder = (
        pathlib.Path(options.runs) / experiment.name / scale / target.stem
      )
      try:
        experiment.train(config, target, folder)
        if options.busy:
          mark_busy(target)
      except ConfigError as error:
        parser.exit(2, f'error: {error}\n')
      except NonFiniteError as error:
        parser.exit(1, f'error: {target.stem}: {error}\n')
      except Interrupted as stop:
        print(f'{target.stem}: {stop}', file=sys.stderr)
      if interrupt.signum:  # In a last round, too, which the run completed.
        raise SystemExit(128 + interrupt.signum)
  show(experiment, results)
