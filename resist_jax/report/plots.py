"""Figures of runs: accuracy by cost, and which worker trained which block."""

from collections.abc import Mapping, Sequence
import io
import math
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
import numpy as np

from resist_jax.errors import printable
from resist_jax.report.colours import colours, styles
from resist_jax.report.records import MAX_ROUNDS, Rows
from resist_jax.report.units import byte_axis

Slots = Sequence[Sequence[int]]  # For each worker, the blocks that it trained.

EVERYONE, NOBODY = -1, -2  # Stand for a worker in a decomposition image.
# Rows of a decomposition image, for each block and in all: finer than the
# pixels of any figure.
_MAX_STRIPS, _MAX_PIXELS = 120, 4800
_EVERYONE_COLOUR, _NOBODY_COLOUR = '#c9c9c9', '#ffffff'

AXES = {
  'round': 'round',
  'bytes_total': "communication, the paper's count",
  'seconds_training': 'seconds of training',
}
CURVES: tuple[tuple[str, str, dict[str, Any]], ...] = (
  # Metric, its name in the legend, and the style of its line.
  (
    'test_accuracy',
    'fixed statistics, recalibrated (as deployed)',
    {'linestyle': '-', 'linewidth': 1.8, 'marker': 'o', 'markersize': 4},
  ),
  (
    'test_accuracy_paper',
    "test-batch statistics (the paper's protocol)",
    {'linestyle': '--', 'linewidth': 1.0, 'marker': 'o', 'markersize': 2.5},
  ),
)
# Where dashes tell runs apart, the second accuracy is thin and pale.
_FAINT: dict[str, dict[str, Any]] = {
  'test_accuracy': {},
  'test_accuracy_paper': {'linewidth': 1.0, 'alpha': 0.45},
}


def style_axes(axes: Axes, grid: Literal['both', 'x', 'y'] = 'both') -> None:
  """Gives axes a light grid below the data, and a frame on two sides only.

  Args:
    axes: The axes.
    grid: The axis whose ticks have grid lines.
  """
  axes.grid(axis=grid, color='#e4e4e4', linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)


def accuracy_figure(runs: Mapping[str, Rows], x: str) -> Figure:
  """Draws test accuracy against a cost, with both kinds of norm statistics.

  Args:
    runs: The rounds of each run, by its label.
    x: The cost, a key of `AXES`.

  Returns:
    A figure. If no round was evaluated, it says so instead of drawing a curve.
  """
  points = {
    (label, metric): [
      (row[x], 100 * row[metric])
      for row in rows
      if row.get(metric) is not None and row.get(x) is not None
    ]
    for label, rows in runs.items()
    for metric, _, _ in CURVES
  }
  ends = [max(p)[0] for p in points.values() if p]
  log, unit, axis = False, 1.0, AXES[x]
  if x == 'bytes_total':
    log, unit, name = byte_axis(ends)
    axis = f'{axis} ({name}{", logarithmic" if log else ""})'

  entries = len(CURVES) + (len(runs) if len(runs) > 1 else 0)
  figure = Figure(figsize=(6.4, 3.5 + 0.21 * entries), layout='constrained')
  axes = figure.add_subplot()
  looks = [style.look for style in styles(map(protocol_of, runs.values()))]
  for label, look in zip(runs, looks, strict=True):
    for metric, _, style in CURVES:
      xs, ys = np.reshape(points[label, metric], (-1, 2)).T
      axes.plot(xs / unit, ys, **{**style, **look, **_FAINT[metric]})
  axes.set(xlabel=axis, ylabel='test accuracy (%)')
  style_axes(axes)
  if not ends:
    axes.set(xticks=[], yticks=[])
    axes.text(
      0.5, 0.5, 'no evaluation yet', ha='center', transform=axes.transAxes
    )
    return figure
  if log:
    axes.set_xscale('log')
    axes.xaxis.set_major_formatter('{x:,g}')
  else:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=x == 'round'))
  low, high = axes.get_ylim()
  # Show at least two points, or a difference of 0.1 points would look large.
  missing = max(2 - (high - low), 0)
  axes.set_ylim(low - missing / 2, high + missing / 2)
  _accuracy_legend(figure, dict(zip(runs, looks, strict=True)))
  return figure


