"""Charts as data, and as pictures inside a page that a pointer can ask.

A chart fits the width of a phone, and a page shows several side by side.
"""

from collections.abc import Sequence
import dataclasses
from html import escape
import math
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator

from resist_jax.report.colours import Style

WIDTH, HEIGHT = 380, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 46, 42
_LETTER = 6.3  # Mean width of a letter of the labels.
_MOST = 150  # Points of a line; more would lie on each other.
_MARKERS = {
  'o': 'M-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0-6.4 0z',
  's': 'M-2.9-2.9h5.8v5.8h-5.8z',
  '^': 'M0-3.9L3.7 2.9H-3.7z',
  'D': 'M0-3.9L3.9 0L0 3.9L-3.9 0z',
}


class Point(NamedTuple):
  """A mean over seeds.

  Attributes:
    x: Where; the index of a category, if the chart has categories.
    y: The mean.
    low: The lowest seed.
    high: The highest seed.
    seeds: The number of seeds.
  """

  x: float
  y: float
  low: float
  high: float
  seeds: int


@dataclasses.dataclass(frozen=True)
class Line:
  """The points of one setting.

  Attributes:
    name: For the legend; charts beside each other share it.
    style: How it looks.
    points: By ascending x.
  """

  name: str
  style: Style
  points: Sequence[Point]


@dataclasses.dataclass(frozen=True)
class Chart:
  """Lines over one pair of axes; each axis has one unit.

  Attributes:
    title: What is shown.
    x: Name of the horizontal axis.
    y: Name of the vertical axis.
    lines: At least one point in all.
    categories: Names of x = 0, 1, ...; empty for numbers.
    log: Whether the horizontal axis is logarithmic; then x is positive.
    limits: The range of y; None for that of the points.
  """

  title: str
  x: str
  y: str
  lines: Sequence[Line]
  categories: Sequence[str] = ()
  log: bool = False
  limits: tuple[float, float] | None = None

  @property
  def several(self) -> bool:
    """Whether a point stands for several seeds."""
    return any(p.seeds > 1 for line in self.lines for p in line.points)


def y_limits(charts: Sequence[Chart]) -> tuple[float, float]:
  """Returns a range of y that fits all points of some charts.

  Percentages get two points at least: a tenth would look large.

  Args:
    charts: The charts.
  """
  every = [p for chart in charts for line in chart.lines for p in line.points]
  low, high = min(p.low for p in every), max(p.high for p in every)
  # Less than this would be lost in the digits of a large number.
  least = max(1e-9, 1e-9 * abs(low), 1e-9 * abs(high))
  if any('%' in chart.y for chart in charts):
    least = max(least, 2.0)
  missing = max(least - (high - low), 0.1 * (high - low))
  return low - missing / 2, high + missing / 2


def limited(charts: Sequence[Chart], shared: bool) -> list[Chart]:
  """Returns charts whose y has a range.

  Args:
    charts: The charts.
    shared: Whether all of them get the same one, so that they can be compared.
  """
  return [
    dataclasses.replace(c, limits=y_limits(charts if shared else [c]))
    for c in charts
  ]


def figure(charts: Sequence[Chart], caption: str = '') -> str:
  """Returns charts side by side, or one below the other on a phone.

  Args:
    charts: At least one; all with limits.
    caption: What they show, as HTML.

  Returns:
    An HTML figure. A click on a name of its legend hides that line.
  """
  lines = {line.name: line for chart in charts for line in chart.lines}
  entries = ''.join(map(_entry, lines.values())) if len(lines) > 1 else ''
  legend = f'<div class="legend">{entries}</div>' if entries else ''
  drawn = ''.join(map(svg, charts))
  below = f'<figcaption>{caption}</figcaption>' if caption else ''
  return (
    f'<figure class="charts">{legend}<div class="plots">{drawn}</div>'
    f'{below}</figure>\n'
  )


