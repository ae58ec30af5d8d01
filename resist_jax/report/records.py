"""Readers of a run's workdir: its config, its rounds and its summary."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any, TypeGuard

from resist_jax import folders
from resist_jax.errors import ConfigError, printable

Summary = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]  # metrics.jsonl: one mapping per round

MAX_ROUNDS = 60  # That a figure shows: more columns cannot be told apart.

DASH = '-'
# Fields of a round that are numbers, or missing.
NUMBERS = ('train_loss', 'test_loss', 'test_accuracy', 'test_accuracy_paper',
           'bytes_total', 'wire_bytes_total', 'seconds_training',
           'images_per_second')  # fmt: skip
# How the accuracies of a test are called, after its name.
ACCURACIES = ('_accuracy', '_accuracy_paper')
_CUTS = ('slots', 'num_blocks')
_FILES = ('config.json', 'metrics.jsonl')
_COUNTS = 'bytes', 'wire_bytes'
MAX_ROWS = 10**6  # A report keeps so many in memory.
# The records of no run exceed these.
_MAX_LINE = 2**20
_MAX_ROUND, _MAX_BLOCKS, _MAX_WORKERS, _MAX_CHAINS = 10**9, 2048, 4096, 256
_MAX_NUMBER = 3.5e38  # That of 32 bits.


@dataclasses.dataclass(frozen=True)
class Run:
  """A run as its workdir records it.

  Attributes:
    label: The shortest end of the workdir's path that is unique in a report.
    config: The config as one level of dotted names.
    summary: The content of `summary.json`, or what is known so far.
    rows: Its rounds, ascending, each once; those of a long run that no picture
      shows are without slots.
  """

  label: str
  config: Mapping[str, Any]
  summary: Summary
  rows: Rows


def further_tests(fields: Iterable[str]) -> list[str]:
  """Returns the tests that the fields of a summary name, but `test`.

  An accuracy may also be a metric of somebody's own network, such as
  `test_token_accuracy`: a test has a loss or the paper's accuracy beside it.
  """
  names = set(fields)
  found = {
    name.removesuffix(end)
    for name in names
    for end in ('_accuracy', '_perplexity')
    if name.endswith(end)
  }
  return sorted(
    test
    for test in found - {'test', 'best_test', 'train'}
    if {f'{test}_loss', f'{test}_accuracy_paper'} & names
  )


def load_runs(run_dirs: Sequence[str | os.PathLike[str]]) -> list[Run]:
  """Reads the workdirs of runs.

  Args:
    run_dirs: Workdirs, or folders that hold the workdirs of several seeds. If
      a workdir has no `summary.json`, because its run was stopped or still
      trains, the summary is derived from its rounds.

  Returns:
    The runs, in the same order.

  Raises:
    ConfigError: If a workdir cannot be read.
  """
  if isinstance(run_dirs, str | os.PathLike):
    raise ConfigError(
      f'run_dirs is {os.fspath(run_dirs)!r}; it must be a list of workdirs.'
    )
  given = [
    folders.resolve(path, 'a run', is_text=False).resolve() for path in run_dirs
  ]
  paths = [run for path in given for run in _within(path)]
  if len(set(paths)) < len(paths):
    raise ConfigError('a run is given twice: give every run once.')
  depth = 1
  while len({path.parts[-depth:] for path in paths}) < len(paths):
    depth += 1
  labels = [printable('/'.join(path.parts[-depth:])) for path in paths]
  return list(map(_load_run, paths, labels))


def _within(path: Path) -> list[Path]:
  """Returns a workdir, or the workdirs in a folder that is none."""
  if path.is_dir() and not any((path / name).exists() for name in _FILES):
    inner = [p for p in sorted(path.iterdir()) if is_workdir(p)]
    return inner or [path]
  return [path]


def is_workdir(path: Path) -> bool:
  """Returns whether a folder has the files of a run."""
  return all((path / name).is_file() for name in _FILES)


def _load_run(path: Path, label: str) -> Run:
  """Reads one workdir."""
  for name in _FILES:
    if not (path / name).is_file():
      raise ConfigError(
        f'{path} has no {name}: give the workdir of a run that finished at '
        'least one round, or a folder of such workdirs.'
      )
  config = flatten(_read_json(path / 'config.json'))
  if 'phases.full_after' in config:  # Older runs had no choice.
    config.setdefault('phases.protocol', 'local_sgd')
  rows = _drawn_rows(path / 'metrics.jsonl')
  summary = _summary_so_far(config, rows)
  summary['dataset'] = _own_name(path) or summary['dataset']
  if (path / 'summary.json').is_file():
    written = _read_json(path / 'summary.json')
    # It is out of date if the run finished and was then given more rounds.
    rounds = written.get('rounds')
    if is_number(rounds) and rounds >= rows[-1]['round']:
      summary = written
    if rounds == rows[-1]['round']:  # A test at the very end has no row.
      rows[-1] = _with_tests(rows[-1], written)
  summary |= _mean_bytes(summary, rows)
  counts = (row['workers'] for row in rows if row['workers'])
  changes = [str(count) for count, _ in itertools.groupby(counts)]
  if len(changes) > 1:  # The run was resumed with another number of workers.
    summary['num_workers'] = ', then '.join(changes)
  elif changes and config.get('workers_per_process'):
    # The config has those of the hosts that saw the end.
    summary['num_workers'] = int(changes[0])
  return Run(label, config, {**summary, 'directory': str(path)}, rows)


def _own_name(path: Path) -> str:
  """Returns what a module calls the data that it makes; '' for other data."""
  if not (path / 'data.json').is_file():
    return ''
  try:
    called = _read_json(path / 'data.json').get('called')
  except ConfigError:  # The run itself goes on without it.
    return ''
  return called if isinstance(called, str) else ''


def _with_tests(row: Summary, summary: Summary) -> dict[str, Any]:
  """Returns the last row with the tests that only the summary has."""
  tested = {
    name: summary[name]
    for name in _measures(summary)
    if not name.startswith(('best_', 'final_')) and is_number(summary[name])
  }
  return {**row, **{k: v for k, v in tested.items() if row.get(k) is None}}


def _mean_bytes(
  summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
  """Returns bytes of a round where rounds differ, or several are one.

  The summary has those of a typical exchange. A few rounds of another protocol
  may send more than all others, and several rounds may have one exchange.
  """
  trained = [row for row in rows if row['round'] > 0]
  kinds = {(row.get('protocol'), row.get('rounds', 1)) for row in trained}
  if len(kinds) < 2 and all(count == 1 for _, count in kinds):
    return {}
  totals = {name: summary.get(f'{name}_total') for name in _COUNTS}
  return {
    f'{name}_per_round': total / trained[-1]['round']
    for name, total in totals.items()
    if is_number(total)
  }


def _drawn_rows(path: Path) -> list[dict[str, Any]]:
  """Reads what a report draws of each round, ascending, each round once.

  The slots of all rounds of a long run would fill the memory: only rounds that
  a picture may show keep them.
  """
  by_round, first, first_cut = {}, math.inf, math.inf
  for line, row in enumerate(each_row(path), 1):
    if line > MAX_ROWS:
      raise ConfigError(
        f'{path} has more than {MAX_ROWS} lines, too many for a report: omit '
        'this run, or copy its workdir and shorten the copy of that file.'
      )
    number, chains = row['round'], list(row['slots'].values())
    begun = number - row.get('rounds', 1) + 1
    first = min(first, begun)
    first_cut = min(first_cut, begun) if chains else first_cut
    far = begun >= max(first, first_cut) + MAX_ROUNDS
    cuts = () if far else _CUTS
    names = ('round', 'rounds', 'protocol', *_measures(row), *cuts)
    # A resumed run may repeat rounds, and continues from the last repetition.
    by_round[number] = {name: row[name] for name in row if name in names}
    by_round[number]['workers'] = len(chains[0]) if chains else 0
  if not by_round:
    raise ConfigError(
      f'{path} has no round yet: wait until the run has finished one, or omit '
      'this run.'
    )
  return [by_round[number] for number in sorted(by_round)]


def _read_json(path: Path) -> dict[str, Any]:
  value: Any = None
  # Not text, not JSON, or brackets in hundreds of brackets.
  with contextlib.suppress(ValueError, RecursionError):
    read = json.loads(path.read_text('utf-8'))
    if isinstance(read, dict):
      json.dumps(flatten(read))
      value = read
  if not isinstance(value, dict):
    raise ConfigError(
      f'{path} is not a JSON object: repair it, or omit this run.'
    )
  return value


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the rows of a `metrics.jsonl`, one for each round.

  Args:
    path: The file, see `each_row`.

  Returns:
    The rows in the order of the file; see `each_row`.

  Raises:
    ConfigError: If a line is damaged; see `each_row`.
  """
  return list(each_row(path))


