"""The learning curves of a report, each group of seeds as mean and band."""

from collections.abc import Iterator, Sequence
import dataclasses
from html import escape

from resist_jax.report import chart
from resist_jax.report.chart import Chart, Line
from resist_jax.report.colours import styles
from resist_jax.report.groups import Group
from resist_jax.report.sentence import further_tests_of
from resist_jax.report.units import byte_axis

ACCURACY = 'test accuracy, as deployed (%)'
BAND = 'A line is the mean of the seeds; its band goes from lowest to highest.'
_COUNTS = {
  'wire_bytes_total': 'sent by all devices',
  'bytes_total': "communication, the paper's count",
}


def html(groups: Sequence[Group]) -> str:
  """Returns the sections with the curves of a page.

  Args:
    groups: At least one; the runs of the page.
  """
  title, metric, y, scale = 'Accuracy', 'test_accuracy', ACCURACY, 100.0
  if not any(group.curve('round', metric) for group in groups):
    # A network that classifies nothing is tested by its loss.
    title, metric, y, scale = 'Test loss', 'test_loss', 'test loss', 1.0
  seconds = 'seconds of training'
  found = [
    _chart(groups, 'By round', 'round', metric, y, scale),
    _by_bytes(groups, metric, y, scale),
    _chart(groups, 'By time', 'seconds_training', metric, y, scale, seconds),
  ]
  first = [chart for chart in found if chart]
  if not first:
    return '<h2>Accuracy</h2>\n<p>No round has been tested yet.</p>'
  others = list(_others(groups))
  body = f'<h2>{title}</h2>\n{_figure(first, shared=True)}'
  if others:
    body += f'<h2>Other measures</h2>\n{_figure(others, shared=False)}'
  return body


def _figure(charts: Sequence[Chart], shared: bool) -> str:
  several = any(c.several for c in charts)
  began = min(p.x for c in charts[:1] for line in c.lines for p in line.points)
  notes = [BAND] if several else []
  if any(c.log for c in charts):
    notes.append('The axis of the bytes is logarithmic.')
  if shared and not began:
    notes.append('Round 0 is the network before training.')
  return chart.figure(chart.limited(charts, shared), escape(' '.join(notes)))


def _chart(
  groups: Sequence[Group],
  title: str,
  x: str,
  metric: str,
  y: str,
  scale: float = 100,
  name: str = '',
) -> Chart | None:
  """Returns a chart of the groups that have a metric; None if none has."""
  looks = styles(group.protocol for group in groups)
  lines = [
    Line(group.name, look, group.curve(x, metric, scale))
    for group, look in zip(groups, looks, strict=True)
  ]
  lines = [line for line in lines if line.points]
  return Chart(title, name or x, y, lines) if lines else None


def _by_bytes(
  groups: Sequence[Group], metric: str, y: str, scale: float
) -> Chart | None:
  """Returns a measure by bytes: on the wire, if all runs know what that was.

  Two counts never share an axis.
  """
  charts = (
    _chart(groups, 'By bytes', count, metric, y, scale, name)
    for count, name in _COUNTS.items()
  )
  found = next(
    (made for made in charts if made and all(map(_has_sent, made.lines))), None
  )
  if found is None:
    return None
  log, unit, unit_name = byte_axis([line.points[-1].x for line in found.lines])
  lines = [
    dataclasses.replace(
      line,
      points=[
        point._replace(x=point.x / unit)
        for point in line.points
        if point.x > 0 or not log
      ],
    )
    for line in found.lines
  ]
  return dataclasses.replace(
    found, x=f'{found.x} ({unit_name})', lines=lines, log=log
  )


def _has_sent(line: Line) -> bool:
  return line.points[-1].x > 0


def _others(groups: Sequence[Group]) -> Iterator[Chart]:
  """Yields the paper's accuracy, further tests and the training loss."""
  ends = '_accuracy', '_accuracy_paper'
  tests = sorted({test for group in groups for test in further_tests_of(group)})
  wanted = [
    ("With each test batch's own statistics", 'test_accuracy_paper',
     'test accuracy, as in the paper (%)', 100),
    *((f'Test {test}', f'{test}{ends[0]}', 'accuracy, as deployed (%)', 100)
      for test in tests),
    ('Training loss', 'train_loss', 'mean loss of the round', 1),
  ]  # fmt: skip
  for title, metric, name, scale in wanted:
    found = _chart(groups, title, 'round', metric, name, scale)
    if found:
      yield found