def _entry(line: Line) -> str:
  sample = (
    '<svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">'
    f'<path d="M1 6H33" {_stroke(line.style)}/>'
    f'<path transform="translate(17 6)" d="{_MARKERS[line.style.marker]}" '
    f'fill="{line.style.colour}"/></svg>'
  )
  return (
    f'<button type="button">{sample}<span>{escape(line.name)}</span></button>'
  )


def _stroke(style: Style) -> str:
  dashes = ' '.join(f'{2 * d:g}' for d in style.dashes)
  dashes = f' stroke-dasharray="{dashes}"' if dashes else ''
  return f'fill="none" stroke="{style.colour}" stroke-width="2"{dashes}'


class _Frame(NamedTuple):
  """Where numbers are in the picture."""

  low: float
  high: float
  bottom: float
  top: float
  log: bool
  height: float

  def x(self, value: float) -> float:
    low, high = self.low, self.high
    if self.log:
      low, high, value = (math.log10(v) for v in (low, high, value))
    share = (value - low) / (high - low or 1)
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

  def y(self, value: float) -> float:
    share = (value - self.bottom) / (self.top - self.bottom)
    return round(_TOP + (1 - share) * self.height, 1)


def svg(chart: Chart) -> str:
  """Returns a chart as an SVG element.

  Args:
    chart: The chart, with limits.

  Returns:
    The element. Each point has a title, which browsers show without a script.
  """
  assert chart.limits is not None
  xs = [p.x for line in chart.lines for p in line.points]
  low, high = (min(xs), max(xs)) if chart.log else (0, max(xs))
  if chart.log and low == high:
    low, high = low / 2, high * 2
  if chart.categories:
    low, high = -0.4, len(chart.categories) - 0.6
  longest = max(map(len, chart.categories), default=0)
  room = (WIDTH - _LEFT - _RIGHT) / max(len(chart.categories), 1)
  turned = longest * _LETTER + 8 > room
  below = 0.62 * _LETTER * longest - 2 if turned else 0
  height = HEIGHT - _TOP - _BOTTOM
  frame = _Frame(low, high or 1, *chart.limits, chart.log, height)
  total = HEIGHT + below - (0 if chart.x else 18)
  label = f'{chart.title}: {chart.y} by {chart.x or "setting"}'
  return (
    f'<svg class="chart" viewBox="0 0 {WIDTH} {total:g}" role="img" '
    f'aria-label="{escape(label)}">'
    f'<text x="0" y="14" class="title">{escape(chart.title)}</text>'
    f'<text x="0" y="33">{escape(chart.y)}</text>'
    f'{_axes(chart, frame, turned)}'
    f'<text x="{(WIDTH + _LEFT - _RIGHT) / 2:g}" y="{total - 6:g}" '
    f'text-anchor="middle">{escape(chart.x)}</text>'
    f'{"".join(_line(line, chart, frame) for line in chart.lines)}</svg>'
  )


def _axes(chart: Chart, frame: _Frame, turned: bool) -> str:
  """Returns ticks, their labels and the lines of a grid."""
  parts = []
  right, foot = WIDTH - _RIGHT, _TOP + frame.height
  for value in _ticks(frame.bottom, frame.top, 5):
    y = frame.y(value)
    parts.append(
      f'<path class="grid" d="M{_LEFT} {y}H{right}"/>'
      f'<text x="{_LEFT - 6}" y="{y + 4:g}" text-anchor="end">'
      f'{_number(value)}</text>'
    )
  if chart.categories:
    marks = list(enumerate(chart.categories))
  elif chart.log:
    marks = [(v, _number(v)) for v in decades(frame.low, frame.high)]
  else:
    whole = chart.x == 'round'
    marks = [(v, _number(v)) for v in _ticks(frame.low, frame.high, 5, whole)]
  for value, name in marks:
    x = frame.x(value)
    place = f'x="{x}" y="{foot + 16:g}" text-anchor="middle"'
    if turned:
      place = (
        f'x="{x + 4}" y="{foot + 12:g}" text-anchor="end" '
        f'transform="rotate(-38 {x + 4} {foot + 12:g})"'
      )
    parts.append(
      f'<path class="grid" d="M{x} {_TOP}V{foot:g}"/>'
      f'<text {place}>{escape(name)}</text>'
    )
  parts.append(f'<path class="frame" d="M{_LEFT} {_TOP}V{foot:g}H{right}"/>')
  return ''.join(parts)


