"""Runs that differ in nothing but their seed, as one."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
import json
import os
import re
import statistics
from typing import Any

from resist_jax.report import plots
from resist_jax.report.chart import Point
from resist_jax.report.colours import PROTOCOLS, protocol_name
from resist_jax.report.records import Run, Summary, is_number

_FREE = ('seed', 'data.dir')  # Settings in which the runs of a group differ.
_MOST_NAMES = 3  # Values of seeds that a cell lists, if they are no numbers.


class Spread(float):
  """The mean of several seeds, which is written with its deviation.

  >>> f'{Spread([0.5, 0.6]):.1%}', f'{Spread([3, 4])}'
  ('55.0% ± 7.1%', '3 to 4')
  """

  def __new__(cls, values: Sequence[float]) -> 'Spread':
    """Takes the mean of one value for each seed, of at least two seeds."""
    made = super().__new__(cls, statistics.mean(values))
    made.values = tuple(values)
    return made

  values: tuple[float, ...]

  def __format__(self, form: str) -> str:
    """Returns mean and standard deviation; without a format, the range."""
    if not form:
      return f'{min(self.values):g} to {max(self.values):g}'
    deviation = statistics.stdev(self.values)
    return f'{float(self):{form}} ± {deviation:{form}}'


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs of several seeds, or a single run.

  Attributes:
    name: For readers; unique in a report.
    runs: At least one; only their seeds differ.
    summary: Their summaries as one: numbers that differ are a `Spread`.
  """

  name: str
  runs: Sequence[Run]
  summary: Summary

  @property
  def config(self) -> Mapping[str, Any]:
    """The settings, with the seed of the first run."""
    return self.runs[0].config

  @property
  def protocol(self) -> str:
    """The protocol of most rounds."""
    known = plots.protocol_of(self.runs[0].rows)
    return known or str(self.summary.get('protocol', ''))

  def values(self, field: str) -> list[float]:
    """Returns a number of the summaries, of each seed that has it."""
    found = [run.summary.get(field) for run in self.runs]
    return [value for value in found if is_number(value)]

  def curve(self, x: str, metric: str, scale: float = 1) -> list[Point]:
    """Returns the means of a metric over the rounds that all seeds have.

    A seed without the metric, such as one that is not tested yet, is left out.

    Args:
      x: A field of the rounds.
      metric: Another one.
      scale: Factor on the metric.
    """
    by_round = [
      {
        row['round']: (row[x], scale * row[metric])
        for row in run.rows
        if row.get(x) is not None and row.get(metric) is not None
      }
      for run in self.runs
    ]
    by_round = list(filter(None, by_round))
    shared = set.intersection(*map(set, by_round)) if by_round else set()
    points = []
    for number in sorted(shared):
      xs, ys = zip(*(rows[number] for rows in by_round), strict=True)
      mean = statistics.mean(ys)
      points.append(Point(statistics.mean(xs), mean, min(ys), max(ys), len(ys)))
    return points


def grouped(runs: Sequence[Run]) -> list[Group]:
  """Puts together the runs that differ in nothing but their seed.

  Args:
    runs: The runs.

  Returns:
    Groups in the order of their first runs. Runs without a seed, or with the
    same one, stay alone.
  """
  buckets: dict[str, list[Run]] = {}
  for number, run in enumerate(runs):
    same = {k: v for k, v in run.config.items() if k not in _FREE}
    key = json.dumps(same, sort_keys=True)
    known = [other.config['seed'] for other in buckets.get(key, ())]
    if 'seed' not in run.config or run.config['seed'] in known:
      key = str(number)
    buckets.setdefault(key, []).append(run)
  made = [Group(_label(b), b, _merged(b)) for b in buckets.values()]
  if len(made) == 1:
    return made
  names = [group.name for group in made]
  protocols = [group.protocol for group in made]
  if len(set(protocols)) == len(made) and set(protocols) <= set(PROTOCOLS):
    names = [protocol_name(protocol) for protocol in protocols]
  return [
    dataclasses.replace(
      group, name=name if names.count(name) == 1 else f'{name}, {number}'
    )
    for number, (group, name) in enumerate(zip(made, names, strict=True), 1)
  ]


def _label(runs: Sequence[Run]) -> str:
  """Returns the common part of the names of some runs."""
  if len(runs) == 1:
    return protocol_name(runs[0].label)
  paths = [str(run.summary['directory']) for run in runs]
  same = itertools.takewhile(
    lambda letters: len(set(letters)) == 1, zip(*paths, strict=False)
  )
  common = ''.join(letters[0] for letters in same)
  if all(path[len(common) :][:1].isdigit() for path in paths):
    common = common.rstrip('0123456789')  # 1 of the seeds 10 and 11.
  common = re.sub(r'[\W_]*(seed)?[\W_]*$', '', common)
  return protocol_name(common.rpartition(os.sep)[2]) or 'runs'


def _merged(runs: Sequence[Run]) -> dict[str, Any]:
  """Returns the summaries of some runs as one."""
  # The first run's values come first, and no field of another is lost.
  merged = {k: v for run in reversed(runs) for k, v in run.summary.items()}
  if len(runs) == 1:
    return merged
  for name in merged:
    values = [run.summary[name] for run in runs if name in run.summary]
    if all(value == values[0] for value in values):
      continue
    numbers = [value for value in values if is_number(value)]
    if numbers and all(v is None or is_number(v) for v in values):
      # A run may not have been tested yet.
      merged[name] = Spread(numbers) if numbers[1:] else numbers[0]
    elif all(isinstance(value, str | int) for value in values):
      listed = ', '.join(map(str, values[:_MOST_NAMES]))
      merged[name] = listed + (', …' if values[_MOST_NAMES:] else '')
  merged['seed'] = ', '.join(str(run.config['seed']) for run in runs)
  return merged
