"""The report of a run, or of several side by side: a table, plots and a page.

Run it as `python -m resist_jax.report DIR... [--out=OUT]`.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
from html import escape
import itertools
import json
from pathlib import Path
import sys
from typing import Any

from resist_jax import plots

Summary = Mapping[str, Any]

# Names and cells of the table; a field that a summary lacks makes a dash.
TABLE = (
  ('data', '{dataset}'),
  ('model', '{model}'),
  ('protocol', '{protocol}'),
  ('workers', '{num_workers}'),
  ('rounds', '{rounds}{of_rounds}'),
  ('local steps per round', '{local_steps}'),
  ('test accuracy, as deployed', '{test_accuracy:.2%}'),
  ('test accuracy, as in paper', '{test_accuracy_paper:.2%}'),
  ('best, as in paper', '{best_test_accuracy_paper:.2%}'),
  ('final training loss', '{final_train_loss:.4g}'),
  ('communication', '{bytes_total_text}'),
  ('communication per round', '{bytes_per_round_text}'),
  ('against local SGD', '{share_of_bytes:.1%}'),
  ('seconds of training', '{seconds_training:,.1f}'),
  ('images per second', '{images_per_second:,.0f}'),
  ('parameters', '{params_total:,}'),
  ('share of them per worker', '{share_of_params:.1%}'),
  ('devices', '{num_devices}, {device}'),
)
PROVENANCE = (
  ('directory', '{directory}'),
  ('seed', '{seed}'),
  ('hash of parameters', '{params_hash:.16}'),
  ('seconds, with tests', '{seconds_total:,.1f}'),
  ('versions', '{versions_text}'),
)
DASH = '-'
NUMBERS = ('train_loss', 'test_accuracy', 'test_accuracy_paper', 'bytes_total',
           'seconds_training', 'images_per_second')  # fmt: skip
NOTE = """As deployed: with fixed norm statistics, measured anew for the global
model. As in the paper: with the statistics of each test batch. Communication:
the paper's count, the parameters of all workers, there and back every round."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; font-size: 0.9rem; } table { border-spacing: 0; }
th, td { text-align: left; vertical-align: top; border-bottom: 1px solid #ddd;
  padding: 0.3rem 1.2rem 0.3rem 0; min-width: 8.5rem; max-width: 22rem; }
