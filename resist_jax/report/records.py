"""What run directories say: settings, rounds and summaries."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from resist_jax.report import plots

Summary = Mapping[str, Any]

DASH = '-'
NUMBERS = ('train_loss', 'test_accuracy', 'test_accuracy_paper', 'bytes_total',
           'wire_bytes_total', 'seconds_training',
           'images_per_second')  # fmt: skip


class RunError(ValueError):
  """A run directory that cannot be shown, in one line that says what to do."""


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run directory says; labels differ between the runs of a report."""

  label: str
  config: Mapping[str, Any]  # one level, dotted names
  summary: Summary
  rows: plots.Rows


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
  """Reads run directories.

  Args:
    run_dirs: Directories that a training run wrote. One without a summary, of
      a run that goes on or was stopped, is summarised by its rounds.

  Returns:
    The runs in the same order.

  Raises:
    RunError: If one cannot be read.
  """
  paths = [Path(path).resolve() for path in run_dirs]
  if len(set(paths)) < len(paths):
    raise RunError('a run is given twice: give every run once.')
  depth = 1
  while len({path.parts[-depth:] for path in paths}) < len(paths):
    depth += 1
  return [_load_run(path, '/'.join(path.parts[-depth:])) for path in paths]


def _load_run(path: Path, label: str) -> Run:
  """Reads one run directory."""
  for name in ('config.json', 'metrics.jsonl'):
    if not (path / name).is_file():
      raise RunError(
        f'{path} has no {name}: give the directory of a run that finished at '
        'least one round.'
      )
  config = _flatten(_parse(path / 'config.json'))
  rows = _read_rows(path / 'metrics.jsonl')
  summary = _summary_so_far(config, rows)
  if (path / 'summary.json').is_file():
    written = _parse(path / 'summary.json')
    # A finished run that was given more rounds has left its summary behind.
    if (written.get('rounds') or 0) >= rows[-1]['round']:
      summary = written
  counts = (len(next(iter(r['slots'].values()))) for r in rows if r['slots'])
  changes = [str(count) for count, _ in itertools.groupby(counts)]
  if len(changes) > 1:  # elastic resume
    summary['num_workers'] = ', then '.join(changes)
  return Run(label, config, {**summary, 'directory': str(path)}, rows)


def _parse(path: Path, line: str = '', number: int = 0) -> dict[str, Any]:
  """Returns the JSON object in a file, or in one line of it."""
  where = f'{path}, line {number}' if number else path
  try:
    value = json.loads(line if number else path.read_text('utf-8'))
  except ValueError:  # Neither text nor JSON.
    value = None
  if not isinstance(value, dict):
    raise RunError(f'{where}: no JSON object. Repair it or omit this run.')
  return value


def _read_rows(path: Path) -> list[dict[str, Any]]:
  """Returns the rounds of a metrics file, ascending."""
  # A last line without its end: its writer is at work, or was killed.
  lines = path.read_text('utf-8', 'replace').split('\n')[:-1]
  by_round = {}
  for number, line in enumerate(lines, 1):
    row = _parse(path, line, number)
    if not _is_round(row):
      raise RunError(f'{path}, line {number}: not a round. Delete that line.')
    # Where a resumed run repeated a round, the model went on from the last.
    by_round[row['round']] = row
  if not by_round:
    raise RunError(f'{path} has no round yet: wait for it, or omit this run.')
  return [by_round[number] for number in sorted(by_round)]


def _is_round(row: Mapping[str, Any]) -> bool:
  """Returns whether the fields that are read have their types."""
  numbers = [row.get(name) or 0 for name in NUMBERS]
  try:
    chains = row['slots'].values()
    blocks = [b for workers in chains for worker in workers for b in worker]
    integers = [row['round'], *row.get('num_blocks', {}).values(), *blocks]
  except (AttributeError, KeyError, TypeError):
    return False
  typed = all(isinstance(number, int | float) for number in numbers)
  return typed and all(isinstance(i, int) for i in integers) and all(chains)


def _summary_so_far(config: Summary, rows: plots.Rows) -> dict[str, Any]:
  """Returns the fields of a summary that settings and rounds tell."""
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
  """Returns a nested mapping as one level of dotted names."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f'{prefix}{name}.')
    else:
      flat[f'{prefix}{name}'] = value
  return flat