def protocol_of(rows: Rows) -> str:
  """Returns the protocol of a run's rounds; that of most, if it changed."""
  found = [p for row in rows if isinstance(p := row.get('protocol'), str)]
  return max(found, key=found.count, default='')


def _accuracy_legend(figure: Figure, looks: Mapping[str, Any]) -> None:
  """Adds a legend of the two statistics and, for several runs, of these."""
  several = len(looks) > 1
  colour = '#555555' if several else next(iter(looks.values()))['color']
  faint: list[dict[str, Any]] = [
    {**style, 'color': colour, **_FAINT[metric]} for metric, _, style in CURVES
  ]
  lines = [Line2D([], [], **look) for look in faint]
  names = [name for _, name, _ in CURVES]
  if several:
    runs = [Line2D([], [], linewidth=2, **look) for look in looks.values()]
    lines, names = runs + lines, [*looks, *names]
  _legend(figure, lines, names)


def _legend(
  figure: Figure, handles: Sequence[Line2D | Patch], names: Sequence[str], **kw
) -> None:
  """Puts a legend under the axes; names are shown literally."""
  legend = figure.legend(
    handles,
    [str(i) for i in range(len(names))],
    loc='outside lower center',
    frameon=False,
    **kw,
  )
  # The names replace the numbers afterwards, because matplotlib drops labels
  # that begin with `_` and typesets text between `$` as mathematics.
  for text, name in zip(legend.get_texts(), names, strict=True):
    text.set_parse_math(False)
    text.set_text(name if len(name) <= 60 else f'{name[:29]}…{name[-30:]}')