def _line(line: Line, chart: Chart, frame: _Frame) -> str:
  points = _thinned(line.points)
  if not points:
    return ''
  at = [(frame.x(p.x), frame.y(p.y)) for p in points]
  colour = line.style.colour
  several = [p for p in points if p.seeds > 1]
  spread = ''
  if several and chart.categories:
    bars = ''.join(
      f'M{frame.x(p.x)} {frame.y(p.low)}V{frame.y(p.high)}' for p in several
    )
    spread = f'<path class="bar" d="{bars}" stroke="{colour}"/>'
  elif several:
    upper = [f'{frame.x(p.x)} {frame.y(p.high)}' for p in points]
    lower = [f'{frame.x(p.x)} {frame.y(p.low)}' for p in reversed(points)]
    band = 'L'.join(upper + lower)
    spread = f'<path class="band" d="M{band}Z" fill="{colour}"/>'
  path = 'L'.join(f'{x} {y}' for x, y in at)
  small = ' class="small"' if len(points) > 40 else ''
  marks = ''.join(
    f'<path{small} transform="translate({x} {y})" '
    f'd="{_MARKERS[line.style.marker]}">'
    f'<title>{escape(_said(line, point, chart))}</title></path>'
    for (x, y), point in zip(at, points, strict=True)
  )
  return (
    f'<g data-line="{escape(line.name)}">{spread}'
    f'<path d="M{path}" {_stroke(line.style)}/>'
    f'<g class="marks" fill="{colour}">{marks}</g></g>'
  )


def _said(line: Line, point: Point, chart: Chart) -> str:
  """Returns what a pointer at a point reads."""
  where = f'{chart.x} {point.x:.{7 if chart.x == "round" else 4}g}'
  if chart.categories:
    where = f'{chart.x} {chart.categories[int(point.x)]}'.strip()
  text = f'{line.name}; {where}; {chart.y}: {point.y:.4g}'
  if point.seeds > 1:
    text += f', from {point.low:.4g} to {point.high:.4g} in {point.seeds} seeds'
  return text


def _thinned(points: Sequence[Point]) -> list[Point]:
  """Returns at most `_MOST` points, the first and the last among them."""
  if len(points) <= _MOST:
    return list(points)
  step = (len(points) - 1) / (_MOST - 1)
  return [points[round(i * step)] for i in range(_MOST)]


def _ticks(
  low: float, high: float, most: int, whole: bool = False
) -> list[float]:
  steps = [1, 2, 2.5, 5, 10]
  found = MaxNLocator(most, steps=steps, integer=whole).tick_values(low, high)
  slack = 1e-9 * (high - low)
  return [float(v) for v in found if low - slack <= v <= high + slack]


def decades(low: float, high: float) -> list[float]:
  """Returns powers of ten in a range, and their parts if they are few.

  Args:
    low: The lowest number, above 0.
    high: The highest number.

  >>> decades(3, 400), decades(30, 50)
  ([3.0, 10.0, 30.0, 100.0, 300.0], [30.0, 40.0, 50.0])
  """
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for parts in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
    found = [m * 10.0**k for k in powers for m in parts]
    found = [v for v in found if low <= v <= high]
    if len(found) >= 3:
      break
  return found


def _number(value: float) -> str:
  text = f'{value:,.6g}'
  return text if text != '-0' else '0'
