"""A report of one run, or of several side by side, as an HTML page.

Run it as `python -m resist_jax.report RUN... [--out=OUT]`.
"""

from collections.abc import Mapping, Sequence
from html import escape
import itertools
import json
import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from resist_jax import folders
from resist_jax.errors import ConfigError, Parser, exit_code, printable
from resist_jax.report import curves, plots, shell, tables, units
from resist_jax.report.groups import Group, grouped
from resist_jax.report.records import (
  ACCURACIES,
  DASH,
  Summary,
  further_tests,
  is_number,
  load_runs,
)
from resist_jax.report.sentence import classes_and_shape, sentences

# For each row of the summary table, its name and the format of its cells. A
# cell becomes a dash if the summary lacks one of its fields.
TABLE = (
  ('data', '{dataset}'),
  ('classes', '{classes_text}'),
  ('pixels, channels', '{image_text}'),
  ('model', '{model}'),
  ('protocol', '{protocol}'),
  ('workers', '{num_workers}'),
  ('rounds', '{rounds}{of_rounds}'),
  ('local steps per round', '{local_steps}'),
  ('test accuracy, as deployed', '{test_accuracy:.2%}'),
  ('test accuracy, as in paper', '{test_accuracy_paper:.2%}'),
  ('best, as in paper', '{best_test_accuracy_paper:.2%}'),
  ('test loss', '{test_loss:.4g}'),
  ('final training loss', '{final_train_loss:.4g}'),
  ('sent by all devices', '{wire_bytes_total_text}'),
  ('sent in a round', '{wire_bytes_per_round_text}'),
  ('sent vs local SGD', '{share_of_wire:.1%}'),
  ('sent vs data parallel', '{share_of_wire_parallel:.1%}'),
  ("paper's count", '{bytes_total_text}'),
  ("paper's count of a round", '{bytes_per_round_text}'),
  ("paper's count vs local SGD", '{share_of_bytes:.1%}'),
  ('exchange, format', '{exchange}, {wire_format}'),
  ('seconds of training', '{seconds_training:,.1f}'),
  ('{unit} per second', '{images_per_second:,.0f}'),
  ('parameters', '{params_total:,}'),
  ('parameters on a worker', '{share_of_params:.1%}'),
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
_HOW = ('as deployed', 'as in paper')  # For each of `ACCURACIES`.
NOTE = """As deployed: with fixed norm statistics, measured for the global model
after training. As in the paper: with the statistics of each test batch.
Sent: the bytes that all devices together send to each other for training; local
SGD and data parallel are counted with exact ring all-reduces. Paper's count:
the bytes as the paper counts them, where every worker fetches and returns its
parameters in each round. Seconds of training: without compilation, tests and
checkpoints, over the links that the run had. Peak memory: that of the largest
compiled program of a round, of all protocols that a run changes between."""
SEEDS_NOTE = 'A number with ± is a mean and a standard deviation over seeds.'


def _rows(
  table: Sequence[tuple[str, str]], summaries: Sequence[Summary]
) -> list[list[str]]:
  """Returns the rows of a table: a name, then one cell for each run."""
  readable = []
  for summary in summaries:
    fields: dict[str, Any] = {'of_rounds': '', **summary}
    fields |= _memory(fields.get('memory_per_device')) | _images(fields)
    for name in ('bytes_total', 'bytes_per_round', 'wire_bytes_total',
                 'wire_bytes_per_round', 'parameter_memory',
                 'peak_memory'):  # fmt: skip
      count = fields.get(name)
      if is_number(count):
        fields[f'{name}_text'] = units.byte_text(count)
    wire = 'wire_bytes_per_round'
    for name, part, whole in (
      ('share_of_bytes', 'bytes_per_round', 'bytes_per_round_local_sgd'),
      ('share_of_wire', wire, f'{wire}_local_sgd'),
      ('share_of_wire_parallel', wire, f'{wire}_data_parallel'),
      ('share_of_params', 'params_per_worker', 'params_total'),
    ):
      share, of = fields.get(part), fields.get(whole)
      if is_number(share) and is_number(of) and share and of:
        fields[name] = share / of
    versions = fields.get('versions')
    if isinstance(versions, dict):
      texts = (f'{k} {v}' for k, v in versions.items())
      fields['versions_text'] = ', '.join(texts) or DASH
    readable.append(fields)
  unit = _unit(summaries)
  return [
    [name.format(unit=unit), *(_cell(form, s) for s in readable)]
    for name, form in table
  ]


def _unit(summaries: Sequence[Summary]) -> str:
  """Returns what all runs learn from, such as images or windows of a text."""
  units = {summary.get('unit', 'images') for summary in summaries}
  return str(units.pop()) if len(units) == 1 else 'examples'


def _memory(memory: Any) -> dict[str, int]:
  """Returns the bytes of parameters on a device, and its peak memory."""
  try:
    # Older runs have the programs of their last protocol only.
    peaks = [program['peak'] for program in memory['compiled'].values()]
    peaks += memory.get('peaks', {}).values()
    parameters = memory['predicted']['parameters']
    return {'parameter_memory': parameters, 'peak_memory': max(peaks)}
  except (AttributeError, KeyError, TypeError, ValueError):
    return {}


def _images(fields: Summary) -> dict[str, str]:
  """Returns what the images show, and their shape, where that is known."""
  count, names, shape = classes_and_shape(fields)
  texts = {}
  if count:
    texts['classes_text'] = f'{count:,}: {names}'
  if shape:
    texts['image_text'] = '{} x {}, {}'.format(*shape)
  return texts


def _cell(form: str, fields: Summary) -> str:
  """Returns a formatted cell, or a dash if a field is missing."""
  try:
    text = form.format_map(fields)
  except (KeyError, TypeError, ValueError, OverflowError):
    return DASH
  return DASH if text == 'None' else text


def _table(summaries: Sequence[Summary]) -> list[tuple[str, str]]:
  """Returns the rows of the summary table, those of further tests included."""
  fields = set(itertools.chain.from_iterable(summaries))
  rows = [
    (f'{name}, {how}', f'{{{name}{ending}:.2%}}')
    for name in further_tests(fields)
    for how, ending in zip(_HOW, ACCURACIES, strict=True)
  ]
  end = [name for name, _ in TABLE].index('best, as in paper') + 1
  return [*TABLE[:end], *rows, *TABLE[end:]]


def summary_table(
  summaries: Sequence[Summary], labels: Sequence[str] = ()
) -> str:
  """Returns the summaries of runs side by side, as text for a terminal.

  Args:
    summaries: The content of each run's `summary.json`; a missing field
      becomes a dash.
    labels: Heads of the columns; empty for a table without a head.

  Returns:
    One line for each field that a run has, and one column for each run. Two
    runs fit in 100 characters.
  """
  rows = [['', *labels]] if labels else []
  rows += _filled(_rows(_table(summaries), summaries))
  # The names take 26 of 100 characters, and 2 spaces separate the columns.
  width = max(26, 74 // max(len(summaries), 1) - 2)
  return tables.text_table(rows, max_width=width)


def _filled(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
  """Returns the rows of a table that say something."""
  return [row for row in rows if set(row[1:]) - {DASH}]


def write_report(
  run_dirs: Sequence[str | os.PathLike[str]], out_dir: str | os.PathLike[str]
) -> Path:
  """Writes `report.html`, which needs no other file, and pictures for slides.

  Args:
    run_dirs: Workdirs of the runs to show side by side; those that differ only
      in their seed are shown as one.
    out_dir: The folder to write to, which is created if it does not exist.

  Returns:
    The path of the page.

  Raises:
    ConfigError: If a run cannot be read; then nothing is written.
    OSError: If a file cannot be read or written.
  """
  out = folders.resolve(out_dir, '--out', is_text=False)
  runs = load_runs(run_dirs)
  if not runs:
    raise ConfigError('run_dirs is empty: name the workdir of a run.')
  folders.check_writable(out, '--out')
  rows = {run.label: run.rows for run in runs}
  rated = any('test_accuracy' in row for run in runs for row in run.rows)
  by_loss = any('test_loss' in row for run in runs for row in run.rows)
  figures = {
    f'accuracy_by_{x.split("_")[0]}.png': plots.accuracy_figure(rows, x)
    for x in (plots.AXES if rated or not by_loss else ())
  }
  blocks = {}
  for number, run in enumerate(runs, 1):
    name = f'decomposition_{number}.png' if runs[1:] else 'decomposition.png'
    if figure := plots.decomposition_figure(run.label, run.rows):
      figures[name] = blocks[run.label] = figure
  files = {name: plots.render_png(f) for name, f in figures.items()}
  page = _page(grouped(runs), blocks)
  files['report.html'] = page.encode('utf-8', 'replace')
  out.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    with folders.replacing(out / name) as part:
      part.write_bytes(content)
  return out / 'report.html'


def _page(groups: Sequence[Group], blocks: Mapping[str, Figure]) -> str:
  """Returns the HTML page.

  Args:
    groups: The runs to show.
    blocks: Pictures of who trained which block, by the label of the run.

  Returns:
    A page that needs no other file.
  """
  several = any(group.runs[1:] for group in groups)
  first = groups[0]
  title = f'the run {first.runs[0].label}'
  if several:
    title = f'{first.name}, {len(first.runs)} seeds'
  if groups[1:]:
    kind = 'settings' if several else 'runs'
    title = f'{len(groups)} {kind} side by side'
  summaries = [group.summary for group in groups]

  def written(group, name):
    value = group.config.get(name, DASH)
    if name not in group.config:
      return value
    return json.dumps(value, ensure_ascii=False)

  settings = [
    [n, *(written(group, n) for group in groups)]
    for n in sorted(set().union(*(group.config for group in groups)))
  ]
  if groups[1:]:
    settings = [row for row in settings if len(set(row[1:])) > 1]
  lead = ''.join(f'<p>{escape(text)}</p>' for text in sentences(groups))
  return shell.page(
    f'ResIST: {title}',
    f"""<div class="lead">{lead}</div>
{curves.html(groups)}
<h2>All numbers</h2>
{_numbers(groups, _rows(_table(summaries), summaries))}
<p class="quiet">{NOTE} {SEEDS_NOTE if several else ''}</p>
{_blocks(groups, blocks)}
<h2>{'Settings that differ' if groups[1:] else 'Settings'}</h2>
{_html_table(groups, settings) if settings else '<p>None.</p>'}
<h2>Provenance</h2>
{_html_table(groups, _rows(PROVENANCE, summaries))}
""",
  )


def _blocks(groups: Sequence[Group], blocks: Mapping[str, Figure]) -> str:
  """Returns the pictures of who trained which block, one for each group."""
  shown = [
    (group, run.label)
    for group in groups
    for run in group.runs
    if run.label in blocks
  ]
  # Another seed deals the blocks by the same rule.
  first = {group.name: label for group, label in reversed(shown)}
  pictures = ''.join(
    shell.picture(
      blocks[label],
      f'Which worker trained which block in which round, {label}',
      f'{escape(label)}. A striped block has several workers.',
    )
    for label in reversed(first.values())
  )
  return f'<h2>Who trained which block</h2>\n{pictures}' if pictures else ''


def _numbers(groups: Sequence[Group], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table of what differs, and one of what is the same."""
  rows = _filled(rows)
  if not groups[1:]:
    return _html_table(groups, rows)
  same = [row for row in rows if len(set(row[1:])) == 1]
  other = [row for row in rows if row not in same]
  found = _html_table(groups, other) if other else ''
  if same:
    pairs = tables.html_pairs([row[:2] for row in same])
    found += f'<h3>The same in all of them</h3>\n{pairs}'
  return found


def _html_table(groups: Sequence[Group], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table with one column for each group, or pairs for one group."""
  if not groups[1:]:
    return tables.html_pairs(rows)
  head = ['', *(group.name for group in groups)]
  return tables.html_table(head, rows, row_heads=True)


def main(args: Sequence[str] | None = None) -> int:
  """Writes a report and prints the path of its page.

  Args:
    args: The command line; that of this process if None.

  Returns:
    The exit code, see `exit_code`.
  """
  parser = Parser(
    'python -m resist_jax.report',
    description='Writes a report of one run, or of several side by side.',
  )
  parser.add_argument(
    'dirs',
    metavar='RUN',
    nargs='+',
    help='workdir of a run, or folder of the workdirs of several seeds',
  )
  parser.add_argument(
    '--out',
    help='folder to write to (default: RUN, or ./report for several runs)',
  )
  flags = parser.parse_args(args)
  return exit_code(lambda: _report(flags.dirs, flags.out))


def _report(dirs: Sequence[str], out: str | None) -> None:
  runs = [folders.resolve(d, 'a run', is_text=False) for d in dirs]
  default = 'report' if runs[1:] else runs[0]
  page = write_report(runs, default if out is None else out)
  print(printable(str(page)))
