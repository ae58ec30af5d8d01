"""An experiment of the paper as a value, and the command that runs it."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
from typing import Any

from absl import logging
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import runs
from experiments.pictures import Picture
from experiments.runs import RESULTS, conditions, load_card, machine, run
from experiments.table import Table
from resist_jax import folders
from resist_jax.errors import (
  ConfigError,
  NonFiniteError,
  Parser,
  out_of_memory,
  refused,
)
from resist_jax.run import program
from resist_jax.run.config import differences, get_config
from resist_jax.run.interrupt import Interrupt, Interrupted

SCALES = ('smoke', 'cpu', 'paper')
Record = dict[str, Any]
Drawn = Picture | Figure | None  # None without results.


@dataclasses.dataclass(frozen=True)
class Cell:
  """A setting of an experiment, which is trained once for each seed.

  Attributes:
    name: Name of its result files, without the seed.
    card: Name of a card, one of `resist_jax.run.cards.names`.
    argument: Words for the card, without the scale.
    overrides: Values of other fields, by dotted name.
    home: Name of the experiment in whose folder its results are kept, if
      several experiments share them; empty for the experiment that lists it.
    timed: Whether only its seconds count, for which the machine must be quiet.
  """

  name: str
  card: str
  argument: str = ''
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  home: str = ''
  timed: bool = False

  def config(self, scale: str) -> ConfigDict:
    """Returns the config, with the seed of the card."""
    words = [self.argument, scale if scale != 'paper' else '']
    argument = ','.join(filter(None, words))
    return load_card(self.card, argument, dict(self.overrides))


class Results:
  """The result files of an experiment at a scale."""

  def __init__(self, name: str, scale: str, root: pathlib.Path = RESULTS):
    """Names the files without reading them.

    Args:
      name: Name of the experiment.
      scale: See `SCALES`.
      root: The folder that holds the results of all experiments.
    """
    self.name, self.scale, self._root = name, scale, root

  def folder(self, cell: Cell | None = None) -> pathlib.Path:
    """Returns the folder of a cell's results, or of the experiment's own."""
    home = cell.home if cell else ''
    return self._root / (home or self.name) / self.scale

  def folders(self) -> list[pathlib.Path]:
    """Returns the folders of all experiments at this scale."""
    return sorted(self._root.glob(f'*/{self.scale}'))

  def target(self, cell: Cell, seed: int) -> pathlib.Path:
    """Returns the result file of a cell."""
    return self.folder(cell) / f'{cell.name}_seed{seed}.json'

  def of(self, cell: Cell) -> list[Record]:
    """Returns the results of a cell, one for each seed that has been run.

    A copy of a result under another name is no further seed.

    Raises:
      ConfigError: If a file is damaged.
    """
    return runs.of_seeds(self.folder(cell), cell.name)

  def values(self, cell: Cell, field: str) -> list[float]:
    """Returns a field of the summaries, for each seed that has been run."""
    return [record['summary'][field] for record in self.of(cell)]

  def percent(self, cell: Cell, field: str = 'test_accuracy') -> str:
    """Returns mean and deviation of an accuracy in %, empty without results."""
    return spread([100 * value for value in self.values(cell, field)])


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A table or figure of the paper.

  Attributes:
    name: Name of its module and of its folder of results.
    title: Title for readers.
    cells: Returns what is trained at a scale.
    tables: Returns tables of the results; none without results.
    figures: Returns figures of the results by name of the file, without its
      suffix; None for a figure without results. By default there are none.
    train: Trains a config, writes the result file and deletes the workdir:
      `train(config, target, folder)`.
    scales: At which scales it is run.
    beside: Returns the cells of other experiments that its tables show, too.
  """

  name: str
  title: str
  cells: Callable[[str], Sequence[Cell]]
  tables: Callable[[Results], Sequence[Table]]
  figures: Callable[[Results], Mapping[str, Drawn]] = lambda results: {}
  train: Callable[[ConfigDict, pathlib.Path, pathlib.Path], None] = run
  scales: Sequence[str] = SCALES
  beside: Callable[[str], Sequence[Cell]] = lambda scale: ()

  @property
  def command(self) -> str:
    """The command that runs the experiment."""
    return f'python -m experiments.{self.name}'

  @property
  def default_scale(self) -> str:
    """The scale of the command without options."""
    return 'cpu' if 'cpu' in self.scales else self.scales[-1]

  def made_by(self, scale: str, records: Sequence[Record]) -> str:
    """Returns the command that makes results again.

    Args:
      scale: Scale of the results.
      records: The results.

    Returns:
      The command. `FOLDER` stands for that of the prepared data sets.
    """
    configs = [record['config'] for record in records]
    seeds = 1 + max(
      (record['summary']['seed'] for record in records), default=0
    )
    dtypes = {c.get('model', {}).get('dtype', 'float32') for c in configs}
    data = {cell.config(scale).data.name for cell in self.cells(scale)}
    words = [self.command]
    if scale != self.default_scale:
      words.append(f'--scale={scale}')
    if seeds > 1:
      words.append(f'--seeds={seeds}')
    words += [f'--dtype={name}' for name in sorted(dtypes - {'float32'})]
    if data - {'digits'}:
      words.append('--data_dir=FOLDER')
    return ' '.join(words)

  def pictures(self, results: Results) -> dict[str, Picture | Figure]:
    """Returns the pictures that have results."""
    drawn = self.figures(results)
    return {name: figure for name, figure in drawn.items() if figure}


