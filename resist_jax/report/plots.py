"""Pictures of runs: accuracy against its cost, and who trained which block."""

from collections.abc import Mapping, Sequence
import io
import math
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
import numpy as np

Rows = Sequence[Mapping[str, Any]]  # metrics.jsonl: one mapping per round
Slots = Sequence[Sequence[int]]  # per worker, the blocks that it trained

# Okabe and Ito's colours, told apart by colour-blind readers; the pale yellow
# stands late because it is weak as a line on white.
PALETTE = (
  '#0072b2',
  '#e69f00',
  '#009e73',
  '#cc79a7',
  '#56b4e9',
  '#d55e00',
  '#f0e442',
  '#222222',
)
EVERYONE, NOBODY = -1, -2  # in place of a worker in a decomposition image
MAX_ROUNDS = 60  # of a decomposition picture: more columns cannot be told apart
_MAX_STRIPS = 120  # rows per block: finer than the pixels of any picture
_EVERYONE_COLOUR, _NOBODY_COLOUR = '#c9c9c9', '#ffffff'

AXES = {
  'round': 'round',
  'bytes_total': "communication, the paper's count",
  'seconds_training': 'seconds of training',
}
CURVES: tuple[tuple[str, str, dict[str, Any]], ...] = (
  # metric, its name for readers, and the style of its line
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


def colours(count: int) -> list[str]:
  """Returns one colour each for runs or workers.

  Args:
    count: How many are needed.

  Returns:
    The fixed palette while it lasts, else steps of a continuous map.
  """
  if count <= len(PALETTE):
    return list(PALETTE[:count])
  return [to_hex(c) for c in colormaps['viridis'](np.linspace(0, 1, count))]


def byte_unit(num_bytes: float) -> tuple[float, str]:
  """Returns the decimal unit in which a number of bytes reads well.

  Args:
    num_bytes: The largest number to show.

  Returns:
    The size of the unit in bytes, and its name.

  >>> byte_unit(2.5e9), byte_unit(640)
  ((1000000000.0, 'GB'), (1.0, 'B'))
  """
  for size, name in ((1e12, 'TB'), (1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB')):
    if num_bytes >= size:
      return size, name
  return 1.0, 'B'


def accuracy_figure(runs: Mapping[str, Rows], x: str) -> Figure:
  """Draws test accuracy under both protocols against a cost.

  Args:
    runs: Per label of a run, its rounds.
    x: A key of `AXES`.

  Returns:
    A figure; it says so if no round has an evaluation.
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
  # Data parallel training sends T times as much as local SGD: on a linear axis
  # the cheap run would be a wall at the left edge.
  log = x == 'bytes_total' and bool(ends) and max(ends) > 20 * min(ends) > 0
  unit, axis = 1.0, AXES[x]
  if x == 'bytes_total':
    unit, name = byte_unit(min(ends) if log else max(ends, default=0))
    axis = f'{axis} ({name}{", logarithmic" if log else ""})'

  entries = len(CURVES) + (len(runs) if len(runs) > 1 else 0)
  figure = Figure(figsize=(6.4, 3.5 + 0.21 * entries), layout='constrained')
  axes = figure.add_subplot()
  for label, colour in zip(runs, colours(len(runs)), strict=True):
    for metric, _, style in CURVES:
      xs, ys = np.reshape(points[label, metric], (-1, 2)).T
      axes.plot(xs / unit, ys, color=colour, **style)
  axes.set(xlabel=axis, ylabel='test accuracy (%)')
  axes.grid(color='#e4e4e4', linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
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
  missing = max(2 - (high - low), 0)  # No drama about a tenth of a percent.
  axes.set_ylim(low - missing / 2, high + missing / 2)
  _accuracy_legend(figure, list(runs))
  return figure


def _accuracy_legend(figure: Figure, labels: list[str]) -> None:
  """Names the runs by colour, if there are several, and the line styles."""
  several = len(labels) > 1
  lines = [
    Line2D([], [], color='#555555' if several else PALETTE[0], **style)
    for _, _, style in CURVES
  ]
  names = [name for _, name, _ in CURVES]
  if several:
    runs = colours(len(labels))
    lines = [Line2D([], [], color=c, linewidth=4) for c in runs] + lines
    names = labels + names
  _legend(figure, lines, names)


def _legend(
  figure: Figure, handles: Sequence[Line2D | Patch], names: Sequence[str], **kw
) -> None:
  """Puts a legend under the axes, with names of runs taken literally."""
  legend = figure.legend(
    handles,
    [str(i) for i in range(len(names))],
    loc='outside lower center',
    frameon=False,
    **kw,
  )
  # Names are set afterwards: matplotlib drops labels that begin with `_`, and
  # reads `$` as mathematics.
  for text, name in zip(legend.get_texts(), names, strict=True):
    text.set_parse_math(False)
    text.set_text(name if len(name) <= 60 else f'{name[:29]}…{name[-30:]}')


def decomposition_image(
  slots_by_round: Sequence[Slots | None], num_blocks: int
) -> np.ndarray:
  """Returns which worker trained which block in which round, as an image.

  Args:
    slots_by_round: Per round and worker, the blocks that it trained; None for
      a round in which every worker holds every block.
    num_blocks: L, the length of the chain.

  Returns:
    `int[L * H, rounds]`, H rows per block from block 0 down: the number of a
    worker, `EVERYONE` or `NOBODY`. A block with several workers is split into
    strips of equal height, in the order of the workers.

  >>> decomposition_image([[[0, 1], [1]], None], num_blocks=2).tolist()
  [[0, -1], [0, -1], [0, -1], [1, -1]]
  """
  holders = [
    [
      [worker for worker, blocks in enumerate(slots or ()) if block in blocks]
      for block in range(num_blocks)
    ]
    for slots in slots_by_round
  ]
  counts = {len(workers) for column in holders for workers in column} - {0}
  strips = min(math.lcm(*counts), _MAX_STRIPS)
  image = np.full((num_blocks, strips, len(holders)), NOBODY)
  for column, slots in enumerate(slots_by_round):
    if slots is None:
      image[:, :, column] = EVERYONE
      continue
    for block, workers in enumerate(holders[column]):
      if workers:
        of_strip = np.arange(strips) * len(workers) // strips
        image[block, :, column] = np.asarray(workers)[of_strip]
  return image.reshape(num_blocks * strips, len(holders))


def decomposition_figure(label: str, rows: Rows) -> Figure | None:
  """Draws which worker trained which block in which round.

  Args:
    label: The name of the run.
    rows: Its rounds, ascending.

  Returns:
    A figure with one panel per partitioned chain, of at most `MAX_ROUNDS`
    rounds; None if no round decomposes the model.
  """
  dealt = [row for row in rows if row.get('slots')]
  if not dealt:
    return None
  chains = {
    chain: _num_blocks(chain, dealt)
    for chain in sorted({chain for row in dealt for chain in row['slots']})
  }
  num_workers = max(len(s) for row in dealt for s in row['slots'].values())
  shown, part = _window(rows, dealt[0]['round'])

  heights = [min(max(0.2 * L, 1.0), 7.0) for L in chains.values()]
  width = min(max(0.13 * len(shown) + 1.2, 6.0), 9.0)
  legend_height = 0.22 * math.ceil((min(num_workers, 16) + 1) / 4)
  figure = Figure(
    figsize=(width, sum(h + 0.5 for h in heights) + legend_height + 0.5),
    layout='constrained',
  )
  panels = figure.subplots(
    len(chains), 1, sharex=True, squeeze=False, height_ratios=heights
  )[:, 0]
  table = [*colours(num_workers), _NOBODY_COLOUR, _EVERYONE_COLOUR]
  present = set()
  for axes, (chain, L) in zip(panels, chains.items(), strict=True):
    image = decomposition_image([_slots(row, chain) for row in shown], L)
    present |= {EVERYONE, NOBODY} & set(image.ravel().tolist())
    # EVERYONE and NOBODY are negative: they index the table from its end.
    pixels = np.array([to_rgb(c) for c in table])[image]
    _panel(axes, pixels, shown[0]['round'], L)
    axes.set_title(f'{chain}, {L} blocks', fontsize=9, loc='left')
  panels[-1].set_xlabel('round')
  figure.suptitle(f'{label}{part}', fontsize=10, parse_math=False)
  _worker_legend(figure, table, num_workers, present)
  return figure


def _num_blocks(chain: str, dealt: Rows) -> int:
  """Returns L of a chain, as recorded or as its slots show."""
  return max(
    row.get('num_blocks', {}).get(chain)
    or max((b + 1 for s in row['slots'].get(chain, ()) for b in s), default=1)
    for row in dealt
  )


def _window(rows: Rows, first_dealt: int) -> tuple[Rows, str]:
  """Returns the rounds to draw, without gaps, and words for a part of them."""
  by_round = {row['round']: row for row in rows}
  first, last = min(by_round), max(by_round)
  begin = first
  if first_dealt - first > MAX_ROUNDS // 2:  # a long warm-up: nothing to see
    begin = first_dealt - 5
  end = min(last, begin + MAX_ROUNDS - 1)
  # A round without a record is one in which no worker is known to train.
  shown = [by_round.get(r, {'round': r}) for r in range(begin, end + 1)]
  if (begin, end) == (first, last):
    return shown, ''
  if begin == first:
    return shown, f': the first {len(shown)} of {last - first + 1} rounds'
  return shown, f': rounds {begin} to {end} of {last}'


def _slots(row: Mapping[str, Any], chain: str) -> Slots | None:
  """Returns a round's slots of a chain; None if every worker holds it."""
  if 'slots' not in row:
    return []
  return (row['slots'] or {}).get(chain)


def _panel(axes: Axes, pixels: np.ndarray, first: int, num_blocks: int) -> None:
  """Draws one chain, block 0 at the top, with a white grid between cells."""
  left, right = first - 0.5, first + pixels.shape[1] - 0.5
  axes.imshow(
    pixels,
    aspect='auto',
    interpolation='nearest',
    extent=(left, right, num_blocks - 0.5, -0.5),
  )
  # Lines across the rounds are the stronger ones: strips share their direction.
  rows, columns = np.arange(0.5, num_blocks - 1), np.arange(left + 1, right)
  axes.hlines(rows, left, right, 'white', linewidth=2)
  axes.vlines(columns, -0.5, num_blocks - 0.5, 'white', linewidth=0.6)
  axes.set_ylabel('block')
  axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
  axes.set_yticks(range(0, num_blocks, -(-num_blocks // 24)))
  axes.tick_params(length=0, labelsize=8)
  axes.spines[:].set_visible(False)


def _worker_legend(
  figure: Figure, table: Sequence[str], num_workers: int, present: set[int]
) -> None:
  """Names the workers, or some of them where the map is continuous."""
  named = range(0, num_workers, -(-num_workers // 16))
  patches = [Patch(color=table[worker]) for worker in named]
  names = [f'worker {worker}' for worker in named]
  if EVERYONE in present:
    patches.append(Patch(color=table[EVERYONE]))
    names.append('every worker holds every block')
  if NOBODY in present:
    patches.append(Patch(facecolor=table[NOBODY], edgecolor='#999999'))
    names.append('no worker recorded')
  _legend(figure, patches, names, ncols=min(len(names), 4), fontsize=8)


def render_png(figure: Figure) -> bytes:
  """Returns a figure as a PNG file.

  Args:
    figure: The figure to draw.

  Returns:
    The bytes of the file, at a resolution for dense screens.
  """
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=200)
  return buffer.getvalue()