def each_row(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
  """Reads the rows of a `metrics.jsonl` one after another.

  Args:
    path: The file, which need not exist. In a text, `~` and `$NAME` are filled
      in; a `Path` is taken as it is.

  Yields:
    The rows in the order of the file; none if it does not exist. The last line
    is ignored if it has no end: its writer was killed, or is still writing.

  Raises:
    ConfigError: If another line is damaged, or not that of a run; names the
      file and the line.
  """
  if not isinstance(path, Path):
    path = folders.resolve(path, 'the log', is_text=False)
  if not path.exists():
    return
  chains: set[str] = set()
  with path.open('rb') as file:
    # Not the whole file at once: nobody knows how long it is.
    for number in itertools.count(1):
      line = file.readline(_MAX_LINE)
      if not line.endswith(b'\n') and len(line) < _MAX_LINE:
        return
      row: Any = None
      with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
      if not (
        _is_round(row) and len(chains | row['slots'].keys()) <= _MAX_CHAINS
      ):
        raise ConfigError(
          f'{path}, line {number}, is not the record of a round: delete that '
          'line.'
        )
      chains |= row['slots'].keys()
      yield row


def is_number(value: Any) -> TypeGuard[int | float]:
  """Returns whether a value is a number that can be drawn."""
  is_real = isinstance(value, int | float) and not isinstance(value, bool)
  return is_real and -_MAX_NUMBER < value < _MAX_NUMBER


def _measures(row: Mapping[str, Any]) -> list[str]:
  """Returns which fields of a row are measured numbers, or missing."""
  ends = *ACCURACIES, '_loss'
  return [n for n in row if n in NUMBERS or n.endswith(ends)]


def _is_count(value: Any, end: int) -> bool:
  return type(value) is int and 0 <= value < end


def _is_round(row: Any) -> bool:
  """Returns whether a row has the fields that reports read, and no absurd ones.

  A row is trusted to draw pictures and tables with as many parts as it says.
  """
  if not isinstance(row, dict) or not _is_count(row.get('round'), _MAX_ROUND):
    return False
  if not _is_count(row.get('rounds', 0), row['round'] + 1):
    return False
  numbers = [row[name] for name in _measures(row) if row[name] is not None]
  slots, lengths = row.get('slots'), row.get('num_blocks', {})
  if not isinstance(slots, dict) or not isinstance(lengths, dict):
    return False
  return (
    all(map(is_number, numbers))
    and all(_is_count(length, _MAX_BLOCKS + 1) for length in lengths.values())
    and all(
      _are_slots(workers, lengths.get(chain, _MAX_BLOCKS))
      for chain, workers in slots.items()
    )
  )


def _are_slots(workers: Any, num_blocks: int) -> bool:
  """Returns whether these are the blocks of each worker, in one chain."""
  return (
    isinstance(workers, list)
    and 0 < len(workers) <= _MAX_WORKERS
    and all(isinstance(blocks, list) for blocks in workers)
    and all(_is_count(b, num_blocks) for blocks in workers for b in blocks)
  )


def _summary_so_far(config: Summary, rows: Rows) -> dict[str, Any]:
  """Derives the fields of a summary from the config and the rounds."""
  fields = {**rows[-1], **config, 'rounds': rows[-1]['round']}
  for name in sorted({*NUMBERS, *itertools.chain(*map(_measures, rows))}):
    values = [row[name] for row in rows if row.get(name) is not None]
    fields[name] = values[-1] if values else None
    if name in NUMBERS:
      fields[f'best_{name}'] = max(values, default=None)
  fields['final_train_loss'] = fields['train_loss']
  fields['dataset'] = config.get('data.name', DASH)
  module = config.get('model.module')
  fields['model'] = module or config.get('model.name', DASH)
  if module:
    fields['unit'] = 'examples'
  fields['of_rounds'] = f' of {config.get("num_rounds", "?")}, unfinished'
  return fields


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns a nested mapping as one level with dotted names."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[f'{prefix}{name}'] = value
  return flat
