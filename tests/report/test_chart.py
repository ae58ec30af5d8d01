"""Charts inside a page."""

import html.parser
import re

from matplotlib.colors import to_rgb
import pytest

from resist_jax.report import chart, colours
from resist_jax.report.chart import Chart, Line, Point


def made(points, name='ResIST', **fields):
  style = colours.styles(['resist'])[0]
  plain = Chart('t', 'round', 'accuracy (%)', [Line(name, style, points)])
  fields = {**plain.__dict__, **fields}
  (limited,) = chart.limited([Chart(**fields)], shared=False)
  return limited


def points(*values):
  return [Point(x, y, y, y, 1) for x, y in enumerate(values)]


def positions(text):
  found = re.findall(r'<path transform="translate\(([\d.]+) ([\d.]+)\)', text)
  return [(float(x), float(y)) for x, y in found]


def test_points_lie_where_their_numbers_say():
  (x0, y0), (x1, y1), (x2, y2) = positions(chart.svg(made(points(0, 5, 10))))
  assert x1 - x0 == pytest.approx(x2 - x1)
  assert y0 - y1 == pytest.approx(y1 - y2)
  assert y0 > y2
  assert 0 < x0 < x2 < chart.WIDTH
  assert 0 < y2 < y0 < chart.HEIGHT


def test_a_logarithmic_axis_has_equal_factors():
  every = [Point(x, 50, 50, 50, 1) for x in (1, 10, 100)]
  (x0, _), (x1, _), (x2, _) = positions(chart.svg(made(every, log=True)))
  assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)


def test_a_point_says_its_numbers_to_those_who_ask():
  text = chart.svg(made([Point(3, 50, 40, 60, 2)], name='<b> & "c"'))
  html.parser.HTMLParser().feed(text)
  assert (
    '<title>&lt;b&gt; &amp; &quot;c&quot;; round 3; accuracy (%): 50, '
    in (text)
  )
  assert 'from 40 to 60 in 2 seeds</title>' in text
  assert '<b>' not in text


def test_a_small_difference_does_not_look_large():
  low, high = made(points(50, 50.1)).limits
  assert high - low >= 2
  low, high = made(points(1.0, 1.1), y='loss').limits
  assert high - low < 0.2


def test_charts_that_can_be_compared_share_their_range():
  first, second = made(points(10, 20)), made(points(80, 90))
  shared = chart.limited([first, second], shared=True)
  assert shared[0].limits == shared[1].limits
  assert shared[0].limits[0] < 10 < 90 < shared[0].limits[1]


def test_a_long_curve_keeps_its_ends_and_stays_small():
  text = chart.svg(made(points(*range(10_000))))
  assert 'round 0;' in text
  assert 'round 9999;' in text
  assert len(text) < 60_000


def test_long_names_of_categories_are_turned():
  names = ['a', 'a rather long name', 'another long name', 'and one more']
  every = points(1, 2, 3, 4)
  assert 'rotate(' in chart.svg(made(every, categories=names))
  assert 'rotate(' not in chart.svg(made(every, categories=list('abcd')))


def luminance(colour):
  linear = [
    c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    for c in to_rgb(colour)
  ]
  return sum(
    w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
  )


def test_a_protocol_has_one_colour_that_stands_out_from_white():
  names = list(colours.PROTOCOLS)
  found = colours.styles([*names, *names])
  assert [s.colour for s in found[:3]] == [s.colour for s in found[3:]]
  assert len({(s.colour, s.dashes) for s in found}) == 6
  assert len({s.marker for s in found[:3]}) == 3
  for style in found:
    assert 1.05 / (luminance(style.colour) + 0.05) >= 3
  # Workers of usual runs have no colour of a protocol.
  assert not {s.colour for s in found} & set(colours.colours(5))


@pytest.mark.parametrize('value', [1e-12, 1.0, 2.0**23, 4e10, -3e37])
def test_a_single_value_of_any_size_is_drawn(value):
  limited = made([Point(1, value, value, value, 1)], y='test loss')
  low, high = limited.limits
  assert low < value < high
  assert 'nan' not in chart.svg(limited)
