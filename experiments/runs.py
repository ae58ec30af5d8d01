"""Result files with their provenance, and the training runs that make them."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import jax
import ml_collections

from resist_jax import folders, report
from resist_jax.errors import ConfigError, Parser, one_line, refused
from resist_jax.run import cards, train, workdir
from resist_jax.run.lock import locked

# Files in the workdir of a run: whether its seconds count, and where it began
# and went on.
_BUSY, _BEGUN = 'busy', 'begun.json'
RESULTS = pathlib.Path(__file__).parent / 'results'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
# The fields of a round that a result file keeps.
CURVE = ('round', 'rounds', 'protocol', 'train_loss', 'train_accuracy',
         'test_accuracy', 'test_accuracy_paper', 'test_accuracy_unaveraged',
         'seconds_training', 'bytes_total', 'wire_bytes_total',
         'slots', 'num_blocks', 'update_norms', 'left_out')  # fmt: skip


def load_card(
  card: str, argument: str, overrides: dict[str, Any]
) -> ml_collections.ConfigDict:
  """Returns the config of an experiment card.

  Args:
    card: Name of a card, one of `cards.names`.
    argument: Words for the card, separated by commas.
    overrides: Values of other fields, by dotted name.

  Returns:
    The config.
  """
  config = cards.load(f'{card}:{argument}')
  config.update_from_flattened_dict(overrides)
  return config


def run(
  config: ml_collections.ConfigDict,
  target: pathlib.Path,
  folder: pathlib.Path,
) -> None:
  """Trains a run, or resumes it, and writes its result file.

  Args:
    config: Config of the run.
    target: The result file. If it exists, nothing is done.
    folder: Workdir of the run, from which a stopped run resumes. It is deleted
      after the result file is written.

  Raises:
    ConfigError: If the config, the data or the workdir cannot be used.
    NonFiniteError: If training diverges.
    interrupt.Interrupted: On SIGTERM or SIGINT, after a checkpoint.
  """
  if target.exists():
    return
  begin(target)
  summary = train.train(config, str(folder))
  rows = report.read_rows(folder / 'metrics.jsonl')
  kind = summary['device'].split(',')[0]
  record = {
    'provenance': provenance(f'{summary["num_devices"]} x {kind}')
    | history(folder),
    'config': json.loads((folder / 'config.json').read_text()),
    'summary': summary,
    'curve': [{k: row[k] for k in CURVE if k in row} for row in rows],
  }
  record['config']['data']['dir'] = ''  # It depends on the machine.
  write_record(target, record)
  shutil.rmtree(folder)


def write_record(target: pathlib.Path, record: dict[str, Any]) -> None:
  """Writes a result file atomically, with one line for each round.

  Args:
    target: The file; its folder is created if it does not exist.
    record: JSON values by name. `curve`, if present, is a list of rounds.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  curve = record.get('curve', [])
  rows = ',\n    '.join(json.dumps(row) for row in curve)
  text = json.dumps({**record, 'curve': []} if curve else record, indent=2)
  text = text.replace('"curve": []', f'"curve": [\n    {rows}\n  ]')
  workdir.replace_text(target, text + '\n')


def load(pattern: str) -> list[dict[str, Any]]:
  """Returns committed results, in the order of their names.

  Args:
    pattern: Pattern of their paths below the folder of results.
  """
  return [read(path) for path in sorted(RESULTS.glob(pattern))]


def of_seeds(folder: pathlib.Path, name: str) -> list[dict[str, Any]]:
  """Returns the results of a setting, one for each seed that has been run.

  Args:
    folder: Where they are. A copy under another name is no further seed.
    name: Name of the setting; empty for all that are there.
  """
  return [read(path) for path in paths_of_seeds(folder, name)]


