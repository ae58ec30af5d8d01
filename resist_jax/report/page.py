"""The report of a run, or of several side by side: a table, plots and a page.

Run it as `python -m resist_jax.report DIR... [--out=OUT]`.
"""

import argparse
from collections.abc import Mapping, Sequence
from html import escape
import json
from pathlib import Path
import sys
from typing import Any

from resist_jax.report import plots
from resist_jax.report.records import DASH, Run, RunError, Summary, load_runs

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
  ('on the wire per round', '{wire_bytes_per_round_text}'),
  ('against local SGD', '{share_of_wire:.1%}'),
  ('against data parallel', '{share_of_wire_parallel:.1%}'),
  ('exchange, format', '{exchange}, {wire_format}'),
  ('seconds of training', '{seconds_training:,.1f}'),
  ('images per second', '{images_per_second:,.0f}'),
  ('parameters', '{params_total:,}'),
  ('share of them per worker', '{share_of_params:.1%}'),
  ('parameters per device', '{parameter_memory_text}'),
  ('peak memory per device', '{peak_memory_text}'),
  ('devices', '{num_devices}, {device}'),
)
PROVENANCE = (
  ('directory', '{directory}'),
  ('seed', '{seed}'),
  ('hash of parameters', '{params_hash:.16}'),
  ('seconds, with tests', '{seconds_total:,.1f}'),
  ('versions', '{versions_text}'),
)
NOTE = """As deployed: with fixed norm statistics, measured anew for the global
model. As in the paper: with the statistics of each test batch. Communication:
the paper's count, the parameters of all workers, there and back every round. On
the wire: what all devices together send each other, local SGD and data parallel
by exact ring all-reduces. Memory: as compiled, of a round's largest program."""
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


def _cells(
  table: Sequence[tuple[str, str]], summaries: Sequence[Summary]
) -> list[list[str]]:
  """Returns a table's rows: a name, then a cell per run."""
  readable = []
  for summary in summaries:
    fields: dict[str, Any] = {'of_rounds': '', **summary}
    fields |= _memory(fields.get('memory_per_device'))
    for name in ('bytes_total', 'bytes_per_round', 'wire_bytes_per_round',
                 'parameter_memory', 'peak_memory'):  # fmt: skip
      if isinstance(count := fields.get(name), int | float):
        unit, unit_name = plots.byte_unit(count)
        fields[f'{name}_text'] = f'{count / unit:.4g} {unit_name}'
    wire = 'wire_bytes_per_round'
    for name, part, whole in (
      ('share_of_bytes', 'bytes_per_round', 'bytes_per_round_local_sgd'),
      ('share_of_wire', wire, f'{wire}_local_sgd'),
      ('share_of_wire_parallel', wire, f'{wire}_data_parallel'),
      ('share_of_params', 'params_per_worker', 'params_total'),
    ):
      if fields.get(part) and fields.get(whole):
        fields[name] = fields[part] / fields[whole]
    versions = (fields.get('versions') or {}).items()
    fields['versions_text'] = ', '.join(f'{k} {v}' for k, v in versions) or DASH
    readable.append(fields)
  return [[n, *(_cell(form, s) for s in readable)] for n, form in table]


def _memory(memory: Any) -> dict[str, int]:
  """Returns what a device holds of parameters, and needs at most."""
  try:
    peaks = [program['peak'] for program in memory['compiled'].values()]
    held = memory['predicted']['parameters']
    return {'parameter_memory': held, 'peak_memory': max(peaks)}
  except (AttributeError, KeyError, TypeError, ValueError):
    return {}


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