def decomposition_image(
  slots_by_round: Sequence[Slots | None], num_blocks: int
) -> np.ndarray:
  """Returns an image of which worker trained which block in which round.

  Args:
    slots_by_round: For each round, the blocks that each worker trained, or None
      if every worker held every block.
    num_blocks: L, the length of the chain.

  Returns:
    `int[L * H, rounds]`, where H rows stand for each block, block 0 at the top.
    A value is the number of a worker, `EVERYONE` or `NOBODY`. A block that
    several workers trained is split into strips of equal height, one for each
    of them in ascending order.

  >>> decomposition_image([[[0, 1], [1]], None], num_blocks=2).tolist()
  [[0, -1], [0, -1], [0, -1], [1, -1]]
  """
  holders = [_holders(slots or (), num_blocks) for slots in slots_by_round]
  counts = {len(workers) for column in holders for workers in column} - {0}
  most = max(1, min(_MAX_STRIPS, _MAX_PIXELS // num_blocks))
  strips = min(math.lcm(*counts), most)
  image = np.full((num_blocks, strips, len(holders)), NOBODY, np.int16)
  for column, slots in enumerate(slots_by_round):
    if slots is None:
      image[:, :, column] = EVERYONE
      continue
    for block, workers in enumerate(holders[column]):
      if workers:
        of_strip = np.arange(strips) * len(workers) // strips
        image[block, :, column] = np.asarray(workers)[of_strip]
  return image.reshape(num_blocks * strips, len(holders))


def _holders(slots: Slots, num_blocks: int) -> list[list[int]]:
  """Returns the workers that hold each block, in ascending order."""
  workers: list[list[int]] = [[] for _ in range(num_blocks)]
  for worker, blocks in enumerate(slots):
    for block in set(blocks):
      workers[block].append(worker)
  return workers


def decomposition_figure(label: str, rows: Rows) -> Figure | None:
  """Draws which worker trained which block in which round.

  Args:
    label: The name of the run.
    rows: Its rounds, ascending.

  Returns:
    A figure with one panel for each partitioned chain, of at most `MAX_ROUNDS`
    rounds; None if no round decomposes the model.
  """
  rows = [row for row in rows if row['round']]  # Round 0 is only a test.
  decomposed = [row for row in rows if row.get('slots')]
  if not decomposed:
    return None
  chains = {
    chain: _num_blocks(chain, decomposed)
    for chain in sorted({chain for row in decomposed for chain in row['slots']})
  }
  num_workers = max(len(s) for row in decomposed for s in row['slots'].values())
  shown, part = _window(rows)

  heights = [min(max(0.2 * L, 1.0), 7.0) for L in chains.values()]
  # A phone shows few rounds without scrolling.
  width = min(max(0.13 * len(shown) + 1.2, 4.4), 9.0)
  legend_height = 0.22 * math.ceil((min(num_workers, 16) + 1) / 3)
  figure = Figure(
    figsize=(width, sum(h + 0.5 for h in heights) + legend_height + 0.5),
    layout='constrained',
  )
  panels = figure.subplots(
    len(chains), 1, sharex=True, squeeze=False, height_ratios=heights
  )[:, 0]
  # EVERYONE and NOBODY are negative, so they index this list from its end.
  palette = [*colours(num_workers), _NOBODY_COLOUR, _EVERYONE_COLOUR]
  present = set()
  for axes, (chain, L) in zip(panels, chains.items(), strict=True):
    image = decomposition_image([_slots(row, chain) for row in shown], L)
    present |= {EVERYONE, NOBODY} & set(image.ravel().tolist())
    pixels = np.array([to_rgb(c) for c in palette], np.float32)[image]
    _panel(axes, pixels, shown[0]['round'], L)
    axes.set_title(f'{chain}, {L} blocks', fontsize=9, loc='left')
  panels[-1].set_xlabel('round')
  figure.suptitle(f'{label}{part}', fontsize=10, parse_math=False)
  _worker_legend(figure, palette, num_workers, present)
  return figure


def _num_blocks(chain: str, decomposed: Rows) -> int:
  """Returns L of a chain, as recorded or else as its largest slot shows."""
  return max(
    row.get('num_blocks', {}).get(chain)
    or max((b + 1 for s in row['slots'].get(chain, ()) for b in s), default=1)
    for row in decomposed
  )


def _window(rows: Rows) -> tuple[Rows, str]:
  """Returns the consecutive rounds to draw, and a note if some are left out."""
  # A row may be that of several rounds, which were trained as one.
  begun = [row['round'] - row.get('rounds', 1) + 1 for row in rows]
  numbered = list(zip(begun, rows, strict=True))
  first, last = min(begun), max(row['round'] for row in rows)
  begin, first_cut = first, min(r for r, row in numbered if row.get('slots'))
  if first_cut - first > MAX_ROUNDS // 2:  # Skip a long warm-up.
    begin = first_cut - 5
  end = min(last, begin + MAX_ROUNDS - 1)
  # No worker is known to have trained in a round without a record.
  by_round: dict[int, Any] = {r: {'round': r} for r in range(begin, end + 1)}
  for start, row in numbered:
    drawn = range(max(start, begin), min(row['round'], end) + 1)
    by_round.update(dict.fromkeys(drawn, row))
  shown = list(by_round.values())
  if (begin, end) == (first, last):
    return shown, ''
  if begin == first:
    return shown, f': the first {len(shown)} of {last - first + 1} rounds'
  return shown, f': rounds {begin} to {end} of {last}'


def _slots(row: Mapping[str, Any], chain: str) -> Slots | None:
  """Returns the slots of a chain in a round; None if every worker holds it."""
  if 'slots' not in row:
    return []
  return (row['slots'] or {}).get(chain)


def _panel(axes: Axes, pixels: np.ndarray, first: int, num_blocks: int) -> None:
  """Draws one chain, block 0 at the top, with white lines between cells."""
  left, right = first - 0.5, first + pixels.shape[1] - 0.5
  axes.imshow(
    pixels,
    aspect='auto',
    interpolation='nearest',
    extent=(left, right, num_blocks - 0.5, -0.5),
  )
  # Lines between blocks are thicker, to differ from borders between strips.
  rows, columns = np.arange(0.5, num_blocks - 1), np.arange(left + 1, right)
  axes.hlines(rows, left, right, 'white', linewidth=2)
  axes.vlines(columns, -0.5, num_blocks - 0.5, 'white', linewidth=0.6)
  axes.set_ylabel('block')
  axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
  axes.set_yticks(range(0, num_blocks, -(-num_blocks // 24)))
  axes.tick_params(length=0, labelsize=8)
  axes.spines[:].set_visible(False)


def _worker_legend(
  figure: Figure, palette: Sequence[str], num_workers: int, present: set[int]
) -> None:
  """Adds a legend of the workers, of which at most 16 are named."""
  named = range(0, num_workers, -(-num_workers // 16))
  patches = [Patch(color=palette[worker]) for worker in named]
  names = [f'worker {worker}' for worker in named]
  if EVERYONE in present:
    patches.append(Patch(color=palette[EVERYONE]))
    names.append('every worker holds every block')
  if NOBODY in present:
    patches.append(Patch(facecolor=palette[NOBODY], edgecolor='#999999'))
    names.append('no worker recorded')
  ncols = 4 if max(map(len, names)) < 12 else 2
  _legend(figure, patches, names, ncols=min(len(names), ncols), fontsize=8)


def depth_figure(
  measured: Sequence[Mapping[str, Any]], test: str, names: Sequence[str]
) -> Figure:
  """Draws how good a network is against the blocks that it keeps.

  Args:
    measured: Networks: `order` (`first` or `random`), `blocks`, and a field
      `TEST_NAME` for each name, which may be missing.
    test: Name of the test.
    names: What was measured: `accuracy`, `accuracy_paper`, or another name.

  Returns:
    A figure. Random choices are shown by their mean, and a band from the lowest
    to the highest.
  """
  figure = Figure(figsize=(6.4, 4.2), layout='constrained')
  axes = figure.add_subplot()
  orders = ('first', 'random')
  curves = {
    metric.removeprefix('test_'): (how, style) for metric, how, style in CURVES
  }
  scale = 100 if names[0] in curves else 1
  for order, colour in zip(orders, colours(len(orders)), strict=True):
    for name in names:
      how, style = curves.get(name, (name, CURVES[0][2]))
      found: dict[int, list[float]] = {}
      for row in measured:
        if row['order'] == order and math.isfinite(
          row.get(f'{test}_{name}', math.nan)
        ):
          value = scale * row[f'{test}_{name}']
          found.setdefault(row['blocks'], []).append(value)
      if found:
        depths = sorted(found)
        means = [sum(found[k]) / len(found[k]) for k in depths]
        label = f'{order} blocks, {how.split(",")[0].split(" (")[0]}'
        axes.plot(depths, means, color=colour, label=label, **style)
        low, high = ([f(found[k]) for k in depths] for f in (min, max))
        axes.fill_between(depths, low, high, color=colour, alpha=0.15, lw=0)
  what = f'accuracy on {test} (%)' if scale > 1 else f'{names[0]} on {test}'
  axes.set(xlabel='blocks kept', ylabel=what)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  style_axes(axes)
  if axes.lines:
    figure.legend(loc='outside lower center', ncols=2, fontsize='small')
  return figure


def confusion_figure(
  counts: Sequence[Sequence[int]], class_names: Sequence[str]
) -> Figure:
  """Draws which classes are taken for which.

  Args:
    counts: A row for each class, a column for what it was taken for.
    class_names: Name of each class.

  Returns:
    A figure whose rows are shares of a class. Numbers stand in it for up to 12
    classes, and names beside it for up to 40.
  """
  class_names = [printable(name) for name in class_names]
  table = np.asarray(counts, float)
  shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
  n = len(class_names)
  side = 3.5 + 0.3 * min(n, 20)
  figure = Figure(figsize=(side, side), layout='constrained')
  axes = figure.add_subplot()
  axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
  axes.set(xlabel='taken for', ylabel='is')
  if n <= 40:
    plain = {'fontsize': 'small', 'parse_math': False}  # A name may have $.
    axes.set_xticks(range(n), class_names, rotation=90, **plain)
    axes.set_yticks(range(n), class_names, **plain)
  for row, column in np.ndindex(n, n) if n <= 12 else ():
    colour = 'white' if shares[row, column] > 0.5 else 'black'
    text = f'{int(table[row, column])}'
    place = {'ha': 'center', 'va': 'center', 'fontsize': 'small'}
    axes.text(column, row, text, color=colour, **place)
  return figure


def render_png(figure: Figure) -> bytes:
  """Returns a figure as a PNG file.

  Args:
    figure: The figure to draw.

  Returns:
    The content of the file, at a resolution for high-density screens.
  """
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=200)
  return buffer.getvalue()