tbody th, figcaption, p { font-weight: normal; color: #555; max-width: 46rem; }
figure { margin: 0 0 1rem; } img { max-width: min(100%, 48rem); }
.plots { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
"""


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


def _cells(
  table: Sequence[tuple[str, str]], summaries: Sequence[Summary]
) -> list[list[str]]:
  """Returns a table's rows: a name, then a cell per run."""
  readable = []
  for summary in summaries:
    fields: dict[str, Any] = {'of_rounds': '', **summary}
    for name in ('bytes_total', 'bytes_per_round'):
      if isinstance(count := fields.get(name), int | float):
        unit, unit_name = plots.byte_unit(count)
        fields[f'{name}_text'] = f'{count / unit:.4g} {unit_name}'
    for name, part, whole in (
      ('share_of_bytes', 'bytes_per_round', 'bytes_per_round_local_sgd'),
      ('share_of_params', 'params_per_worker', 'params_total'),
    ):
      if fields.get(part) and fields.get(whole):
        fields[name] = fields[part] / fields[whole]
    versions = (fields.get('versions') or {}).items()
    fields['versions_text'] = ', '.join(f'{k} {v}' for k, v in versions) or DASH
    readable.append(fields)
  return [[n, *(_cell(form, s) for s in readable)] for n, form in table]


def _cell(form: str, fields: Summary) -> str:
  """Returns a cell, or a dash if its fields are not all there."""
  try:
    text = form.format_map(fields)
  except (KeyError, TypeError, ValueError):
    return DASH
  return DASH if text == 'None' else text


def summary_table(
  summaries: Sequence[Summary], labels: Sequence[str] = ()
) -> str:
  """Returns runs side by side as plain text for a terminal.

  Args:
    summaries: The fields of `summary.json`; what is missing becomes a dash.
    labels: The heads of the columns, if wanted.

  Returns:
    A line per field, a column per run; two runs fit in 100 characters.
  """
  rows = [['', *labels]] if labels else []
  rows += _cells(TABLE, summaries)
  # The names take 26 characters, and two spaces part the columns.
  room = max(26, 74 // max(len(summaries), 1) - 2)
  rows = [
    [c if len(c) <= room else f'{c[: room - 1]}…' for c in row] for row in rows
  ]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
    for row in rows
  )


def write_report(run_dirs: Sequence[Path], out_dir: Path) -> Path:
  """Writes `report.html` and its pictures.

  Args:
    run_dirs: Directories that a training run wrote, shown side by side.
    out_dir: Where to write; made if need be.

  Returns:
    The path of the page.

  Raises:
    RunError: If a run cannot be shown; nothing is written then.
    OSError: If a file cannot be read or written.
  """
  runs = load_runs(run_dirs)
  rows = {run.label: run.rows for run in runs}
  figures, captions = {}, {}
  for x, caption in plots.AXES.items():
    name = f'accuracy_by_{x.split("_")[0]}.png'
    figures[name] = plots.accuracy_figure(rows, x)
    captions[name] = f'Test accuracy by {caption}.'
  for number, run in enumerate(runs, 1):
    name = f'decomposition_{number}.png' if runs[1:] else 'decomposition.png'
    if figure := plots.decomposition_figure(run.label, run.rows):
      figures[name] = figure
      captions[name] = f'{run.label}. Striped blocks have several workers.'
  files = {name: plots.render_png(f) for name, f in figures.items()}
  files['report.html'] = _page(runs, captions).encode('utf-8', 'replace')
  out_dir.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    (out_dir / name).write_bytes(content)
  return out_dir / 'report.html'


def _page(runs: Sequence[Run], captions: Mapping[str, str]) -> str:
  """Returns the page; `captions` are per file of a picture."""
  title = f'{len(runs)} runs side by side' if runs[1:] else runs[0].label
  title = escape(f'ResIST: {title}')
  figures = [
    f'<figure><a href="{name}"><img src="{name}" alt="{escape(caption)}"></a>'
    f'<figcaption>{escape(caption)}</figcaption></figure>'
    for name, caption in captions.items()
  ]
  summaries = [run.summary for run in runs]
  settings = [
    [n, *(json.dumps(r.config[n]) if n in r.config else DASH for r in runs)]
    for n in sorted(set().union(*(run.config for run in runs)))
  ]
  if runs[1:]:
    settings = [row for row in settings if len(set(row[1:])) > 1]
  return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>{title}</h1>
{_html_table(runs, _cells(TABLE, summaries))}
<p>{NOTE}</p>
<h2>Accuracy</h2>
<div class="plots">{''.join(figures[:3])}</div>
{'<h2>Who trained which block</h2>' if figures[3:] else ''}
{''.join(figures[3:])}
<h2>{'Settings that differ' if runs[1:] else 'Settings'}</h2>
{_html_table(runs, settings) if settings else '<p>None.</p>'}
<h2>Provenance</h2>
{_html_table(runs, _cells(PROVENANCE, summaries))}
</body></html>
"""


def _html_table(runs: Sequence[Run], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table with a column per run, in a box that scrolls sideways."""

  def tag(name, texts):
    return ''.join(f'<{name}>{escape(text)}</{name}>' for text in texts)

  head = f'<thead><tr>{tag("th", ["", *(run.label for run in runs)])}</thead>'
  body = [f'<tr>{tag("th", row[:1])}{tag("td", row[1:])}</tr>' for row in rows]
  lines = [head if runs[1:] else '', '<tbody>', *body, '</tbody>']
  return '<div class="wide"><table>{}</table></div>'.format('\n'.join(lines))


def main(args: Sequence[str] | None = None) -> int:
  """Writes the report that a command line asks for; 2 is bad input."""
  parser = argparse.ArgumentParser('python -m resist_jax.report')
  parser.add_argument('dirs', metavar='DIR', nargs='+', type=Path)
  parser.add_argument('--out', type=Path, help='DIR of one run, else ./report')
  flags = parser.parse_args(args)
  out = flags.out or (Path('report') if flags.dirs[1:] else flags.dirs[0])
  try:
    print(write_report(flags.dirs, out))
  except (RunError, OSError) as error:
    hint = '' if isinstance(error, RunError) else '; try another --out.'
    print(f'error: {error}{hint}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
