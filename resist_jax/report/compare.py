"""When one accuracy counts as better than another: the rule of all pages."""

from collections.abc import Sequence
import math
import statistics
from typing import Literal, NamedTuple

POINTS, SEEDS = 1.0, 3
RULE = (
  f'Two accuracies are ranked only if each is a mean of at least {SEEDS} '
  f'seeds, if they differ by at least {POINTS:g} point, and if the difference '
  'is more than twice its standard error. With as many seeds, accuracies less '
  'than a point apart are level, unless twice the standard error exceeds a '
  'point.'
)
Verdict = Literal['ahead', 'behind', 'level', 'undecided', 'untested']


class Comparison(NamedTuple):
  """What two settings' accuracies say about each other.

  Attributes:
    verdict: `ahead` and `behind` are about the first one; `level`: they differ
      by less than a point; `undecided`: too few seeds, or too different ones;
      `untested`: no result of one of them.
    points: How far the first mean is above the second, in percentage points;
      NaN if untested.
    why: The part of the rule that decided, as the end of a sentence.
  """

  verdict: Verdict
  points: float
  why: str


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
  """Compares the accuracies of the seeds of two settings.

  Args:
    ours: Accuracies in percent, one for each seed.
    theirs: Those of the other setting.

  Returns:
    The verdict by `RULE`.

  >>> compare([50, 51, 52], [40, 41, 42]).verdict, compare([50], [40]).verdict
  ('ahead', 'undecided')
  >>> compare([50, 50.5, 51], [50.2, 50.7, 51.3]).verdict
  'level'
  """
  if not (ours and theirs):
    return Comparison('untested', math.nan, 'there is no result')
  points = statistics.mean(ours) - statistics.mean(theirs)
  fewest = min(len(ours), len(theirs))
  if fewest < SEEDS:
    seeds = 'one seed ranks' if fewest == 1 else f'{fewest} seeds rank'
    return Comparison('undecided', points, f'{seeds} nothing')
  both = (statistics.variance(x) / len(x) for x in (ours, theirs))
  noise = 2 * math.sqrt(sum(both))
  if abs(points) <= noise and noise > POINTS:
    return Comparison('undecided', points, 'the seeds of each differ as much')
  if abs(points) < POINTS:
    return Comparison('level', points, f'less than {POINTS:g} point apart')
  verdict = 'ahead' if points > 0 else 'behind'
  return Comparison(verdict, points, f'with {fewest} seeds or more')