def paths_of_seeds(folder: pathlib.Path, name: str = '') -> list[pathlib.Path]:
  """Returns the files of the results that `of_seeds` reads.

  Args:
    folder: See `of_seeds`.
    name: See `of_seeds`.
  """
  form = re.compile(rf'{re.escape(name) or ".+"}_seed\d+\.json')
  paths = folder.glob(f'{name}*_seed*.json')
  return [path for path in sorted(paths) if form.fullmatch(path.name)]


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a result file.

  Args:
    path: The file.

  Returns:
    The record.

  Raises:
    ConfigError: If it holds no record.
  """
  try:
    record = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(
      f'{path} cannot be read ({one_line(error)}): mend or delete it.'
    ) from error
  if not isinstance(record, dict):
    raise ConfigError(f'{path} holds no record: mend or delete it.')
  return record


def first_test(
  rows: Sequence[dict[str, Any]], accuracy: float
) -> dict[str, Any] | None:
  """Returns the row of the first test that reaches an accuracy.

  Args:
    rows: The rounds of a run, tested or not.
    accuracy: Test accuracy with fixed statistics, from 0 to 1.

  Returns:
    The row, or None if no test reaches it.

  >>> rows = [{}, {'test_accuracy': 0.5}]
  >>> first_test(rows, 0.4), first_test(rows, 0.6)
  ({'test_accuracy': 0.5}, None)
  """
  tests = (row for row in rows if row.get('test_accuracy', -1) >= accuracy)
  return next(tests, None)


def count(text: str) -> int:
  """Reads an option that counts something, of which there is at least one."""
  if not re.fullmatch('0*[1-9][0-9]{0,8}', text):
    raise argparse.ArgumentTypeError(f'{text!r} is no number of at least 1')
  return int(text)


def parsed(
  parser: argparse.ArgumentParser, free: Sequence[str] = ()
) -> argparse.Namespace:
  """Reads the options of a command that measures, and adds `--out` to them.

  Without that option the result is the one that is kept with the code, so
  nothing else may be measured then.

  Args:
    parser: The parser, with all other options.
    free: Names of those that the name of the file tells, or that do not change
      what is measured.

  Returns:
    The options; `out` is None or a path.
  """
  parser.add_argument(
    '--out', type=folders.output_file, help='JSON file to write'
  )
  args = parser.parse_args()
  changed = [
    name
    for name, value in vars(args).items()
    if name not in free and value != parser.get_default(name)
  ]
  if changed and not args.out:
    parser.error(
      f'--{changed[0]} measures something else than the result that is kept '
      'with the code: name a file with --out.'
    )
  if not args.out:
    check_results(parser)
  return args


def check_results(
  parser: argparse.ArgumentParser, folder: pathlib.Path = RESULTS
) -> None:
  """Refuses to measure what could not be written to the folder of results.

  Args:
    parser: That of the command, which ends if nothing can be written.
    folder: The folder.
  """
  try:
    folders.check_writable(folder, 'the folder of results')
  except ConfigError as error:
    parser.error(str(error))


def show_results(
  doc: str | None,
  tables: Callable[[pathlib.Path], Iterable[Any]],
  figures: Callable[[pathlib.Path], Mapping[pathlib.Path, Any]],
) -> int:
  """Runs a command that shows results, those in the folder of `--results`.

  Args:
    doc: The docstring of its module, whose first line becomes the help.
    tables: Gets the folder of all results; returns a `Table` of each.
    figures: Gets it, too; returns figures by the files that they go to.

  Returns:
    The exit code.
  """
  parser = Parser(description=(doc or '').split('\n')[0])
  parser.add_argument(
    '--results',
    type=folders.argument,
    default=RESULTS,
    help='folder of the results of all experiments',
  )
  results = parser.parse_args().results
  try:
    if not results.is_dir():
      raise ConfigError(f'--results={results} is no folder.')
    listed = list(tables(results))
    for table in listed:
      print(table.caption, table.text(), sep='\n', end='\n\n')
    if not listed:
      print(f'no table yet: {results} holds no results of this kind.')
    for path, figure in figures(results).items():
      try:
        figure.savefig(path, dpi=150)
      except OSError as error:  # Such as results that may only be read.
        print(f'a figure is not written: {error}', file=sys.stderr)
  except ConfigError as error:  # A result file is damaged.
    return refused(error)
  return 0


def command(name: str) -> str:
  """Returns the command that is running, without the place of its result.

  Args:
    name: Its module.
  """
  words, kept = iter(sys.argv[1:]), []
  for word in words:
    if word == '--out':
      next(words, None)
    elif not word.startswith('--out='):
      kept.append(word)
  return f'python -m {name} {shlex.join(kept)}'.strip()


def begin_run(folder: pathlib.Path, busy: bool) -> None:
  """Notes where a run begins or goes on, and whether its seconds count.

  They do not if other work runs on the machine, or if several machines or
  versions have shared the run.

  Args:
    folder: The workdir of a run, also of one that goes on.
    busy: Whether other work runs on the machine.

  Raises:
    ConfigError: If nothing can be written there, or if it is being trained.
  """
  folders.check_writable(folder, '--runs')
  path, now = folder / _BEGUN, here()
  with locked(folder):  # A second copy of the command is refused here.
    # A start that was refused later leaves nothing but these.
    is_new = {path.name for path in folder.iterdir()} <= {_BUSY, _BEGUN, 'lock'}
    if is_new:
      (folder / _BUSY).unlink(missing_ok=True)
    begun = [] if is_new else _beginnings(folder)
    if busy or not (is_new or any(_speed(x) == _speed(now) for x in begun)):
      (folder / _BUSY).touch()
    if begun[-1:] != [now]:
      workdir.replace_text(path, json.dumps([*begun, now]))


def history(folder: pathlib.Path) -> dict[str, Any]:
  """Returns what the provenance of a run says of its beginnings.

  Args:
    folder: Its workdir, see `begin_run`.

  Returns:
    JSON values by name: `commit`, whose code has trained its end; `busy` if its
    seconds do not count; and `begun`, where it began and went on, if other code
    or another machine has trained a part.
  """
  begun, found = _beginnings(folder), {}
  if begun:  # The code may have changed since the run began.
    found['commit'] = begun[-1]['commit']
  if (folder / _BUSY).exists():
    found['busy'] = True
  if len(begun) > 1:
    found['begun'] = begun
  return found


def _beginnings(folder: pathlib.Path) -> list[dict[str, Any]]:
  try:
    return json.loads((folder / _BEGUN).read_text())
  except (OSError, ValueError):  # Of an older version, or damaged.
    return []


def _speed(provenance: dict[str, Any]) -> list[Any]:
  """Returns what the seconds of a run depend on."""
  names = 'device', 'processor', 'cores', 'versions', 'environment'
  return [provenance[name] for name in names]


def begin(target: pathlib.Path) -> None:
  """Checks that a result can be written, and prints what will be trained.

  Args:
    target: The result file.

  Raises:
    ConfigError: If it cannot be written.
  """
  folders.check_writable(target.parent, 'results')
  _begin_process()
  print(f'{target.parent.name}/{target.name}', file=sys.stderr, flush=True)


def here() -> dict[str, Any]:
  """Returns the provenance of what this process would measure."""
  _begin_process()
  return provenance()


@functools.cache
def _begin_process() -> None:
  """Gives this process 8 virtual CPU devices for all of its runs."""
  with contextlib.suppress(RuntimeError):  # JAX has already been initialised.
    jax.config.update('jax_num_cpu_devices', 8)


def provenance(device: str = '') -> dict[str, Any]:
  """Returns where a result comes from: commit, versions, device and processor.

  Args:
    device: Number and kind of the devices, such as `4 x cpu`. By default this
      process asks JAX, which reserves an accelerator until the process ends.

  Returns:
    JSON values by name. The commit ends in `+` if the code has been changed.
    Without a repository, the environment's RESIST_JAX_COMMIT names it.
  """
  return {
    'commit': _commit(),
    'python': platform.python_version(),
    'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
    'device': device
    or f'{len(jax.devices())} x {jax.devices()[0].device_kind}',
    'processor': _processor(),
    'cores': os.cpu_count(),
    'environment': {
      name: value
      for name, value in sorted(os.environ.items())
      if name.startswith(_FLAGS + _ALLOCATOR)
    },
  }


def machine(provenance: Mapping[str, Any], count: bool = True) -> str:
  """Describes the machine and the version of JAX for readers.

  Args:
    provenance: That of a result.
    count: Whether to tell how many accelerators a run had, if several.
  """
  number, device = provenance['device'].split(' x ')
  if device == 'cpu':
    device = f'{provenance["cores"]} cores of {provenance["processor"]}'
  elif count and number != '1':
    device = f'{number} x {device}'
  return f'{device}, JAX {provenance["versions"]["jax"]}'


def conditions(provenance: Mapping[str, Any]) -> str:
  """Describes for readers what the seconds of a result depend on.

  Args:
    provenance: That of a result.

  Returns:
    The machine, and the variables of the environment that may change its speed.
    Those of the allocator are many and long, so only their names are told.
  """
  found = provenance.get('environment', {})
  told = [f'{name}={found[name]}' for name in _FLAGS if name in found]
  told += [
    f'{name}*' if name.endswith('_') else name
    for name in _ALLOCATOR
    if any(variable.startswith(name) for variable in found)
  ]
  said = f', with {" and ".join(told)} set' if told else ''
  return f'{machine(provenance)}{said}'


# Variables of the environment that change programs or their speed.
_FLAGS = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')
_ALLOCATOR = ('MALLOC_', 'GLIBC_TUNABLES')
# New results, tables and pictures do not change the code.
_CODE = ('.', ':!experiments/results', ':!README.md', ':!RESULTS.md')


def _commit() -> str:
  root = pathlib.Path(__file__).parent.parent

  def git(*args: str) -> str:
    command = ['git', '-C', str(root), *args]
    return subprocess.run(
      command, capture_output=True, text=True, check=True
    ).stdout.strip()

  try:
    changes = git('status', '--porcelain', '--untracked-files=no', '--', *_CODE)
    dirty = '+' if changes else ''
    return git('rev-parse', '--short=12', 'HEAD') + dirty
  except (OSError, subprocess.CalledProcessError):
    return os.environ.get('RESIST_JAX_COMMIT', 'unknown')


def _processor() -> str:
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor()
  names = [line.split(':')[1].strip() for line in lines if 'model name' in line]
  return names[0] if names else platform.processor()
