"""Pictures of several runs: curves with their spread, and bars."""

from collections.abc import Mapping, Sequence
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np

from resist_jax import plots

Record = Mapping[str, Any]
Panel = Mapping[str, Sequence[Record]]

X_AXES = {
  'round': 'round',
  'seconds_training': 'seconds of training',
  'wire_bytes_total': 'sent by all workers',
  'bytes_total': "sent, by the paper's count",
}


def curves(
  panels: Mapping[str, Panel], x: str, alike: bool = True
) -> Figure | None:
  """Draws learning curves side by side.

  Args:
    panels: By title, the runs of each label, a record a seed.
    x: A key of `X_AXES`; where all workers share a device, so that nothing is
      on the wire, the paper's count takes its place.
    alike: Whether the panels' accuracies can be compared with each other.

  Returns:
    A figure: the mean of the seeds, and the range between the least and the
    largest as a band; None where there are no runs.
  """
  panels = {
    title: {label: runs for label, runs in panel.items() if _curves(runs)}
    for title, panel in panels.items()
  }
  panels = {title: panel for title, panel in panels.items() if panel}
  if not panels:
    return None
  last = [
    rows[-1][x]
    for panel in panels.values()
    for runs in panel.values()
    for rows in _curves(runs)
  ]
  if x == 'wire_bytes_total' and not all(last):
    x = 'bytes_total'
  labels = list(dict.fromkeys(name for p in panels.values() for name in p))
  colour = dict(zip(labels, plots.colours(len(labels)), strict=True))
  count = len(panels)
  figure = Figure(figsize=(1.2 + 3.3 * count, 3.4), layout='constrained')
  every = figure.subplots(1, count, sharey=alike, squeeze=False)[0]
  for axes, (title, panel) in zip(every, panels.items(), strict=True):
    ends = [
      row[x]
      for runs in panel.values()
      for rows in _curves(runs)
      for row in (rows[0], rows[-1])
    ]
    log = x.endswith('bytes_total') and max(ends) > 30 * min(ends)
    unit, name = _unit(x, min(ends) if log else max(ends))
    for label, runs in panel.items():
      found = _curves(runs)
      xs = np.mean([[row[x] for row in rows] for rows in found], axis=0) / unit
      ys = 100 * np.array(
        [[row['test_accuracy'] for row in rows] for rows in found]
      )
      line = {'color': colour[label], 'marker': 'o', 'markersize': 3.5}
      axes.plot(xs, ys.mean(axis=0), label=label, **line)
      if len(ys) > 1:
        band = ys.min(axis=0), ys.max(axis=0)
        axes.fill_between(xs, *band, color=colour[label], alpha=0.2, lw=0)
    _frame(axes, title, f'{X_AXES[x]}{name}')
    if log:
      axes.set_xscale('log')
      axes.xaxis.set_major_formatter('{x:,g}')
    else:
      axes.set_xlim(left=0)
      axes.xaxis.set_major_locator(MaxNLocator(6, integer=x == 'round'))
  every[0].set_ylabel('test accuracy (%), deployed')
  handles = {}
  for axes in every:
    handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
  figure.legend(
    handles.values(),
    handles.keys(),
    loc='outside lower center',
    ncols=len(handles),
    frameon=False,
  )
  return figure


def _curves(runs: Sequence[Record]) -> list[list[Mapping[str, Any]]]:
  """Returns the tested rounds of each run, where they are the same ones."""
  found = [
    [row for row in run.get('curve', ()) if 'test_accuracy' in row]
    for run in runs
  ]
  rounds = [[row['round'] for row in rows] for rows in found if rows]
  return [
    rows for rows in found if rows and [r['round'] for r in rows] == rounds[0]
  ]


def _unit(x: str, largest: float) -> tuple[float, str]:
  if not x.endswith('bytes_total'):
    return 1.0, ''
  size, name = plots.byte_unit(largest)
  return size, f' ({name})'


def _frame(axes: Axes, title: str, xlabel: str) -> None:
  axes.set_title(title, fontsize='medium')
  axes.set_xlabel(xlabel)
  axes.grid(color='#e4e4e4', linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def steps(
  panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
  ylabel: str = 'test accuracy (%)',
  xlabel: str = '',
  alike: bool = True,
) -> Figure | None:
  """Draws a number for each of several settings in order, panels side by side.

  Args:
    panels: By title and label of a line, the values of the seeds by setting.
    ylabel: What the numbers are.
    xlabel: What the settings are.
    alike: Whether the panels can be compared with each other.

  Returns:
    A figure: the means, and every seed as a dot; None without any.
  """
  panels = {t: {k: v for k, v in p.items() if v} for t, p in panels.items()}
  panels = {title: panel for title, panel in panels.items() if panel}
  if not panels:
    return None
  settings = {
    t: list(dict.fromkeys(s for line in p.values() for s in line))
    for t, p in panels.items()
  }
  widths = [1 + len(settings[title]) for title in panels]
  figure = Figure(figsize=(1.5 + 0.85 * sum(widths), 3.6), layout='constrained')
  every = figure.subplots(
    1, len(widths), sharey=alike, squeeze=False, width_ratios=widths
  )[0]
  for axes, (title, panel) in zip(every, panels.items(), strict=True):
    names = settings[title]
    colours = plots.colours(len(panel))
    for (label, line), colour in zip(panel.items(), colours, strict=True):
      at = [names.index(name) for name in line]
      means = [statistics.mean(values) for values in line.values()]
      axes.plot(at, means, color=colour, label=label, linewidth=1.5)
      for i, values in zip(at, line.values(), strict=True):
        axes.plot([i] * len(values), values, 'o', color=colour, markersize=4)
    _frame(axes, title, xlabel)
    turned = {} if xlabel else {'rotation': 30, 'ha': 'right'}
    axes.set_xticks(range(len(names)), names, **turned)
    axes.margins(x=0.08)
    if len(panel) > 1:
      axes.legend(frameon=False, fontsize='small')
  every[0].set_ylabel(ylabel)
  return figure
