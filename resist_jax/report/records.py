"""Readers of a run's workdir: its config, its rounds and its summary."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, cast

from resist_jax.errors import ConfigError
from resist_jax.report import plots

Summary = Mapping[str, Any]

DASH = '-'
# Fields of a round that are numbers, or missing.
NUMBERS = ('train_loss', 'test_accuracy', 'test_accuracy_paper', 'bytes_total',
           'wire_bytes_total', 'seconds_training',
           'images_per_second')  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """A run as its workdir records it.

  Attributes:
    label: The shortest end of the workdir's path that is unique in a report.
    config: The config as one level of dotted names.
    summary: The content of `summary.json`, or what is known so far.
    rows: Its rounds, ascending, each once.
  """

  label: str
  config: Mapping[str, Any]
  summary: Summary
  rows: plots.Rows


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
  """Reads the workdirs of runs.

  Args:
    run_dirs: Workdirs. If one has no `summary.json`, because its run was
      stopped or still trains, the summary is derived from its rounds.

  Returns:
    The runs, in the same order.

  Raises:
    ConfigError: If a workdir cannot be read.
  """
  paths = [Path(path).resolve() for path in run_dirs]
  if len(set(paths)) < len(paths):
    raise ConfigError('a run is given twice: give every run once.')
  depth = 1
  while len({path.parts[-depth:] for path in paths}) < len(paths):
    depth += 1
  return [_load_run(path, '/'.join(path.parts[-depth:])) for path in paths]


def _load_run(path: Path, label: str) -> Run:
  """Reads one workdir."""
  for name in ('config.json', 'metrics.jsonl'):
    if not (path / name).is_file():
      raise ConfigError(
        f'{path} has no {name}: give the workdir of a run that finished at '
        'least one round.'
      )
  config = _flatten(_read_json(path / 'config.json'))
  # A resumed run may repeat rounds, and continues from the last repetition.
  by_round = {row['round']: row for row in read_rows(path / 'metrics.jsonl')}
  if not by_round:
    raise ConfigError(
      f'{path / "metrics.jsonl"} has no round yet: wait until the run has '
      'finished one, or omit this run.'
    )
  rows = [by_round[number] for number in sorted(by_round)]
  summary = _summary_so_far(config, rows)
  if (path / 'summary.json').is_file():
    written = _read_json(path / 'summary.json')
    # It is out of date if the run finished and was then given more rounds.
    if (written.get('rounds') or 0) >= rows[-1]['round']:
      summary = written
  counts = (len(next(iter(r['slots'].values()))) for r in rows if r['slots'])
  changes = [str(count) for count, _ in itertools.groupby(counts)]
  if len(changes) > 1:  # The run was resumed with another number of workers.
    summary['num_workers'] = ', then '.join(changes)
  return Run(label, config, {**summary, 'directory': str(path)}, rows)


def _read_json(path: Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text('utf-8'))
  except ValueError:  # Neither text nor JSON.
    value = None
  if not isinstance(value, dict):
    raise ConfigError(
      f'{path} is not a JSON object: repair it, or omit this run.'
    )
  return value


def read_rows(path: Path) -> list[dict[str, Any]]:
  """Reads the rows of a `metrics.jsonl`, one for each round.

  Args:
    path: The file, which need not exist.

  Returns:
    The rows in the order of the file; none if it does not exist. The last line
    is ignored if it has no end: its writer was killed, or is still writing.

  Raises:
    ConfigError: If another line is damaged; names the file and the line.
  """
  if not path.exists():
    return []
  *lines, _ = path.read_text('utf-8', 'replace').split('\n')
  rows = []
  for number, line in enumerate(lines, start=1):
    row: Any = None
    with contextlib.suppress(ValueError):
      row = json.loads(line)
    if not _is_round(row):
      raise ConfigError(
        f'{path}, line {number}, is not the record of a round: delete that '
        'line.'
      )
    rows.append(cast(dict[str, Any], row))
  return rows


def _is_round(row: Any) -> bool:
  """Returns whether the fields of a row that reports read have their types."""
  try:
    numbers = [row.get(name) or 0 for name in NUMBERS]
    chains = row['slots'].values()
    blocks = [b for workers in chains for worker in workers for b in worker]
    integers = [row['round'], *row.get('num_blocks', {}).values(), *blocks]
  except (AttributeError, KeyError, TypeError):
    return False
  typed = all(isinstance(number, int | float) for number in numbers)
  return typed and all(isinstance(i, int) for i in integers) and all(chains)


def _summary_so_far(config: Summary, rows: plots.Rows) -> dict[str, Any]:
  """Derives the fields of a summary from the config and the rounds."""
  fields = {**rows[-1], **config, 'rounds': rows[-1]['round']}
  for name in NUMBERS:
    values = [row[name] for row in rows if row.get(name) is not None]
    fields[name] = values[-1] if values else None
    fields[f'best_{name}'] = max(values, default=None)
  fields['final_train_loss'] = fields['train_loss']
  fields['dataset'] = config.get('data.name', DASH)
  fields['model'] = config.get('model.name', DASH)
  fields['of_rounds'] = f' of {config.get("num_rounds", "?")}, unfinished'
  return fields


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns a nested mapping as one level with dotted names."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f'{prefix}{name}.')
    else:
      flat[f'{prefix}{name}'] = value
  return flat