def spread(values: Sequence[float], form: str = '.1f') -> str:
  """Formats the mean and, for several values, the standard deviation.

  Args:
    values: One value for each seed.
    form: How the mean is written.

  Returns:
    Text, empty without values.

  >>> spread([90.0, 92.0]), spread([90.0]), spread([])
  ('91.0 ± 1.4', '90.0', '')
  """
  if not values:
    return ''
  mean = f'{statistics.mean(values):{form}}'
  if len(values) == 1:
    return mean
  return f'{mean} ± {statistics.stdev(values):.1f}'


def of_runs(
  records: Sequence[Record], shown: str = 'Mean and standard deviation'
) -> str:
  """Returns what the reader of a table must know about its runs.

  Args:
    records: Records of all its runs.
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
    records: Results of a cell; those of busy machines are ignored.

  Returns:
    Seconds, or None without results.
  """
  values = [r['summary']['seconds_training'] for r in quiet(records)]
  return statistics.median(values) if values else None


def quiet(records: Sequence[Record]) -> list[Record]:
  """Returns the results of machines that did no other work meanwhile."""
  return [r for r in records if not r['provenance'].get('busy')]


def on_each_machine(
  runs: Mapping[str, Sequence[Record]],
) -> dict[str, dict[str, list[Record]]]:
  """Divides results by the machine, whose seconds alone can be compared.

  Args:
    runs: Results by any names; those of busy machines are ignored.

  Returns:
    For each machine that has all of these names, its results by name.
  """
  found = {name: quiet(records) for name, records in runs.items()}
  machines = {
    conditions(r['provenance']) for some in found.values() for r in some
  }
  divided = {
    where: {
      name: [r for r in records if conditions(r['provenance']) == where]
      for name, records in found.items()
    }
    for where in sorted(machines)
  }
  return {where: here for where, here in divided.items() if all(here.values())}


def named(cells: Sequence[Cell], only: str) -> list[Cell]:
  """Returns the cells whose name is or, if none is, contains a text.

  Args:
    cells: The cells.
    only: The text.

  >>> cells = [Cell(name, 'digits') for name in ('resist_s4', 'resist_s4_he')]
  >>> [cell.name for cell in named(cells, 'resist_s4')]
  ['resist_s4']
  >>> [cell.name for cell in named(cells, 'resist')]
  ['resist_s4', 'resist_s4_he']
  """
  exact = [cell for cell in cells if cell.name == only]
  return exact or [cell for cell in cells if only in cell.name]


