"""Figures of several runs: learning curves, and accuracy by a setting."""

from collections.abc import Mapping, Sequence
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np

from resist_jax.report import plots

Record = Mapping[str, Any]
Panel = Mapping[str, Sequence[Record]]

X_AXES = {
  'round': 'round',
  'seconds_training': 'seconds of training',
  'wire_bytes_total': 'sent by all workers',
  'bytes_total': "sent, by the paper's count",
}


def curves(
  panels: Mapping[str, Panel], x: str, sharey: bool = True
) -> Figure | None:
  """Draws learning curves in panels side by side.

  Args:
    panels: For each panel by title, and each curve by label, the results of its
      seeds.
    x: The horizontal axis, a key of `X_AXES`. Where all workers share a device,
      nothing is on the wire, and the paper's count replaces it.
    sharey: Whether the accuracies of different panels can be compared, so that
      the panels share an axis.

  Returns:
    A figure with the mean over seeds as a line, and their range as a band; None
    without results.
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
  every = figure.subplots(1, count, sharey=sharey, squeeze=False)[0]
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
      seeds = _curves(runs)
      xs = np.mean([[row[x] for row in rows] for rows in seeds], axis=0) / unit
      ys = 100 * np.array(
        [[row['test_accuracy'] for row in rows] for rows in seeds]
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
  size, name = plots.byte_unit(largest)
  return size, f' ({name})'


def _frame(axes: Axes, title: str, xlabel: str) -> None:
  axes.set_title(title, fontsize='medium')
  axes.set_xlabel(xlabel)
  plots.style_axes(axes)


def steps(
  panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
  ylabel: str = 'test accuracy (%)',
  xlabel: str = '',
  sharey: bool = True,
) -> Figure | None:
  """Draws a number by a setting, in panels side by side.

  Args:
    panels: For each panel by title, and each line by label, the values of the
      seeds by setting, in order.
    ylabel: Name of the number.
    xlabel: Name of the setting.
    sharey: Whether the numbers of different panels can be compared, so that the
      panels share an axis.

  Returns:
    A figure with the means as lines, and each seed as a dot; None without
    values.
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
    1, len(widths), sharey=sharey, squeeze=False, width_ratios=widths
  )[0]
  for axes, (title, panel) in zip(every, panels.items(), strict=True):
    names = settings[title]
    colours = plots.colours(len(panel))
    for (label, line), colour in zip(panel.items(), colours, strict=True):
      positions = [names.index(name) for name in line]
      means = [statistics.mean(values) for values in line.values()]
      axes.plot(positions, means, color=colour, label=label, linewidth=1.5)
      for i, values in zip(positions, line.values(), strict=True):
        axes.plot([i] * len(values), values, 'o', color=colour, markersize=4)
    _frame(axes, title, xlabel)
    rotation = {} if xlabel else {'rotation': 30, 'ha': 'right'}
    axes.set_xticks(range(len(names)), names, **rotation)
    axes.margins(x=0.08)
    if len(panel) > 1:
      axes.legend(frameon=False, fontsize='small')
  every[0].set_ylabel(ylabel)
  return figure
