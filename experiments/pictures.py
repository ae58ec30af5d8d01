"""Pictures of several runs: learning curves, and accuracy by a setting.

A picture is data: `figure` draws a file for Markdown, `html` a part of a page.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from html import escape
import statistics
import textwrap
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resist_jax.report import chart, plots, units
from resist_jax.report.chart import Chart, Line, Point
from resist_jax.report.colours import ENSEMBLE, PROTOCOLS, Style, styles

_FAR = 30  # Where one curve sends so many times as much, the axis is log.
Record = Mapping[str, Any]
Panel = Mapping[str, Sequence[Record]]

X_AXES = {
  'round': 'round',
  'seconds_training': 'seconds of training',
  'wire_bytes_total': 'sent by all workers',
  'bytes_total': "sent, by the paper's count",
}
_SEEDS = {
  True: 'A line is a mean over seeds, a band reaches from lowest to highest.',
  False: 'One seed for each line.',
}


@dataclasses.dataclass(frozen=True)
class Picture:
  """Charts beside each other.

  Attributes:
    charts: At least one; all have limits.
    sharey: Whether all have the same.
  """

  charts: Sequence[Chart]
  sharey: bool = True

  def html(self) -> str:
    """Returns a figure for a page, with a note about its seeds."""
    several = any(c.several for c in self.charts)
    note = _SEEDS[several]
    if any(c.log for c in self.charts):
      note += ' The axis of the bytes is logarithmic.'
    return chart.figure(self.charts, escape(note))

  def figure(self) -> Figure:
    """Draws a figure for a file."""
    widths = [max(3.3, 0.62 * len(c.categories) + 1.2) for c in self.charts]
    figure = Figure(figsize=(1.2 + sum(widths), 3.5), layout='constrained')
    every = figure.subplots(
      1, len(widths), sharey=self.sharey, squeeze=False, width_ratios=widths
    )[0]
    for axes, made in zip(every, self.charts, strict=True):
      _draw(axes, made)
    every[0].set_ylabel(self.charts[0].y)
    handles = {}
    for axes in every:
      lines, names = axes.get_legend_handles_labels()
      handles |= dict(zip(names, lines, strict=True))
    if len(handles) > 1:
      _add_legend(figure, handles)
    return figure


def _add_legend(figure: Figure, handles: Mapping[str, Any]) -> None:
  """Names lines under the axes, and makes room for more than two rows."""
  width, letter, sample = figure.get_figwidth(), 0.08, 0.6  # In inches.
  most = int((width - sample) / letter)
  names = [textwrap.wrap(name, most) for name in handles]
  longest = max(len(line) for lines in names for line in lines)
  columns = min(len(names), int(width / (sample + letter * longest)))
  rows = sum(map(len, names)) / columns
  figure.set_figheight(figure.get_figheight() + 0.2 * max(0, rows - 2))
  figure.legend(
    handles.values(),
    map('\n'.join, names),
    loc='outside lower center',
    ncols=columns,
    frameon=False,
  )


def _draw(axes: Any, made: Chart) -> None:
  """Draws a chart on axes."""
  for line in made.lines:
    xs, ys, low, high, seeds = zip(*line.points, strict=True)
    style = line.style
    axes.plot(
      xs, ys, label=line.name, markersize=4, linewidth=1.6, **style.look
    )
    if max(seeds) > 1 and made.categories:
      axes.vlines(xs, low, high, color=style.colour, linewidth=4, alpha=0.3)
    elif max(seeds) > 1:
      axes.fill_between(xs, low, high, color=style.colour, alpha=0.16, lw=0)
  axes.set_title(made.title, fontsize='medium')
  axes.set_xlabel(made.x)
  axes.set_ylim(made.limits)
  plots.style_axes(axes)
  if made.categories:
    turned = {} if made.x else {'rotation': 30, 'ha': 'right'}
    axes.set_xticks(range(len(made.categories)), made.categories, **turned)
    axes.margins(x=0.08)
  elif made.log:
    axes.set_xscale('log')
    ends = [p.x for line in made.lines for p in line.points]
    axes.set_xticks(chart.decades(min(ends), max(ends)))
    axes.xaxis.set_major_formatter('{x:,g}')
    axes.xaxis.set_minor_formatter('')
  else:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=made.x == 'round'))


def looks(names: Iterable[str]) -> dict[str, Style]:
  """Returns how lines look: those of a protocol have its colour.

  Args:
    names: Names of lines, such as `ResIST, int8`.

  Returns:
    A style for each.
  """
  keys = {name: key for key, (name, *_) in PROTOCOLS.items()}
  names = list(names)
  found = styles(keys.get(name.split(',')[0], '') for name in names)
  made = dict(zip(names, found, strict=True))
  if 'ensemble' in made:
    made['ensemble'] = Style(*ENSEMBLE)
  return made


def curves(
  panels: Mapping[str, Panel], x: str, sharey: bool = True
) -> Picture | None:
  """Makes learning curves in panels side by side.

  Args:
    panels: For each panel by title, and each curve by label, the results of its
      seeds.
    x: The horizontal axis, a key of `X_AXES`. Where workers share a device, not
      all that they exchange is on the wire, and the paper's count replaces it
      in all panels: two counts never share a picture.
    sharey: Whether the accuracies of different panels can be compared, so that
      the panels share an axis.

  Returns:
    A picture with the mean over seeds as a line, and their range as a band;
    None without results.
  """
  panels = {
    title: {label: runs for label, runs in panel.items() if _curves(runs)}
    for title, panel in panels.items()
  }
  panels = {title: panel for title, panel in panels.items() if panel}
  if not panels:
    return None
  runs = [
    r for panel in panels.values() for some in panel.values() for r in some
  ]
  if x == 'wire_bytes_total' and any(map(_workers_share_devices, runs)):
    x = 'bytes_total'
  style = looks(dict.fromkeys(name for p in panels.values() for name in p))
  ends = [_ends(panel, x) for panel in panels.values()]
  log = x.endswith('bytes_total') and any(
    max(panel) > _FAR * min(panel) > 0 for panel in ends
  )
  every = [end for panel in ends for end in panel]
  unit, name = _unit(x, min(every) if log else max(every))
  charts = []
  for title, panel in panels.items():
    lines = _lines(panel, x, style, unit)
    accuracy = 'test accuracy (%), deployed'
    charts.append(Chart(title, f'{X_AXES[x]}{name}', accuracy, lines, log=log))
  return Picture(chart.limited(charts, sharey), sharey)


def _ends(panel: Panel, x: str) -> list[float]:
  """Returns where the curves of a panel begin and end."""
  return [
    row[x]
    for runs in panel.values()
    for rows in _curves(runs)
    for row in (rows[0], rows[-1])
  ]


def _lines(
  panel: Panel, x: str, style: Mapping[str, Style], unit: float
) -> list[Line]:
  """Returns the curves of one panel."""
  lines = []
  for label, runs in panel.items():
    points = []
    for rows in zip(*_curves(runs), strict=True):  # A round of each seed.
      at = statistics.mean(row[x] for row in rows) / unit
      points.append(_point(at, [100 * row['test_accuracy'] for row in rows]))
    lines.append(Line(label, style[label], points))
  return lines


def _point(x: float, values: Sequence[float]) -> Point:
  mean = statistics.mean(values)
  return Point(x, mean, min(values), max(values), len(values))


def _workers_share_devices(run: Record) -> bool:
  if 'begun' in run.get('provenance', {}):  # Perhaps on fewer devices.
    return True
  summary = run.get('summary', {})
  return summary.get('num_devices', 1) < summary.get('num_workers', 1)


def _curves(runs: Sequence[Record]) -> list[list[Mapping[str, Any]]]:
  """Returns the tested rounds of those runs that tested the same rounds."""
  curves = [
    [row for row in run.get('curve', ()) if 'test_accuracy' in row]
    for run in runs
  ]
  rounds = [[row['round'] for row in rows] for rows in curves if rows]
  return [
    rows for rows in curves if rows and [r['round'] for r in rows] == rounds[0]
  ]


def _unit(x: str, largest: float) -> tuple[float, str]:
  if not x.endswith('bytes_total'):
    return 1.0, ''
  size, name = units.byte_unit(largest)
  return size, f' ({name})'


def steps(
  panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
  xlabel: str = '',
  sharey: bool = True,
  names: Sequence[str] = (),
) -> Picture | None:
  """Makes charts of the test accuracy by a setting, side by side.

  Args:
    panels: For each panel by title, and each line by label, the accuracies of
      the seeds by setting, in order.
    xlabel: Name of the setting.
    sharey: See `curves`.
    names: The order of settings, some of which may have no values.

  Returns:
    A picture with the means as lines, and a bar from the lowest to the highest
    seed; None without values.
  """
  panels = {t: {k: v for k, v in p.items() if v} for t, p in panels.items()}
  panels = {title: panel for title, panel in panels.items() if panel}
  if not panels:
    return None
  charts = []
  for title, panel in panels.items():
    here = dict.fromkeys(s for line in panel.values() for s in line)
    shown = [s for s in dict.fromkeys([*names, *here]) if s in here]
    style = looks(panel)
    lines = [
      Line(
        label,
        style[label],
        [_point(shown.index(name), values) for name, values in line.items()],
      )
      for label, line in panel.items()
    ]
    charts.append(Chart(title, xlabel, 'test accuracy (%)', lines, shown))
  return Picture(chart.limited(charts, sharey), sharey)