def jobs(
  experiment: Experiment, results: Results, seeds: int, only: str, busy: bool
) -> Iterator[tuple[Cell, int, pathlib.Path]]:
  """Yields what has not been run, seed by seed: cell, seed and result file."""
  for number in range(seeds):
    for cell in named(experiment.cells(results.scale), only):
      if busy and cell.timed:
        continue
      seed = _timing(results, cell, number) if cell.timed else number
      target = results.target(cell, seed)
      if not target.exists():
        yield cell, seed, target


def _timing(results: Results, cell: Cell, number: int) -> int:
  """Returns the seed of a timing, of which each machine makes its own."""
  records = results.of(cell)
  if not records:
    return 0
  here = _timed_by(runs.here())
  seeds = [
    record['summary']['seed']
    for record in quiet(records)
    if _timed_by(record['provenance']) == here
  ]
  if number < len(seeds):
    return seeds[number]
  taken = {record['summary']['seed'] for record in records}
  return next(seed for seed in itertools.count() if seed not in taken)


def _timed_by(provenance: Mapping[str, Any]) -> tuple[str, Any]:
  return machine(provenance, count=False), provenance.get('environment', {})


def show(experiment: Experiment, results: Results) -> None:
  """Prints the tables, and writes tables and figures beside the results."""
  tables, folder = experiment.tables(results), results.folder()
  if not tables:
    print(f'no table yet: too few results in {folder}')
    return
  for table in tables:
    print(table.caption, table.text(), sep='\n', end='\n\n')
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'table.md').write_text('\n'.join(t.markdown() for t in tables))
    for name, picture in experiment.pictures(results).items():
      figure = picture.figure() if isinstance(picture, Picture) else picture
      figure.savefig(folder / f'{name}.png', dpi=150)
  except OSError as error:  # Such as results that may only be read.
    print(f'tables and figures are not written: {error}', file=sys.stderr)


def _parser(experiment: Experiment, doc: str | None) -> Parser:
  parser = Parser(
    prog=experiment.command, description=(doc or '').split('\n')[0]
  )
  add = parser.add_argument
  add('--scale', choices=experiment.scales, default=experiment.default_scale)
  add('--seeds', type=int, default=1, help='number of seeds, which start at 0')
  add('--data_dir', default='', help='folder of prepared TFDS data sets')
  add(
    '--runs',
    default='runs',
    type=folders.argument,
    help='folder for the workdirs of unfinished runs',
  )
  add(
    '--results',
    type=folders.argument,
    default=RESULTS,
    help='folder of results, where what has a result is not trained again',
  )
  add(
    '--only',
    default='',
    help='train only the cell of this name, or those whose name contains it',
  )
  add('--dtype', choices=('float32', 'bfloat16'), default='float32')
  add(
    '--busy',
    action='store_true',
    help='other work runs on the machine, so no table shows these seconds',
  )
  add('--show', action='store_true', help='train nothing, show all results')
  return parser


def _refusal(
  experiment: Experiment, results: Results, options: argparse.Namespace
) -> str:
  """Returns what is wrong with the options; empty if nothing is."""
  if options.seeds < 1:
    return f'--seeds is {options.seeds}; it must be at least 1.'
  cells = experiment.cells(options.scale)
  chosen = named(cells, options.only)
  if not chosen:
    names = ', '.join(cell.name for cell in cells)
    return (
      f'--only is {options.only!r}, but no name at this scale contains it: '
      f'{names or "there are no runs"}.'
    )
  if options.busy and all(cell.timed for cell in chosen):
    return (
      '--busy is set, but these runs only measure seconds, for which the '
      'machine must do nothing else: leave it out.'
    )
  if options.show:
    return ''
  shown = [*cells, *experiment.beside(options.scale)]
  return _other_dtype(results, options.dtype) or _other_config(results, shown)


def _other_dtype(results: Results, dtype: str) -> str:
  """Says which results would be compared with those of another dtype."""
  # Those of all experiments: some show results of others together with theirs.
  for folder in results.folders():
    for path in runs.paths_of_seeds(folder):
      config = runs.read(path).get('config', {})
      model = config.get('model', {}) if isinstance(config, dict) else {}
      found = model.get('dtype', dtype)
      if found != dtype:
        name = path.stem.rpartition('_seed')[0]
        return (
          f'--dtype is {dtype}, but there are results of {name} in {found}: '
          f'set --dtype={found}, or name another folder with --results.'
        )
  return ''


def _other_config(results: Results, cells: Sequence[Cell]) -> str:
  """Says which results are of settings that a card does not have any more."""
  for cell in cells:
    for record in results.of(cell):
      for name, (now, then) in changed(cell, results.scale, record).items():
        return (
          f'{cell.name} has {name} {now!r}, but there are results of it with '
          f'{then!r}: name another folder with --results.'
        )
  return ''


def as_json(config: ConfigDict) -> dict[str, Any]:
  """Returns a config as a result file holds it."""
  return json.loads(json.dumps(config.to_dict()))


def changed(
  cell: Cell, scale: str, record: Record
) -> dict[str, tuple[Any, Any]]:
  """Returns the fields of a cell that have other values in a result of it.

  Args:
    cell: The cell.
    scale: Scale of the result.
    record: The result.

  Returns:
    By name, the value now and then. What every run may choose is left out:
    `data.dir`, `seed` and `model.dtype`. A field that came later has its
    default then.
  """
  then = record.get('config', {})
  found = differences(as_json(cell.config(scale)), then)
  defaults = as_json(get_config())
  later = differences(defaults, then)
  return {
    name: (now, old)
    for name, (now, old) in found.items()
    if name not in ('data.dir', 'seed', 'model.dtype')
    and not (old is None and later.get(name, (None,))[0] == now)
  }


def main(
  experiment: Experiment, doc: str | None, args: Sequence[str] | None = None
) -> None:
  """Trains the cells without results, then shows all results.

  Args:
    experiment: The experiment.
    doc: The docstring of its module, whose first line becomes the help.
    args: The command line; that of this process if None.
  """
  parser = _parser(experiment, doc)
  options = parser.parse_args(args)
  results = Results(experiment.name, options.scale, options.results)
  logging.set_verbosity(logging.WARNING)  # orbax reports every step it takes.
  diverged = False
  try:
    if wrong := _refusal(experiment, results, options):
      parser.error(wrong)
    if not options.show:
      diverged = _train_all(experiment, results, options)
    show(experiment, results)
  except ConfigError as error:  # A result file is damaged.
    raise SystemExit(refused(error)) from None
  if diverged:
    raise SystemExit(1)


def _train_all(
  experiment: Experiment, results: Results, options: argparse.Namespace
) -> bool:
  """Trains the cells without results; returns whether one has diverged."""
  diverged, scale = False, options.scale
  todo = jobs(experiment, results, options.seeds, options.only, options.busy)
  with Interrupt() as interrupt:
    for cell, seed, target in todo:
      config = cell.config(scale)
      config.seed, config.data.dir = seed, options.data_dir
      config.model.dtype = options.dtype
      # Experiments that share a run find what another one has begun.
      home = cell.home or experiment.name
      folder = options.runs / home / scale / target.stem
      try:
        folders.check_writable(target.parent, 'results')
        runs.begin_run(folder, options.busy)
        experiment.train(config, target, folder)
      except NonFiniteError as error:  # It would diverge again; others may not.
        _say(target, str(error), 1)
        diverged = True
      except program.MENDABLE as error:
        raise SystemExit(
          _say(target, *program.explain(error, str(folder)))
        ) from None
      except Interrupted as stop:
        print(f'{target.stem}: {stop}', file=sys.stderr)
      except Exception as error:
        remedy = 'take a device with more, or --dtype=bfloat16 with --results.'
        if not (line := out_of_memory(error, remedy)):
          raise
        raise SystemExit(_say(target, line, 1)) from None
      # A signal in the last round does not stop the run, but it stops here.
      if interrupt.signum:
        raise SystemExit(128 + interrupt.signum)
  return diverged


def _say(target: pathlib.Path, line: str, code: int) -> int:
  """Says why a run has ended; returns the exit code."""
  print(f'error: {target.stem}: {line}', file=sys.stderr)
  return code
